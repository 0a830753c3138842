//! Running cargo.
use crate::{Arch, MissingToolchain, Toolchain};
use cargo_metadata::{Message, TargetKind};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io};

/// Flags of rustc that hold for every kernel.
const FLAGS: [&str; 4] = [
    // There is nothing to link: after LTO the assembly of one crate is the whole module.
    "-Clinker=true",
    // Accumulators are arrays in registers only where every loop over them is unrolled.
    "-Cllvm-args=-unroll-threshold=20000",
    // It copies a barrier into both arms of a branch, which then wait for different barriers.
    "-Zmir-enable-passes=-JumpThreading",
    "-Cdebug-assertions=off",
];

/// What entry points need of the language. A kernel's crate does not enable it: for the host it is stable Rust.
const FEATURES: &str = "-Zcrate-attr=feature(abi_ptx, asm_experimental_arch)";

/// The release profile, whatever the workspace makes of it for the host.
const PROFILE: [(&str, &str); 7] = [
    ("OPT_LEVEL", "3"),
    ("LTO", "fat"),
    ("CODEGEN_UNITS", "1"),
    ("PANIC", "abort"),
    ("DEBUG", "0"),
    ("OVERFLOW_CHECKS", "false"),
    ("INCREMENTAL", "false"),
];

/// Builds a crate to PTX.
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    path: PathBuf,
    arch: Arch,
    toolchain: Option<Toolchain>,
    target_dir: Option<PathBuf>,
    copy_to: Option<PathBuf>,
    only: Option<String>,
}

/// The environment variable with which `#[kernel]` is told which entry points to build: those whose name contains one of
/// its parts, which commas separate.
const ONLY: &str = "CUDA_BUILDER_ONLY";

/// A crate as PTX.
#[derive(Clone, Debug)]
pub struct Ptx {
    /// The module, as LLVM wrote it. See [`crate::ptx`] for what to do with it.
    pub text: String,
    /// The version of the toolchain that built it.
    pub toolchain: String,
}

/// Why there is no PTX.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Nothing here compiles for a GPU.
    #[error(transparent)]
    Toolchain(#[from] MissingToolchain),
    /// The crate does not compile: cargo has said why.
    #[error("{} does not compile for {arch}", .path.display())]
    Crate {
        /// The crate's directory.
        path: PathBuf,
        /// What it was built for.
        arch: Arch,
    },
    /// A file could not be read or written.
    #[error("{}: {error}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

impl BuildError {
    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| BuildError::File { path: path.to_owned(), error }
    }
}

