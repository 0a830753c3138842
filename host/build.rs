//! Embeds the kernels: every `ptx/ARCH/ENTRY.ptx.zst` that there is, which may be none.
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

const SUFFIX: &str = ".ptx.zst";

fn main() -> io::Result<()> {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let ptx = package.join("ptx");
    println!("cargo::rerun-if-changed={}", ptx.display());

    let mut table = String::from("&[\n");
    for arch in sorted(&ptx)?.into_iter().filter(|path| path.is_dir()) {
        println!("cargo::rerun-if-changed={}", arch.display());
        for file in sorted(&arch)? {
            let Some(entry) = name(&file).strip_suffix(SUFFIX) else { continue };
            let (arch, path) = (name(&arch), file.display().to_string());
            writeln!(table, "Entry::new({entry:?}, {arch:?}, include_bytes!({path:?})),").expect("a String takes all");
        }
    }
    table.push(']');
    fs::write(out.join("embedded.rs"), table)
}

/// What is in a folder, in order: so that the same files make the same program. Nothing, if there is no folder.
fn sorted(folder: &Path) -> io::Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
