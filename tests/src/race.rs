//! FlashAttention's test of races: many runs of one problem, in any order of additions. Source: Dao-AILab/flash-attention,
//! tests/test_flash_attn.py, `test_flash_attn_race_condition`.
use ferroflash::{AttentionOptions, Error, Kernel};

use crate::arena::Arena;
use crate::inputs::normal;
use crate::passes::{Places, Shapes, run};
use crate::peers::roundoff;
use crate::pointers::Machine;

/// Runs it so many times and once more, in the same memory. O, LSE, dK and dV are the same bits each time, whatever the order; dQ,
/// which blocks of keys add to as they come, is the same but for two roundings.
///
/// # Errors
/// What differs, or what the machine says.
pub fn check(machine: Machine, kernel: Kernel, shapes: Shapes, causal: bool, times: usize) -> Result<(), String> {
    let named = |reason: String| format!("{kernel}, {shapes:?}, causal {causal}: {reason}");
    let failed = |error: Error| named(error.to_string());
    let mut places = Places::default();
    let (given, results) = (shapes.given(&mut places), shapes.results(&mut places));
    let inputs = [&given.q, &given.k, &given.v, &given.dout].into_iter().zip(1..);
    let inputs = inputs.map(|(placed, seed)| (placed.clone(), normal(shapes.dtype, placed.layout.shape(), 1.0, seed)));
    let arena = Arena::new(machine, places.end, &inputs.collect::<Vec<_>>()).map_err(failed)?;
    let once = || {
        run(&arena, &given, &results, &AttentionOptions::new().causal(causal), kernel)?;
        Ok(arena.read([&results.out, &results.softmax_lse, &results.dk, &results.dv, &results.dq]))
    };
    let first = once().map_err(failed)?;
    let first_dq = first[4].to_f32();
    let bound = 2.0 * roundoff(shapes.dtype, &first_dq);
    for time in 1..=times {
        let again = once().map_err(failed)?;
        for ((name, first), again) in ["out", "softmax_lse", "dk", "dv"].into_iter().zip(&first).zip(&again) {
            if first.bytes() != again.bytes() {
                return Err(named(format!("{name}: other bits in run {time}")));
            }
        }
        let differences = first_dq.iter().zip(again[4].to_f32()).map(|(first, again)| (first - again).abs());
        let largest = differences.max_by(f32::total_cmp).unwrap_or(0.0);
        if largest.is_nan() || largest > bound {
            return Err(named(format!("dq: {largest:e} from the first in run {time}; allowed: {bound:e}")));
        }
    }
    Ok(())
}
