//! What test binaries print, counted.
use std::fmt;
use std::io::{BufRead, Write};
use std::ops::AddAssign;

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ran, and all is well.
    pub passed: usize,
    /// Ran, and something is wrong.
    pub failed: usize,
    /// Did not run: ignored, or without the GPU that they need.
    pub skipped: usize,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Counts the tests in the output of `cargo test -- --show-output`, and passes it on, less what successful tests print.
///
/// A test that finds no GPU prints a line that starts with `skipped:` and returns. To libtest it has passed; not to us.
pub fn count(output: impl BufRead, mut shown: impl Write) -> std::io::Result<Counts> {
    let mut counts = Counts::default();
    let mut in_successes = false;
    let mut in_skipped_test = false;
    for line in output.lines() {
        let line = line?;
        if line == "successes:" {
            in_successes = true;
        } else if line == "failures:" || line.starts_with("test result:") {
            in_successes = false;
        } else if line.starts_with("---- ") {
            in_skipped_test = false;
        }
        if in_successes {
            if line.starts_with("skipped:") && !in_skipped_test {
                in_skipped_test = true;
                counts.passed -= 1;
                counts.skipped += 1;
                writeln!(shown, "{line}")?;
            }
        } else {
            count_line(&line, &mut counts);
            writeln!(shown, "{line}")?;
        }
    }
    Ok(counts)
}

/// `test NAME ... ok`: counted here and not in `test result:`, so that a binary that dies has its tests counted.
fn count_line(line: &str, counts: &mut Counts) {
    if let Some((_, result)) = line.strip_prefix("test ").and_then(|test| test.rsplit_once(" ... ")) {
        match result.split(',').next().unwrap_or_default() {
            "ok" => counts.passed += 1,
            "FAILED" => counts.failed += 1,
            "ignored" => counts.skipped += 1,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 5 tests
test a ... ok
test b - should panic ... ok
test c ... FAILED
test d ... ignored, needs a week
test e ... ok

successes:

---- a stdout ----
test x ... ok

---- e stdout ----
skipped: no GPU
skipped: really

successes:
    a
    b
    e

failures:

---- c stdout ----
skipped: not this

failures:
    c

test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

running 1 test
test src/lib.rs - (line 3) - compile ... ok
";

    #[test]
    fn a_run() {
        let mut shown = Vec::new();
        let counts = count(OUTPUT.as_bytes(), &mut shown).unwrap();
        assert_eq!(counts, Counts { passed: 3, failed: 1, skipped: 2 });
        let shown = String::from_utf8(shown).unwrap();
        assert!(shown.contains("test c ... FAILED") && shown.contains("skipped: no GPU") && !shown.contains("test x"));
        assert_eq!(counts.to_string(), "3 passed, 1 failed, 2 skipped");
    }
}
