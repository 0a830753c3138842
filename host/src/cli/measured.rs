//! What a session reports of a computation: where and how it ran, and what it took.
use super::answer::Facts;
use super::units;
use ferroflash::Report;
use serde_json::{Value, json};

/// Adds it line by line, for a reader.
pub fn add_to(facts: &mut Facts, report: &Report, repetitions: usize) {
    facts.add("backend", report.backend);
    facts.add("device", &report.device);
    facts.add("chosen", &report.reason);
    facts.add("kernel", report.algorithm);
    facts.add("problem", format_args!("{}, {}", report.shape, report.dtype.name()));
    facts.add("time", time(report, repetitions));
    facts.add("speed", format_args!("{} TFLOP/s", units::three_digits(report.tflops())));
    facts.add("extra memory", units::bytes(report.extra_bytes));
    if let Some((loaded, stored)) = simulated_bytes(report) {
        facts.add("HBM", format_args!("{} loaded, {} stored", units::bytes(loaded), units::bytes(stored)));
    }
}

/// All of a second computation that differs from the first, in one line.
pub fn summary(report: &Report, repetitions: usize) -> String {
    let (kernel, time, extra) = (report.algorithm, time(report, repetitions), units::bytes(report.extra_bytes));
    let speed = units::three_digits(report.tflops());
    let moved = simulated_bytes(report).map_or_else(String::new, |(loaded, stored)| {
        format!("; HBM: {} loaded, {} stored", units::bytes(loaded), units::bytes(stored))
    });
    format!("{kernel}: {time}; {speed} TFLOP/s; extra memory {extra}{moved}")
}

fn time(report: &Report, repetitions: usize) -> String {
    let of = if repetitions > 1 { format!(", the median of {repetitions}") } else { String::new() };
    let on = if simulated_bytes(report).is_some() { ", of the simulation" } else { "" };
    format!("{}{on}{of}", units::seconds(report.seconds))
}

/// The same as an object, for a program.
pub fn json(report: &Report) -> Value {
    let launches = report.launches.iter().map(|launch| {
        json!({
            "entry": launch.entry,
            "grid": launch.grid,
            "block": launch.block,
            "shared_bytes": launch.shared_bytes,
        })
    });
    json!({
        "backend": report.backend.to_string(),
        "device": report.device,
        "reason": report.reason,
        "kernel": report.algorithm,
        "dtype": report.dtype.name(),
        "problem": report.shape,
        "seconds": report.seconds,
        "tflops": report.tflops(),
        "flops": report.flops,
        "extra_bytes": report.extra_bytes,
        "hbm": simulated_bytes(report).map(|(loaded, stored)| json!({ "loaded": loaded, "stored": stored })),
        "launches": launches.collect::<Vec<_>>(),
    })
}

/// Bytes loaded from HBM and stored to it by all launches, where a simulator counted them.
fn simulated_bytes(report: &Report) -> Option<(u64, u64)> {
    let mut all = report.launches.iter().map(|launch| launch.simulation.as_ref()).peekable();
    all.peek()?;
    all.try_fold((0, 0), |(loaded, stored), simulation| {
        let counters = &simulation?.counters;
        Some((loaded + counters.total_loaded_bytes(), stored + counters.total_stored_bytes()))
    })
}
