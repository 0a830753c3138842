//! Gradients in f32 are what differences of the forward pass say, whatever the options: on the CPU and on the simulated GPU.
use ferroflash::{Attention, AttentionOptions, Backend, DType, Session};
use ferroflash_tests::combination::{Combination, Input, Tensors};
use ferroflash_tests::placed::Placement;

/// Half the distance of the two points of a difference: its error is about 1e-4 of rounding, and as much of the third derivative.
const STEP: f32 = 1e-2;
const TOLERANCE: f64 = 2e-3;

fn plain() -> Combination {
    Combination {
        dtype: DType::F32,
        lengths: vec![(9, 11); 2],
        varlen: false,
        nheads_k: 1,
        group: 2,
        headdim: 8,
        headdim_v: 8,
        options: AttentionOptions::new(),
        bias: None,
        mask: None,
        alibi: None,
        sinks: false,
        dlse: false,
        placement: Placement::Packed,
        seed: 1,
    }
}

/// Σ dO ∘ O + Σ dLSE ∘ LSE.
fn loss(tensors: &Tensors, forward: &Attention) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let lse: Vec<f32> = forward.softmax_lse.to_f32().into_iter().map(|x| if x.is_finite() { x } else { 0.0 }).collect();
    dot(&tensors.dout(), &forward.out.to_f32()) + dot(&tensors.dlse(), &lse)
}

fn check(name: &str, combination: &Combination) {
    let tensors = combination.tensors();
    for backend in [Backend::Cpu, Backend::Simulator] {
        let session = Session::new(backend).expect("runs everywhere");
        let forward = combination.forward(&session, &tensors).unwrap_or_else(|e| panic!("{name}, {backend}: {e}"));
        let gradients = combination.backward(&session, &tensors, &forward).expect("as forward");
        let loss_at = |input, index, by| {
            let nudged = tensors.nudged(input, index, by)?;
            Some(loss(&nudged, &combination.forward(&session, &nudged).expect("as before")))
        };
        for (input, gradient) in [
            (Input::Q, Some(&gradients.dq)),
            (Input::K, Some(&gradients.dk)),
            (Input::V, Some(&gradients.dv)),
            (Input::Bias, gradients.dbias.as_ref()),
            (Input::Sinks, gradients.dsinks.as_ref()),
        ] {
            let Some(gradient) = gradient.map(|gradient| gradient.to_f32()) else { continue };
            // A few elements of each, spread over all of it.
            for index in (0..gradient.len()).step_by(gradient.len().div_ceil(6).max(1)) {
                let [above, below] = [STEP, -STEP].map(|by| loss_at(input, index, by).expect("it is there"));
                let (difference, found) = ((above - below) / f64::from(2.0 * STEP), f64::from(gradient[index]));
                let error = (found - difference).abs();
                assert!(
                    error <= TOLERANCE * (1.0 + difference.abs()),
                    "{name}, {backend}, {input:?}[{index}]: {found}, by differences {difference}"
                );
            }
        }
    }
}

#[test]
fn of_each_option_alone() {
    let options = AttentionOptions::new;
    let cases = [
        ("plain", plain()),
        ("causal", Combination { options: options().causal(true), ..plain() }),
        ("window", Combination { options: options().window_size(3, 2), ..plain() }),
        ("softcap", Combination { options: options().softcap(1.5), ..plain() }),
        ("negative scale", Combination { options: options().softmax_scale(-0.4), ..plain() }),
        ("dropout", Combination { options: options().dropout(0.3, 5, 7), ..plain() }),
        ("ALiBi", Combination { alibi: Some(true), ..plain() }),
        ("bias", Combination { bias: Some([false; 3]), ..plain() }),
        ("bias for all batches", Combination { bias: Some([true, false, false]), ..plain() }),
        ("bias for all heads and queries", Combination { bias: Some([false, true, true]), ..plain() }),
        ("mask", Combination { mask: Some([false; 3]), ..plain() }),
        ("sinks", Combination { sinks: true, ..plain() }),
        ("LSE", Combination { dlse: true, ..plain() }),
        ("varlen", Combination { varlen: true, lengths: vec![(5, 0), (4, 9), (1, 3)], ..plain() }),
        ("headdim_v", Combination { headdim: 16, ..plain() }),
    ];
    cases.iter().for_each(|(name, combination)| check(name, combination));
}

#[test]
fn of_all_options_together() {
    let options = AttentionOptions::new().causal(true).window_size(6, None).softcap(2.0).dropout(0.2, 1, 2);
    let all = Combination {
        varlen: true,
        lengths: vec![(7, 9), (3, 5)],
        options,
        bias: Some([true, false, false]),
        mask: Some([false, true, false]),
        alibi: Some(false),
        sinks: true,
        dlse: true,
        headdim: 24,
        ..plain()
    };
    check("all options", &all);
}
