//! Entry points that are in no table, for those who look for better ones: `cargo xtask tune`.
use std::fmt;
use std::marker::PhantomData;

use cuda_std::{Kernel, not_simulated};
use kernels::{Config, flash3};

use crate::ptx::Entry;

/// What PTX for FlashAttention-3 is built for.
const ARCH: &str = "sm_90a";

/// An entry point of FlashAttention-3, forward, with a configuration that its table does not have. It runs on a GPU
/// alone: the simulator runs functions, and of this there is only PTX.
#[derive(Clone, Copy)]
pub struct Flash3Variant {
    pub(crate) kernel: &'static Kernel<flash3::Params, Config>,
}

impl fmt::Debug for Flash3Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Flash3Variant {
    /// The entry point `name` of PTX that is compressed by zstd. All of it stays in memory until the program ends, as the
    /// entry points of the tables do; of two with one name the first is launched.
    pub fn new(name: String, config: Config, compressed: Vec<u8>) -> Self {
        let name: &'static str = name.leak();
        Entry::add(name, ARCH, compressed.leak());
        let kernel = Kernel { name, config, arch: ARCH, cluster: 1, run: not_simulated, parameters: PhantomData };
        Flash3Variant { kernel: Box::leak(Box::new(kernel)) }
    }

    /// The name of its entry point.
    pub fn name(&self) -> &'static str {
        self.kernel.name
    }

    /// Its configuration.
    pub fn config(&self) -> &'static Config {
        &self.kernel.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::dispatch::Plan;
    use crate::error::Error;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use crate::parameters::Access;
    use crate::problem::Problem;
    use crate::session::Session;
    use crate::target::Target;
    use crate::tensor::Tensor;
    use cuda_std::DType;

    /// The first row of the table under another name, as if it were in no table. Its PTX does not unpack.
    fn variant(name: &str) -> Flash3Variant {
        Flash3Variant::new(name.to_owned(), flash3::FORWARD[0].config, b"no zstd".to_vec())
    }

    fn planned(variant: Flash3Variant, headdim: usize, target: Target) -> Result<Plan, String> {
        let x = Layout::contiguous(DType::F16, &[1, 8, 1, headdim]).expect("small");
        let problem = Problem::new(&x, &x, &x, &AttentionOptions::new()).expect("valid");
        let access = Access { aligned: true, mapped: true };
        Plan::of_variant(&problem, access, variant, target).map_err(|error| error.to_string())
    }

    #[test]
    fn a_variant_runs_what_its_configuration_says() {
        let variant = variant("of_test_planned");
        let plan = planned(variant, 64, Target::HOPPER).expect("it is built for this");
        assert_eq!(plan.kernels(), [("of_test_planned", *variant.config())]);
        let refused = planned(variant, 128, Target::HOPPER).expect_err("its heads are shorter");
        assert!(refused.ends_with("flash3: headdim 128; allowed: up to 64"), "{refused}");
        let refused = planned(variant, 64, Target::OLDEST).expect_err("it is no Hopper");
        assert!(refused.ends_with("flash3: runs on sm_90, not on sm_80"), "{refused}");
    }

    #[test]
    fn its_ptx_is_found() {
        variant("of_test_found");
        let entry = Entry::find("of_test_found", "a GPU", (9, 0)).expect("it was added");
        assert!(matches!(entry.text(), Err(Error::BrokenKernel { entry: "of_test_found", .. })));
        assert!(matches!(Entry::find("of_test_found", "", (8, 0)), Err(Error::UnsupportedArchitecture { .. })));
        assert!(matches!(Entry::find("of_test_never", "", (9, 0)), Err(Error::MissingKernel { .. })));
    }

    #[test]
    fn nothing_runs_instead_of_it() {
        let x = Tensor::zeros(DType::F16, &[1, 8, 1, 64]).expect("small");
        for backend in [Backend::Cpu, Backend::Simulator] {
            let session = Session::new(backend).expect("it is everywhere").flash3_variant(variant("of_test_refused"));
            let refused = session.attention(&x, &x, &x, &AttentionOptions::new());
            assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
        }
    }
}
