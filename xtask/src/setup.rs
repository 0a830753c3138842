//! A machine that can build the kernels.
use crate::workspace;
use anyhow::Result;
use cuda_builder::Toolchain;
use std::env;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// Debian's Rust, and the source of its `core`.
const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];

/// Finds a device toolchain, or installs one.
pub fn run() -> Result<ExitCode> {
    if let Ok(toolchain) = Toolchain::find() {
        return ready(&toolchain);
    }
    println!("There is no Rust toolchain here that can build the kernels for the GPU. Installing one.");
    for install in [with_rustup, with_apt] {
        install();
        if let Ok(toolchain) = Toolchain::find() {
            return ready(&toolchain);
        }
    }
    if let Err(missing) = Toolchain::find() {
        eprintln!("error: {missing}");
        eprintln!("Everything but a new build of the kernels works without: their PTX is in host/ptx.");
    }
    Ok(ExitCode::FAILURE)
}

fn ready(toolchain: &Toolchain) -> Result<ExitCode> {
    println!("Ready: {} builds the kernels ({}).", toolchain.version, toolchain.rustc.display());
    Ok(ExitCode::SUCCESS)
}

/// The source of `core` for the toolchain that rust-toolchain.toml names.
fn with_rustup() {
    if exists("rustup") {
        let mut command = Command::new("rustup");
        succeeds(command.args(["component", "add", "rust-src"]).current_dir(workspace::root()));
    } else {
        println!("  rustup is not here");
    }
}

/// The packages of the distribution.
fn with_apt() {
    if !exists("apt-get") {
        println!("  apt-get is not here");
        return;
    }
    let Some(root) = root() else {
        println!("  apt-get needs root, and neither are we root nor does `sudo -n` work");
        return;
    };
    let apt = |arguments: &[&str]| {
        let words = [root, &["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"], arguments].concat();
        succeeds(Command::new(words[0]).args(&words[1..]))
    };
    if apt(&["update"]) {
        apt(&[&["install", "--yes", "--no-install-recommends"][..], &PACKAGES].concat());
    }
}

/// What to write before a command to run it as root.
fn root() -> Option<&'static [&'static str]> {
    let uid = Command::new("id").arg("-u").output().ok()?;
    if uid.stdout.trim_ascii() == b"0" {
        return Some(&[]);
    }
    let mut sudo = Command::new("sudo");
    let works = sudo.args(["-n", "true"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    works.is_ok_and(|status| status.success()).then_some(&["sudo", "-n"])
}

/// Prints and runs a command.
fn succeeds(command: &mut Command) -> bool {
    println!("  $ {}", workspace::typed(command));
    match command.status() {
        Ok(status) if status.success() => true,
        Ok(status) => {
            println!("  failed: {status}");
            false
        }
        Err(error) => {
            println!("  failed: {error}");
            false
        }
    }
}

fn exists(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| is_file(&folder.join(program)))
}

fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file())
}