impl CudaBuilder {
    /// A builder for the crate in directory `path`, which has a `[lib]` and a panic handler.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        CudaBuilder {
            path: path.into(),
            arch: Arch::Sm80,
            toolchain: None,
            target_dir: None,
            copy_to: None,
            only: None,
        }
    }

    /// The architecture: by default [`Arch::Sm80`].
    pub fn arch(mut self, arch: Arch) -> Self {
        self.arch = arch;
        self
    }

    /// The compiler: by default what [`Toolchain::find`] finds.
    pub fn toolchain(mut self, toolchain: Toolchain) -> Self {
        self.toolchain = Some(toolchain);
        self
    }

    /// Where cargo keeps what it builds: by default `target/device` in the crate's workspace.
    pub fn target_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.target_dir = Some(path.into());
        self
    }

    /// A file that gets the PTX, too.
    pub fn copy_to(mut self, path: impl Into<PathBuf>) -> Self {
        self.copy_to = Some(path.into());
        self
    }

    /// Builds those entry points alone whose name contains one of these parts, which commas separate: by default all.
    pub fn only(mut self, parts: impl Into<String>) -> Self {
        self.only = Some(parts.into());
        self
    }

    /// What decides the PTX besides the sources and the toolchain, for fingerprints.
    pub fn recipe(arch: Arch) -> String {
        let profile = PROFILE.map(|(name, value)| format!("{name}={value}"));
        [&target_flags(arch)[..], &FLAGS.map(str::to_owned), &[FEATURES.to_owned()], &profile].concat().join(" ")
    }

    /// Builds. Cargo's messages go to standard error.
    pub fn build(self) -> Result<Ptx, BuildError> {
        let toolchain = self.toolchain.clone().map_or_else(Toolchain::find, Ok)?;
        fs::metadata(self.path.join("Cargo.toml")).map_err(BuildError::file(&self.path))?;
        let path = std::path::absolute(&self.path).map_err(BuildError::file(&self.path))?;
        let workspace = workspace(&path, &toolchain);
        // One directory for each architecture and compiler: cargo would not tell their outputs apart.
        let compiler = toolchain.version.split_whitespace().take(2).collect::<Vec<_>>().join("-");
        let target_dir = self.target_dir.clone().unwrap_or_else(|| workspace.join("target/device"));
        let target_dir = target_dir.join(compiler).join(self.arch.name());

        let name = self.run_cargo(&toolchain, &path, &workspace, &target_dir)?;
        let assembly = target_dir.join(format!("nvptx64-nvidia-cuda/release/deps/{}.s", name.replace('-', "_")));
        let text = fs::read_to_string(&assembly).map_err(BuildError::file(&assembly))?;
        if let Some(path) = &self.copy_to {
            fs::write(path, &text).map_err(BuildError::file(path))?;
        }
        Ok(Ptx { text, toolchain: toolchain.version })
    }

    /// Builds the crate at `path`; gives the name of its library.
    fn run_cargo(
        &self,
        toolchain: &Toolchain,
        path: &Path,
        workspace: &Path,
        target_dir: &Path,
    ) -> Result<String, BuildError> {
        let failed = || BuildError::Crate { path: self.path.clone(), arch: self.arch };
        let mut child = toolchain
            .cargo()
            .current_dir(path)
            .args(["rustc", "--release", "--lib", "--crate-type=cdylib", "--target=nvptx64-nvidia-cuda"])
            .args(["-Zbuild-std=core", "--message-format=json-render-diagnostics"])
            .arg("--target-dir")
            .arg(target_dir)
            .args(["--", "--emit=asm", FEATURES])
            .env("CARGO_ENCODED_RUSTFLAGS", self.rustflags(toolchain, workspace).join("\x1f"))
            .envs(PROFILE.map(|(name, value)| (format!("CARGO_PROFILE_RELEASE_{name}"), value)))
            .env_remove(ONLY)
            .envs(self.only.as_ref().map(|parts| (ONLY, parts)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(BuildError::file(&toolchain.cargo))?;
        let messages = Message::parse_stream(BufReader::new(child.stdout.take().expect("it is piped")));
        let mut library = None;
        for message in messages.map_while(Result::ok) {
            // Of all crates this one alone is built as a `cdylib` and nothing else.
            if let Message::CompilerArtifact(artifact) = message
                && artifact.target.kind == [TargetKind::CDyLib]
            {
                library = Some(artifact.target.name);
            }
        }
        let status = child.wait().map_err(BuildError::file(&toolchain.cargo))?;
        library.filter(|_| status.success()).ok_or_else(failed)
    }

    fn rustflags(&self, toolchain: &Toolchain, workspace: &Path) -> Vec<String> {
        let mut flags = target_flags(self.arch).to_vec();
        flags.extend(FLAGS.map(str::to_owned));
        // No path of this machine gets into the PTX.
        let sources = toolchain.sysroot.join("lib/rustlib/src/rust");
        flags.push(format!("--remap-path-prefix={}=", workspace.display()));
        flags.push(format!("--remap-path-prefix={}=/rust", sources.display()));
        if let Some(cargo_home) = cargo_home() {
            flags.push(format!("--remap-path-prefix={}=/cargo", cargo_home.display()));
        }
        flags
    }
}

fn target_flags(arch: Arch) -> [String; 2] {
    [format!("-Ctarget-cpu={arch}"), format!("-Ctarget-feature=+{}", arch.ptx_version())]
}

/// The root of the crate's workspace, or the crate itself.
fn workspace(path: &Path, toolchain: &Toolchain) -> PathBuf {
    let mut locate: Command = toolchain.cargo();
    locate.current_dir(path).args(["locate-project", "--workspace", "--message-format=plain"]);
    let located = locate.output().ok().and_then(|output| String::from_utf8(output.stdout).ok());
    let root = located.as_deref().and_then(|manifest| Path::new(manifest.trim()).parent());
    root.filter(|root| !root.as_os_str().is_empty()).unwrap_or(path).to_owned()
}

fn cargo_home() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"));
    std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_tells_architectures_apart() {
        let [sm_80, sm_90a] = Arch::ALL.map(CudaBuilder::recipe);
        assert_ne!(sm_80, sm_90a);
        assert!(sm_80.contains("-Ctarget-cpu=sm_80 -Ctarget-feature=+ptx78"), "{sm_80}");
        assert!(sm_80.contains("LTO=fat"), "{sm_80}");
        assert!(!sm_80.contains("/home") && !sm_80.contains("/usr"), "{sm_80}");
    }

    #[test]
    fn a_crate_that_is_not_there_is_named() {
        let rustc = PathBuf::from("rustc");
        let toolchain = Toolchain { cargo: "cargo".into(), sysroot: "/".into(), version: String::new(), rustc };
        let error = CudaBuilder::new("no/such/crate").toolchain(toolchain).build().unwrap_err();
        assert!(matches!(&error, BuildError::File { path, .. } if path == Path::new("no/such/crate")), "{error}");
    }
}
