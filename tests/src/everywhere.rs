//! Checks that run on every backend, each as two tests.
use ferroflash::{Backend, Session};

/// Of each of these functions, which take a list of backends, two tests: on the CPU and the simulated GPU, and on a real one. The
/// latter's names say `gpu`, by which those are found that need one; without, they say `skipped:`.
#[macro_export]
macro_rules! everywhere {
    ($($check:ident),+ $(,)?) => {
        mod on_the_cpu_and_the_simulator {
            $(
                #[test]
                fn $check() {
                    super::$check(&$crate::everywhere::WITHOUT_DEVICE);
                }
            )+
        }

        mod on_the_gpu {
            $(
                #[test]
                fn $check() {
                    if $crate::everywhere::has_gpu(stringify!($check)) {
                        super::$check(&[ferroflash::Backend::Cuda]);
                    }
                }
            )+
        }
    };
}

/// What runs everywhere.
pub const WITHOUT_DEVICE: [Backend; 2] = [Backend::Cpu, Backend::Simulator];

/// Whether there is a GPU; said aloud where there is none.
pub fn has_gpu(test: &str) -> bool {
    Session::new(Backend::Cuda).inspect_err(|reason| println!("skipped: {test} on the GPU: {reason}")).is_ok()
}
