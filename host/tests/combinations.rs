//! The page of the book that says what runs where is what the program would print.

#[test]
fn the_page_is_up_to_date() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/src/combinations.md");
    let found = std::fs::read_to_string(page).expect("the page is there");
    let expected = ferroflash::combinations::markdown();
    assert!(found == expected, "run `ferroflash info --kernels > docs/src/combinations.md`; it should be\n{expected}");
}
