//! The compiler for the device.
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest rustc that builds the kernels.
const OLDEST: (u32, u32) = (1, 95);

/// A rustc and a cargo, and the source of `core` that belongs to them.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// The cargo that runs it.
    pub cargo: PathBuf,
    /// What tells it from others: `rustc 1.96.0 (ac68faa20 2026-05-25), LLVM 22.1.8`.
    pub version: String,
    /// Where it is installed.
    pub sysroot: PathBuf,
}

/// No toolchain was found. Prints where it was looked for, what is missing there, and how to get it.
#[derive(Debug, thiserror::Error)]
#[error(
    "no Rust toolchain here can build for NVIDIA GPUs.\n{}\n\
     Either of these makes one:\n  \
     rustup component add rust-src\n  \
     apt-get install rustc-web cargo-web rust-web-src   (Debian 12 and later, as root)",
    .tried.join("\n")
)]
pub struct MissingToolchain {
    /// One line for each place.
    pub tried: Vec<String>,
}

impl Toolchain {
    /// The first of [`Toolchain::find_all`].
    pub fn find() -> Result<Self, MissingToolchain> {
        Self::find_all().map(|mut found| found.remove(0))
    }

    /// Every toolchain that can build for the device, at least one: the one that rustup chooses in the current
    /// directory, and that of the Linux distribution.
    pub fn find_all() -> Result<Vec<Self>, MissingToolchain> {
        let mut found = Vec::new();
        let mut tried = Vec::new();
        for rustc in [Path::new("rustc"), Path::new("/usr/bin/rustc")] {
            match Self::at(rustc) {
                Ok(toolchain) => {
                    if found.iter().all(|other: &Self| other.sysroot != toolchain.sysroot) {
                        found.push(toolchain);
                    }
                }
                Err(missing) => tried.push(format!("  {}: {missing}", rustc.display())),
            }
        }
        if found.is_empty() { Err(MissingToolchain { tried }) } else { Ok(found) }
    }

    fn at(rustc: &Path) -> Result<Self, String> {
        let sysroot = PathBuf::from(output(rustc, &["--print", "sysroot"])?.trim());
        // Not a proxy of rustup, which would choose again, by variables that we clear.
        let [rustc, cargo] = ["rustc", "cargo"].map(|tool| sysroot.join("bin").join(tool));
        if !sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists() {
            return Err(format!("{} is without the source of `core` (rust-src)", sysroot.display()));
        }
        if !cargo.exists() {
            return Err(format!("{} is without cargo", sysroot.display()));
        }
        let text = output(&rustc, &["-vV"])?;
        let version = version(&text).ok_or_else(|| format!("not understood: {text}"))?;
        let release = release(&text).ok_or_else(|| format!("not understood: {text}"))?;
        if release < OLDEST {
            return Err(format!("{version} is too old: {}.{} is needed", OLDEST.0, OLDEST.1));
        }
        Ok(Toolchain { rustc, cargo, version, sysroot })
    }

    /// Its cargo, with nothing in the environment that another toolchain has left there.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy();
            // `cargo run` points LD_LIBRARY_PATH to the libraries of the rustc that built this program.
            let foreign = name.starts_with("CARGO") || name.starts_with("RUST") || name == "LD_LIBRARY_PATH";
            // Where crates come from is the user's choice.
            let kept = ["CARGO_HOME", "CARGO_HTTP", "CARGO_NET", "CARGO_REGISTR", "CARGO_SOURCE", "RUSTUP_HOME"];
            if foreign && !kept.iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(&*name);
            }
        }
        // A distribution's rustc is a stable one, which this variable lets use `-Z`; the same with rustup's.
        command.env("RUSTC", &self.rustc).env("RUSTC_BOOTSTRAP", "1");
        command
    }
}

fn output(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program);
    // Not the one of the `cargo run` that may have started this program.
    command.args(arguments).env_remove("LD_LIBRARY_PATH");
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

fn version(verbose: &str) -> Option<String> {
    let first = verbose.lines().next()?;
    Some(format!("{first}, LLVM {}", field(verbose, "LLVM version")?))
}

fn release(verbose: &str) -> Option<(u32, u32)> {
    let mut numbers = field(verbose, "release")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn field<'a>(verbose: &'a str, name: &str) -> Option<&'a str> {
    verbose.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERBOSE: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nbinary: rustc\n\
        commit-hash: ac68faa20c58cbccd01ee7208bf3b6e93a7d7f96\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\n\
        LLVM version: 22.1.8\n";

    #[test]
    fn versions() {
        let expected = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball), LLVM 22.1.8";
        assert_eq!(version(VERBOSE).unwrap(), expected);
        assert_eq!(release(VERBOSE), Some((1, 96)));
        assert_eq!(release("release: 1.97.0-nightly\n"), Some((1, 97)));
        assert_eq!(release("rustc 1.96.0"), None);
    }

    #[test]
    fn what_is_missing_is_said_with_how_to_get_it() {
        let message = MissingToolchain { tried: vec!["  rustc: No such file".to_owned()] }.to_string();
        for part in ["rustc: No such file", "rustup component add rust-src", "apt-get install rustc-web"] {
            assert!(message.contains(part), "{message}");
        }
        assert!(Toolchain::at(Path::new("no-such-rustc")).is_err());
    }
}
