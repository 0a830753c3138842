//! One number for all that decides the PTX, so that stale PTX is found without a device toolchain.
use anyhow::{Context, Result};
use cuda_builder::{Arch, CudaBuilder};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// What the device build reads.
const SOURCES: [&str; 7] = [
    "cuda_builder/src/ptx.rs",
    "cuda_std/Cargo.toml",
    "cuda_std/macros/Cargo.toml",
    "cuda_std/macros/src",
    "cuda_std/src",
    "kernels/Cargo.toml",
    "kernels/src",
];

/// Part of them, but only for the host.
const SIMULATOR: &str = "cuda_std/src/sim";

/// The SHA-256 of some bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// The fingerprint of the sources under `root` and of the flags for `arch`.
pub fn of_sources(root: &Path, arch: Arch) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(root, Path::new(source), &mut files).with_context(|| format!("reading {source}"))?;
    }
    files.sort();
    let mut digest = Sha256::new_with_prefix(CudaBuilder::recipe(arch));
    for file in files {
        let contents = fs::read(root.join(&file)).with_context(|| file.clone())?;
        // With its length, so that no text can pass from one file to the next unseen.
        digest.update(format!("\n{file} {}\n", contents.len()));
        digest.update(contents);
    }
    Ok(format!("{:x}", digest.finalize()))
}

/// The files at or under `path`, relative to the root, with `/` on every system.
fn collect(root: &Path, path: &Path, files: &mut Vec<String>) -> Result<()> {
    if path == Path::new(SIMULATOR) {
        return Ok(());
    }
    let here = root.join(path);
    if here.is_dir() {
        for entry in fs::read_dir(&here)? {
            let name: PathBuf = entry?.file_name().into();
            collect(root, &path.join(name), files)?;
        }
    } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "toml") {
        let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
        files.push(parts.join("/"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    #[test]
    fn the_simulator_is_no_source_of_ptx() {
        let mut files = Vec::new();
        collect(workspace::root(), Path::new("cuda_std/src"), &mut files).unwrap();
        assert!(files.contains(&"cuda_std/src/lib.rs".to_owned()), "{files:?}");
        assert!(files.iter().all(|file| !file.contains("/sim/") && file.ends_with(".rs")), "{files:?}");
    }

    #[test]
    fn architectures_differ() {
        let [sm_80, sm_90a] = Arch::ALL.map(|arch| of_sources(workspace::root(), arch).unwrap());
        assert_ne!(sm_80, sm_90a);
    }

    #[test]
    fn a_known_digest() {
        assert_eq!(sha256(b""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
