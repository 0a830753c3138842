//! The PTX in the repository: `ARCH/ENTRY.ptx.zst`, and `manifest.json`, which says what each is.
use crate::fingerprint::sha256;
use anyhow::{Context, Result, ensure};
use cuda_builder::Arch;
use cuda_builder::check::Census;
use cuda_builder::ptx::{Entry, Module};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const MANIFEST: &str = "manifest.json";
const SUFFIX: &str = ".ptx.zst";
const LEVEL: i32 = 19;

/// All PTX, by the name of the architecture.
pub type Artefacts = BTreeMap<String, Build>;

/// The entries of one architecture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// The version of the toolchain that built them.
    pub toolchain: String,
    /// The fingerprint of what they were built from.
    pub sources: String,
    /// By name.
    pub entries: BTreeMap<String, Artefact>,
}

/// One entry point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artefact {
    /// Of its PTX.
    pub sha256: String,
    /// Barriers in its PTX.
    pub barriers: u32,
    /// The largest block.
    pub threads: u32,
    /// Blocks that are to fit one multiprocessor.
    pub min_blocks: u32,
    /// Its PTX.
    #[serde(skip)]
    pub ptx: String,
}

/// What the tables of `kernels` say about an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Declared {
    /// The largest block.
    pub threads: u32,
    /// Blocks that are to fit one multiprocessor.
    pub min_blocks: u32,
    /// Barriers in its source.
    pub barriers: u32,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// The entries of `kernels` whose PTX is for `arch`.
pub fn declared(arch: Arch) -> BTreeMap<&'static str, Declared> {
    let entries = kernels::entries().filter(|entry| entry.arch == arch.name());
    let declared = entries.map(|kernels::EntryInfo { name, config, .. }| {
        let kernels::Config { threads, min_blocks_per_sm: min_blocks, barriers, shared_bytes, .. } = config;
        (name, Declared { threads, min_blocks, barriers, shared_bytes })
    });
    declared.collect()
}

impl Artefact {
    fn new(entry: Entry) -> Result<(String, Self)> {
        let bounds = entry.launch_bounds.with_context(|| format!("{} has no launch bounds", entry.name))?;
        let artefact = Artefact {
            sha256: sha256(entry.text.as_bytes()),
            barriers: Census::of(&entry.text).barriers,
            threads: bounds.threads,
            min_blocks: bounds.min_blocks,
            ptx: entry.text,
        };
        Ok((entry.name, artefact))
    }

    /// What is wrong with it, given what its source says.
    fn complaints(&self, declared: &Declared) -> Vec<String> {
        let mut complaints = Vec::new();
        let bounds = format!(".maxntid {}, 1, 1\n.minnctapersm {}\n", declared.threads, declared.min_blocks);
        if !self.ptx.contains(&bounds) || (self.threads, self.min_blocks) != (declared.threads, declared.min_blocks) {
            complaints.push(format!(
                "launch bounds of {} threads and {} blocks where its source has {} and {}",
                self.threads, self.min_blocks, declared.threads, declared.min_blocks
            ));
        }
        if self.sha256 != sha256(self.ptx.as_bytes()) {
            complaints.push("its PTX is not what the manifest says".to_owned());
        }
        let census = Census::of(&self.ptx).complaints(Some(declared.barriers));
        complaints.extend(census.iter().map(|complaint| complaint.to_string()));
        complaints
    }
}

impl Build {
    /// Splits what a toolchain has built.
    pub fn new(ptx: &cuda_builder::Ptx, sources: String) -> Result<Self> {
        let entries = Module::parse(&ptx.text)?.entries()?;
        let entries = entries.into_iter().map(Artefact::new).collect::<Result<_>>()?;
        Ok(Build { toolchain: ptx.toolchain.clone(), sources, entries })
    }

    /// What is wrong with the entries, given what their source says: a line for each, with the entry's name.
    pub fn complaints(&self, declared: &BTreeMap<&str, Declared>) -> Vec<String> {
        let mut complaints = Vec::new();
        for (name, declared) in declared {
            match self.entries.get(*name) {
                None => {
                    complaints.push(format!("{name}: it is in the tables of `kernels`, but there is no PTX for it"))
                }
                Some(artefact) => {
                    complaints
                        .extend(artefact.complaints(declared).iter().map(|complaint| format!("{name}: {complaint}")));
                }
            }
        }
        let unknown = self.entries.keys().filter(|name| !declared.contains_key(name.as_str()));
        complaints.extend(unknown.map(|name| format!("{name}: it is not in the tables of `kernels`")));
        complaints
    }

    /// Where the PTX of another build of the same sources differs.
    pub fn differences(&self, other: &Build) -> Vec<String> {
        let names: BTreeSet<_> = self.entries.keys().chain(other.entries.keys()).collect();
        let differing = names.into_iter().filter_map(|name| match (self.entries.get(name), other.entries.get(name)) {
            (Some(this), Some(that)) if this.ptx == that.ptx => None,
            (Some(this), Some(that)) => Some(format!("{name}: {}", first_difference(&this.ptx, &that.ptx))),
            _ => Some(format!("{name}: only one of the two builds has it")),
        });
        differing.collect()
    }
}

fn first_difference(this: &str, that: &str) -> String {
    let line = this.lines().zip(that.lines()).take_while(|(a, b)| a == b).count();
    let at = |text: &str| text.lines().nth(line).unwrap_or("(its end)").trim().to_owned();
    format!("line {}: `{}` and `{}`", line + 1, at(this), at(that))
}

