//! The kernels are algorithms and nothing else: what they say to the machine is in `cuda_std`, once for each machine.

/// Words that belong to a machine: assembly, intrinsics, and asking which machine this is.
const MACHINE_WORDS: [&str; 7] =
    ["asm!", "core::arch", "core::intrinsics", "link_name", "target_arch", "target_os", "extern \"C\""];

macro_rules! sources {
    ($($file:literal),* $(,)?) => {
        [$(($file, include_str!(concat!("../../kernels/src/", $file, ".rs")))),*]
    };
}

const SOURCES: &[(&str, &str)] = &sources![
    "lib",
    "attention",
    "config",
    "dropout",
    "entries",
    "flash1",
    "flash2",
    "flash2_backward/mod",
    "flash2_backward/bias",
    "flash2_backward/keys_and_values",
    "flash2_backward/probabilities",
    "flash2_backward/queries",
    "flash2_backward/query_walk",
    "flash2_backward/row_sums",
    "flash2_backward/sinks",
    "flash2_backward/wide_keys_and_values",
    "mask",
    "online_softmax",
    "row_softmax",
    "schedule",
    "scores",
    "softmax",
    "standard",
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
    for (file, text) in SOURCES.iter().filter(|(file, _)| *file == "lib" || file.ends_with("/mod")) {
        let folder = file.strip_suffix("mod").unwrap_or_default();
        for line in text.lines() {
            let Some(module) = line.trim_start_matches("pub ").strip_prefix("mod ") else { continue };
            let module = format!("{folder}{}", module.trim_end_matches(';'));
            let is_listed = |file: &str| file == module || file.strip_suffix("/mod") == Some(&module);
            assert!(
                SOURCES.iter().any(|(file, _)| is_listed(file)),
                "`{module}` is missing from the list of this test"
            );
        }
    }
}
