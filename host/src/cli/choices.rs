//! Arguments that several commands take.
use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use ferroflash::{Backend, DType, Session};
use std::str::FromStr;

/// Where to compute.
#[derive(clap::Args)]
pub struct BackendArgument {
    /// Where to compute: `cuda` on an NVIDIA GPU, `cpu` on all cores, `simulator` with the GPU's kernels on a simulated
    /// GPU; `auto`: on the GPU where there is one, else on the CPU
    #[arg(long, default_value = "auto", value_parser = one_of::<BackendChoice>(&["auto", "cuda", "cpu", "simulator"]))]
    backend: BackendChoice,
}

#[derive(Clone, Copy)]
struct BackendChoice(Option<Backend>);

impl FromStr for BackendChoice {
    type Err = ferroflash::Error;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        if word == "auto" { Ok(BackendChoice(None)) } else { Ok(BackendChoice(Some(word.parse()?))) }
    }
}

impl BackendArgument {
    /// A session on this backend. A backend that cannot run is an error, never another backend.
    pub fn session(&self) -> Result<Session> {
        Ok(match self.backend.0 {
            None => Session::auto()?,
            Some(backend) => Session::new(backend)?,
        })
    }
}

/// Parses one of `names`, which the help lists.
pub fn one_of<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err = ferroflash::Error> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse::<T>())
}

/// Parses the name of a dtype, which the help lists.
pub fn dtype() -> impl TypedValueParser<Value = DType> {
    const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    PossibleValuesParser::new(ALL.map(DType::name))
        .map(|name| ALL.into_iter().find(|dtype| dtype.name() == name).expect("clap has checked the name"))
}
