//! `ferroflash info`: what this machine has, and what would run on it.
mod dispatch;

use super::answer::{Facts, print, print_json};
use super::ptx::description;
use super::units;
use anyhow::Result;
use dispatch::DispatchArguments;
use ferroflash::combinations::{self, Combination, FEATURES, combinations};
use ferroflash::driver::Status;
use ferroflash::{Backend, DType, cuda, driver, ptx};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const EXAMPLES: &str = "\
Examples:
  ferroflash info
  ferroflash info --kernels
  ferroflash info --explain-dispatch --arch sm_90 --seqlen 8192 --headdim 128 --causal
  ferroflash info --explain-dispatch --arch sm_80 --window 1024,0 --nheads 32 --nheads-k 8";

/// Show the driver, the devices and the embedded kernels, and which backend would run here
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Show instead which kernels, and the CPU, take which dtypes, head dimensions and features, as a table in Markdown
    #[arg(long, conflicts_with = "explain_dispatch")]
    kernels: bool,
    #[command(flatten)]
    dispatch: DispatchArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn execute(arguments: Arguments) -> Result<()> {
    if arguments.dispatch.wanted() {
        return arguments.dispatch.explain(arguments.json);
    }
    match (arguments.kernels, arguments.json) {
        (true, true) => print_json(&combinations_json()),
        (true, false) => print(combinations::markdown()),
        (false, true) => print_json(&json()),
        (false, false) => print(facts()),
    }
}

fn facts() -> Facts {
    let mut facts = Facts::default();
    facts.add("version", env!("CARGO_PKG_VERSION"));
    facts.add("driver", driver_line());
    match cuda::devices() {
        Err(reason) => facts.add("devices", format_args!("none: {reason}")),
        Ok(devices) if devices.is_empty() => facts.add("devices", "none: the driver finds no GPU"),
        Ok(devices) => {
            for device in devices {
                let (major, minor) = device.compute_capability;
                let memory = units::bytes(device.total_memory);
                let (ordinal, name, sms) = (device.ordinal, device.name, device.multiprocessors);
                facts.add(
                    "device",
                    format_args!("{ordinal}: {name}, sm_{major}{minor}, {sms} multiprocessors, {memory}"),
                );
            }
        }
    }
    for (arch, kernels) in kernels_by_arch() {
        let size = units::bytes(kernels.iter().map(|kernel| kernel.ptx_bytes as u64).sum());
        facts.add("kernels", format_args!("{} for {arch}, {size} of compressed PTX", kernels.len()));
    }
    if ptx::embedded().is_empty() {
        facts.add("kernels", "none embedded: `cargo xtask build-ptx` builds them");
    }
    for backend in Backend::ALL {
        match backend.availability() {
            Ok(device) => facts.add("backend", format_args!("{backend} can run: {device}")),
            Err(reason) => facts.add("backend", format_args!("{backend} cannot run: {reason}")),
        }
    }
    facts.add("auto", Backend::auto().reason);
    facts
}

fn driver_line() -> String {
    match (driver::status(), cuda::driver_version()) {
        (Status::Missing { reason }, _) => format!("none: {reason}"),
        (_, Ok((major, minor))) => format!("CUDA {major}.{minor}"),
        (_, Err(reason)) => format!("there, but: {reason}"),
    }
}

fn json() -> Value {
    let driver = match driver::status() {
        Status::Missing { reason } => json!({ "missing": reason }),
        _ => json!({ "cuda": cuda::driver_version().map(|(major, minor)| format!("{major}.{minor}")).ok() }),
    };
    let devices = cuda::devices().unwrap_or_default().into_iter().map(|device| {
        json!({
            "ordinal": device.ordinal,
            "name": device.name,
            "compute_capability": [device.compute_capability.0, device.compute_capability.1],
            "multiprocessors": device.multiprocessors,
            "total_memory": device.total_memory,
        })
    });
    let kernels = ptx::embedded().iter().map(description);
    let backends = Backend::ALL.iter().map(|&backend| match backend.availability() {
        Ok(device) => json!({ "name": backend.to_string(), "available": true, "device": device }),
        Err(reason) => json!({ "name": backend.to_string(), "available": false, "reason": reason.to_string() }),
    });
    let auto = Backend::auto();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "driver": driver,
        "devices": devices.collect::<Vec<_>>(),
        "kernels": kernels.collect::<Vec<_>>(),
        "backends": backends.collect::<Vec<_>>(),
        "auto": { "backend": auto.backend.to_string(), "reason": auto.reason },
    })
}

fn kernels_by_arch() -> BTreeMap<&'static str, Vec<&'static ptx::Entry>> {
    let mut by_arch = BTreeMap::<_, Vec<_>>::new();
    for kernel in ptx::embedded() {
        by_arch.entry(kernel.arch).or_default().push(kernel);
    }
    by_arch
}

fn combinations_json() -> Value {
    let of = |combination: &Combination| {
        let features = FEATURES.iter().zip(&combination.features);
        json!({
            "algorithm": combination.algorithm,
            "pass": combination.pass,
            "dtypes": combination.dtypes.iter().copied().map(DType::name).collect::<Vec<_>>(),
            "headdims": combination.headdims,
            "features": features.map(|(&name, support)| (name, support.to_string())).collect::<BTreeMap<_, _>>(),
        })
    };
    json!({ "combinations": combinations().iter().map(of).collect::<Vec<_>>() })
}
