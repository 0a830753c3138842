//! Files in, files out: tensors from safetensors, and outputs that are there whole or not at all.
use anyhow::{Context, Result, anyhow, bail};
use ferroflash::{DType, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A safetensors file to be read.
pub struct TensorFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl TensorFile {
    /// Opens the file `path`, all of it.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(TensorFile { path: path.to_owned(), bytes })
    }

    /// A copy of its tensor `name`.
    pub fn tensor(&self, name: &'static str) -> Result<Tensor> {
        let file = SafeTensors::deserialize(&self.bytes)
            .map_err(|reason| anyhow!("{} is not a safetensors file: {reason}", self.path.display()))?;
        read_tensor(&self.path, &file, name)
    }
}

fn read_tensor(path: &Path, file: &SafeTensors<'_>, name: &'static str) -> Result<Tensor> {
    let Ok(tensor) = file.tensor(name) else {
        let mut names: Vec<_> = file.names().into_iter().map(|name| name.to_string()).collect();
        names.sort_unstable();
        bail!("{} has no tensor {name}; it has: {}", path.display(), names.join(", "));
    };
    let dtype = match tensor.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I32 => DType::I32,
        Dtype::U8 | Dtype::BOOL => DType::U8,
        other => bail!("{}: tensor {name} is {other:?}; allowed: F32, F16, BF16, I32, U8, BOOL", path.display()),
    };
    Tensor::from_bytes(dtype, tensor.data(), tensor.shape()).with_context(|| path.display().to_string())
}

/// A file to come. It is written beside its place under another name, and put in its place whole.
///
/// Making one creates that other file, so that a place that cannot be written is known before the work, not after it.
pub struct NewFile {
    path: PathBuf,
    draft: PathBuf,
    file: File,
}

impl NewFile {
    /// Makes ready to write to `path`.
    pub fn create(path: PathBuf) -> Result<Self> {
        let cannot_write = || format!("cannot write {}", path.display());
        if path.is_dir() {
            bail!("{}: it is a directory", cannot_write());
        }
        let Some(name) = path.file_name() else { bail!("{}: it names no file", cannot_write()) };
        let mut draft_name = OsString::from(".");
        draft_name.push(name);
        draft_name.push(format!(".{}.part", std::process::id()));
        let draft = path.with_file_name(draft_name);
        let file = File::create(&draft).with_context(cannot_write)?;
        Ok(NewFile { path, draft, file })
    }

    /// Writes tensors as a safetensors file.
    pub fn write_tensors(self, tensors: &[(&str, &Tensor)]) -> Result<PathBuf> {
        let views = tensors.iter().map(|(name, tensor)| {
            let dtype = match tensor.dtype() {
                DType::F32 => Dtype::F32,
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                DType::I32 => Dtype::I32,
                DType::U8 => Dtype::U8,
            };
            Ok((*name, TensorView::new(dtype, tensor.shape().to_vec(), tensor.bytes())?))
        });
        let bytes = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None)?;
        self.write(&bytes)
    }

    /// Writes `bytes`, and returns where they are.
    pub fn write(mut self, bytes: &[u8]) -> Result<PathBuf> {
        let written = self.file.write_all(bytes).and_then(|()| fs::rename(&self.draft, &self.path));
        written.with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(self.path.clone())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Nothing there any more is what a written file leaves; nothing else can be done about one that stays.
        let _ = fs::remove_file(&self.draft);
    }
}
