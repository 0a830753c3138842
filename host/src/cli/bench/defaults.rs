//! What is measured where the user says nothing.
use ferroflash::{Backend, Kernel, Session};

/// On a GPU the shapes of the FlashAttention-2 paper; elsewhere smaller ones, so that it takes seconds, too.
pub struct Defaults {
    pub kernels: Vec<Kernel>,
    pub seqlens: &'static [u32],
    /// batch · seqlen.
    pub tokens: u32,
    /// nheads · headdim.
    pub hidden: u32,
    pub repetitions: usize,
}

impl Defaults {
    pub fn on(session: &Session, backward: bool) -> Self {
        let mut kernels = session.kernels();
        kernels.retain(|kernel| !backward || kernel.has_backward());
        match session.backend() {
            Backend::Cuda => Defaults {
                kernels,
                seqlens: &[1024, 2048, 4096, 8192, 16384],
                tokens: 16384,
                hidden: 2048,
                repetitions: 10,
            },
            // It has one algorithm of its own.
            Backend::Cpu => Defaults {
                kernels: vec![Kernel::Auto],
                seqlens: &[256, 512, 1024, 2048],
                tokens: 2048,
                hidden: 512,
                repetitions: 5,
            },
            // The simulator: a thousand times slower than a GPU.
            _ => Defaults { kernels, seqlens: &[64, 128, 256], tokens: 256, hidden: 64, repetitions: 1 },
        }
    }
}
