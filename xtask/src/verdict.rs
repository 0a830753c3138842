//! What became of one step.
use std::fmt;

/// The end of a step. What was not run is never reported as passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All is well; a remark, or nothing.
    Passed(String),
    /// What is wrong.
    Failed(String),
    /// Why it did not run.
    Skipped(String),
}

impl Verdict {
    /// Passed, if there are no complaints.
    pub fn of(complaints: Vec<String>) -> Self {
        if complaints.is_empty() { Verdict::Passed(String::new()) } else { Verdict::Failed(complaints.join("\n")) }
    }

    /// Whether something is wrong.
    pub fn is_failure(&self) -> bool {
        matches!(self, Verdict::Failed(_))
    }

    /// One word.
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Passed(_) => "passed",
            Verdict::Failed(_) => "failed",
            Verdict::Skipped(_) => "skipped",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (Verdict::Passed(remark) | Verdict::Failed(remark) | Verdict::Skipped(remark)) = self;
        f.write_str(self.word())?;
        match remark.lines().count() {
            0 => Ok(()),
            1 => write!(f, ": {remark}"),
            _ => write!(f, ":\n  {}", remark.replace('\n', "\n  ")),
        }
    }
}