/// Reads all PTX under `directory`. Files that should not be there are an error.
pub fn read(directory: &Path) -> Result<Artefacts> {
    let manifest = directory.join(MANIFEST);
    let text = fs::read_to_string(&manifest).with_context(|| manifest.display().to_string())?;
    let mut artefacts: Artefacts = serde_json::from_str(&text).with_context(|| manifest.display().to_string())?;
    for (arch, build) in &mut artefacts {
        for (name, artefact) in &mut build.entries {
            let file = directory.join(arch).join(format!("{name}{SUFFIX}"));
            let packed = fs::read(&file).with_context(|| file.display().to_string())?;
            let ptx = zstd::decode_all(&*packed).with_context(|| file.display().to_string())?;
            artefact.ptx = String::from_utf8(ptx).with_context(|| file.display().to_string())?;
        }
    }
    let stale = stale(directory, &artefacts)?;
    ensure!(stale.is_empty(), "files that the manifest does not know: {}", stale.join(", "));
    Ok(artefacts)
}

/// Writes all PTX under `directory`, and removes what else is there. The same PTX gives the same bytes.
pub fn write(directory: &Path, artefacts: &Artefacts) -> Result<()> {
    for (arch, build) in artefacts {
        let folder = directory.join(arch);
        fs::create_dir_all(&folder)?;
        for (name, artefact) in &build.entries {
            let file = folder.join(format!("{name}{SUFFIX}"));
            fs::write(&file, zstd::encode_all(artefact.ptx.as_bytes(), LEVEL)?)
                .with_context(|| file.display().to_string())?;
        }
    }
    for file in stale(directory, artefacts)? {
        fs::remove_file(directory.join(file))?;
    }
    let manifest = serde_json::to_string_pretty(artefacts)? + "\n";
    fs::write(directory.join(MANIFEST), manifest).context(MANIFEST)
}

/// The packed files under `directory` that are not among the artefacts.
fn stale(directory: &Path, artefacts: &Artefacts) -> Result<Vec<String>> {
    let mut stale = Vec::new();
    for folder in fs::read_dir(directory)? {
        let folder = folder?;
        if !folder.file_type()?.is_dir() {
            continue;
        }
        let arch = folder.file_name().to_string_lossy().into_owned();
        for file in fs::read_dir(folder.path())? {
            let file = file?.file_name().to_string_lossy().into_owned();
            let entry = file.strip_suffix(SUFFIX);
            let known = |name| artefacts.get(&arch).is_some_and(|build| build.entries.contains_key(name));
            if !entry.is_some_and(known) {
                stale.push(format!("{arch}/{file}"));
            }
        }
    }
    stale.sort();
    Ok(stale)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = "// .launch_bounds f 128 2\n.version 7.8\n.target sm_80\n.address_size 64\n\
        .visible .entry f() { bar.sync 0; ret; }\n";

    const DECLARED: Declared = Declared { threads: 128, min_blocks: 2, barriers: 1, shared_bytes: 0 };

    fn build(module: &str) -> Build {
        let ptx = cuda_builder::Ptx { text: module.to_owned(), toolchain: "rustc 1".to_owned() };
        Build::new(&ptx, "abc".to_owned()).unwrap()
    }

    fn complaints(module: &str, declared: Declared) -> Vec<String> {
        build(module).complaints(&BTreeMap::from([("f", declared)]))
    }

    #[test]
    fn what_is_declared_is_there() {
        assert_eq!(complaints(MODULE, DECLARED), [""; 0]);
        assert_eq!(
            complaints(MODULE, Declared { barriers: 2, ..DECLARED }),
            ["f: 1 barriers where its source has 2: one was copied or removed"]
        );
        assert_eq!(
            complaints(MODULE, Declared { threads: 64, ..DECLARED }),
            ["f: launch bounds of 128 threads and 2 blocks where its source has 64 and 2"]
        );
        let local = complaints(&MODULE.replace("ret", "ld.local.u32 %r1, [%rd1]; ret"), DECLARED);
        assert!(local.len() == 1 && local[0].starts_with("f: 1 statements use local memory"), "{local:?}");
    }

    #[test]
    fn entries_and_tables_agree() {
        let other = complaints(&MODULE.replace(" f", " g"), DECLARED);
        assert_eq!(
            other,
            [
                "f: it is in the tables of `kernels`, but there is no PTX for it",
                "g: it is not in the tables of `kernels`"
            ]
        );
        let ptx = MODULE.replace("// .launch_bounds f 128 2", "");
        assert!(Build::new(&cuda_builder::Ptx { text: ptx, toolchain: String::new() }, String::new()).is_err());
    }

    #[test]
    fn differences_are_named() {
        let (this, that) = (build(MODULE), build(&MODULE.replace("bar.sync 0", "bar.sync 1")));
        assert_eq!(this.differences(&this), [""; 0]);
        assert_eq!(this.differences(&that), ["f: line 8: `{ bar.sync 0; ret; }` and `{ bar.sync 1; ret; }`"]);
    }

    #[test]
    fn files_come_back_as_they_went_and_nothing_else_stays() {
        let directory = std::env::temp_dir().join(format!("ferroflash-artefacts-{}", std::process::id()));
        fs::create_dir_all(directory.join("sm_70")).unwrap();
        let left_over = directory.join("sm_70/old.ptx.zst");
        fs::write(&left_over, "").unwrap();
        let artefacts = Artefacts::from([("sm_80".to_owned(), build(MODULE))]);
        write(&directory, &artefacts).unwrap();
        assert!(!left_over.exists());
        assert_eq!(read(&directory).unwrap(), artefacts);

        fs::write(&left_over, "").unwrap();
        assert!(read(&directory).unwrap_err().to_string().contains("sm_70/old.ptx.zst"));
        fs::remove_dir_all(&directory).unwrap();
    }
}
