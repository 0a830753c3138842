//! What a command answers on stdout: lines for a reader, or one JSON object for a program.
use anyhow::Result;
use serde_json::Value;
use std::fmt::Display;
use std::io::{self, Write};

/// Named facts, one a line, their values in one column.
#[derive(Default)]
pub struct Facts(Vec<(&'static str, String)>);

impl Facts {
    /// Adds a fact.
    pub fn add(&mut self, name: &'static str, value: impl Display) {
        self.0.push((name, value.to_string()));
    }
}

impl Display for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = self.0.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        self.0.iter().try_for_each(|(name, value)| writeln!(f, "{name:width$}  {value}"))
    }
}

/// Writes text to stdout. Unlike `print!` it returns an error, where a pipe is closed or a disk full.
pub fn print(text: impl Display) -> Result<()> {
    Ok(write!(io::stdout(), "{text}")?)
}

/// Writes one JSON object to stdout.
pub fn print_json(object: &Value) -> Result<()> {
    print(format_args!("{object:#}\n"))
}
