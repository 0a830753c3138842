//! The kernels are algorithms and nothing else: what they say to the machine is in `cuda_std`, once for each machine.

/// Words that belong to a machine: assembly, intrinsics, and asking which machine this is.
const MACHINE_WORDS: [&str; 7] =
    ["asm!", "core::arch", "core::intrinsics", "link_name", "target_arch", "target_os", "extern \"C\""];

macro_rules! sources {
    ($($file:literal),* $(,)?) => {
        [$(($file, include_str!(concat!("../../kernels/src/", $file, ".rs")))),*]
    };
}

const SOURCES: [(&str, &str); 52] = sources![
    "lib",
    "attention",
    "config",
    "dropout",
    "entries",
    "flash1",
    "flash2",
    "flash2_backward/mod",
    "flash2_backward/bias",
    "flash2_backward/fused/mod",
    "flash2_backward/fused/finish",
    "flash2_backward/fused/places",
    "flash2_backward/fused/prepare",
    "flash2_backward/fused/query_stream",
    "flash2_backward/fused/split",
    "flash2_backward/fused/whole",
    "flash2_backward/keys_and_values",
    "flash2_backward/probabilities",
    "flash2_backward/queries",
    "flash2_backward/query_walk",
    "flash2_backward/row_sums",
    "flash2_backward/sinks",
    "flash2_backward/wide_keys_and_values",
    "flash3/mod",
    "flash3/memory",
    "flash3/schedule",
    "flash3_backward/mod",
    "flash3_backward/finish",
    "flash3_backward/finisher",
    "flash3_backward/general",
    "flash3_backward/memory",
    "flash3_backward/order",
    "flash3_backward/prepare",
    "flash3_backward/producer",
    "flash3_backward/ring",
    "flash3_backward/split/mod",
    "flash3_backward/split/consumer",
    "flash3_backward/split/memory",
    "flash3_backward/split/queries",
    "flash3_backward/split/turns",
    "flash3_backward/whole/mod",
    "flash3_backward/whole/hand_over",
    "flash3_backward/whole/memory",
    "mask",
    "online_softmax",
    "row_softmax",
    "schedule",
    "scores",
    "softmax",
    "spoiled_rows",
    "standard",
    "stored",
];

#[test]
fn kernels_hold_no_assembly_no_intrinsic_and_no_target() {
    for (file, text) in SOURCES {
        for word in MACHINE_WORDS {
            assert!(!text.contains(word), "kernels/src/{file}.rs holds `{word}`");
        }
    }
}

#[test]
fn every_module_of_the_kernels_is_looked_at() {
    let (_, lib) = SOURCES[0];
    for line in lib.lines() {
        let Some(module) = line.trim_start_matches("pub ").strip_prefix("mod ") else { continue };
        let module = module.trim_end_matches(';');
        let is_its = |file: &str| file == module || file.strip_suffix("/mod") == Some(module);
        assert!(SOURCES.iter().any(|(file, _)| is_its(file)), "`{module}` is missing from the list of this test");
    }
}
