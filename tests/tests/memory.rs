//! What memory a call needs beyond its inputs and outputs: linear in the length for FlashAttention, quadratic for standard
//! attention.
use ferroflash::{Backend, DType, Kernel, Session};
use ferroflash_tests::grid::Case;

fn extra_bytes(kernel: Kernel, seqlen: usize) -> u64 {
    let session = Session::new(Backend::Simulator).expect("runs everywhere").kernel(kernel);
    let case = Case { nheads: 2, ..Case::single(DType::F16, (seqlen, seqlen), 64, true) };
    case.run(&session).0.report.extra_bytes
}

#[test]
fn flash2_keeps_the_lse_alone() {
    for seqlen in [64, 128, 512] {
        assert_eq!(extra_bytes(Kernel::Flash2, seqlen), 2 * seqlen as u64 * 4);
    }
}

#[test]
fn flash1_is_linear() {
    // O in f32, l, m and LSE: for each of 2 heads.
    for seqlen in [64, 128, 512] {
        assert_eq!(extra_bytes(Kernel::Flash1, seqlen), 2 * seqlen as u64 * (64 + 3) * 4);
    }
}

#[test]
fn standard_is_quadratic() {
    // S and P in f16, and LSE.
    for seqlen in [64, 128, 512] {
        let seqlen = seqlen as u64;
        assert_eq!(extra_bytes(Kernel::Standard, seqlen as usize), 2 * (2 * seqlen * seqlen * 2 + seqlen * 4));
    }
}
