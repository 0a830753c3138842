//! The generator of dropout gives the numbers that its authors publish. Source: Random123, tests/kat_vectors, `philox4x32 10`.
use kernels::dropout::{Dropout, philox};

/// (counter, key, numbers).
const KNOWN: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
    ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
    ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
    (
        [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
        [0xa409_3822, 0x299f_31d0],
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
    ),
];

#[test]
fn known_answers() {
    for (counter, key, expected) in KNOWN {
        assert_eq!(philox(counter, key), expected, "{counter:x?}, {key:x?}");
    }
}

/// The seed is the key, the offset the last word of the counter; what of it is longer is in the key.
#[test]
fn seed_and_offset_are_key_and_counter() {
    let (counter, key, expected) = KNOWN[2];
    let (seed, offset) = (u64::from(key[1]) << 32 | u64::from(key[0]), u64::from(counter[3]));
    let [row, column, head, _] = counter.map(|word| word % (1 << 20));
    let expected_here = philox([row / 16 * 8 + row % 8, column / 32 * 8 + column % 8, head, counter[3]], key);
    assert_eq!(Dropout::new(0.5, seed, offset).bits(head, row, column), expected_here);
    assert_ne!(expected_here, expected);
    let longer = Dropout::new(0.5, seed - (5 << 32), offset | 5 << 32);
    assert_eq!(longer.bits(head, row, column), expected_here);
}
