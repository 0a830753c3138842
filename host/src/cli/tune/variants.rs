//! What `cargo xtask tune` has left in a folder: `variants.json`, and PTX.
use anyhow::{Context, Result, ensure};
use ferroflash::DType;
use ferroflash::tune::Flash3Variant;
use kernels::Config;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// A variant, and what is known of it.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub variant: Flash3Variant,
    /// Warpgroups of consumers.
    pub groups: u32,
    /// Stages of Q, 64 rows each: as many as warpgroups, or for two tiles twice as many.
    pub queries: u32,
    /// Stages of the pipelines of K and V.
    pub stages: u32,
    /// Registers a thread, and bytes that it stores to memory because they do not suffice, if an assembler has been asked.
    pub registers: Option<u32>,
    pub spill_bytes: Option<u32>,
    /// Whether the kernel's table has a row for it.
    pub in_table: bool,
}

/// All variants of a folder, whose kernels can then be launched.
pub fn read(folder: &Path) -> Result<Vec<Candidate>> {
    let path = folder.join("variants.json");
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    let variants: Vec<Value> = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    ensure!(!variants.is_empty(), "{}: there are no variants", path.display());
    let candidate = |value: &Value| {
        let (name, config) = named_config(value).with_context(|| path.display().to_string())?;
        let file = folder.join(format!("{name}.ptx.zst"));
        let ptx = fs::read(&file).with_context(|| file.display().to_string())?;
        Ok(Candidate {
            groups: number(value, "groups")?,
            queries: number(value, "queries")?,
            stages: number(value, "stages")?,
            registers: number(value, "registers").ok(),
            spill_bytes: number(value, "spill_bytes").ok(),
            in_table: value["in_table"].as_bool().context("in_table is not true or false")?,
            variant: Flash3Variant::new(name, config, ptx),
        })
    };
    variants.iter().map(candidate).collect()
}

fn named_config(value: &Value) -> Result<(String, Config)> {
    let name = value["name"].as_str().context("a variant has no name")?;
    // It becomes the name of a file.
    ensure!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{name:?} is not the name of an entry point");
    let dtype = match value["dtype"].as_str() {
        Some("f16") => DType::F16,
        Some("bf16") => DType::BF16,
        _ => anyhow::bail!("{name}: dtype {}; allowed: f16, bf16", value["dtype"]),
    };
    let of = |field| number(value, field).with_context(|| name.to_owned());
    let config = Config {
        family: "flash3",
        dtype,
        tf32: false,
        headdim: of("headdim")?,
        headdim_v: of("headdim_v")?,
        causal: Some(value["causal"].as_bool().with_context(|| format!("{name}: causal is not true or false"))?),
        general: false,
        block_m: of("block_m")?,
        block_n: of("block_n")?,
        from_keys: 0,
        few: false,
        sequences: of("sequences")?,
        threads: of("threads")?,
        min_blocks_per_sm: of("min_blocks_per_sm")?,
        claimed_registers: of("claimed_registers")?,
        accumulators: of("accumulators")?,
        shared_bytes: of("shared_bytes")?,
        barriers: of("barriers")?,
    };
    Ok((name.to_owned(), config))
}

fn number(value: &Value, field: &str) -> Result<u32> {
    let number = value[field].as_u64().and_then(|number| u32::try_from(number).ok());
    number.with_context(|| format!("{field} is {}; allowed: a number", value[field]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn variant() -> Value {
        json!({
            "name": "flash3_fwd_bf16_d64_2x128x4q4", "dtype": "bf16", "headdim": 64, "headdim_v": 64, "causal": true,
            "groups": 2, "queries": 4, "block_n": 128, "stages": 4, "block_m": 128, "threads": 384,
            "sequences": 1024, "min_blocks_per_sm": 1, "claimed_registers": 232,
            "accumulators": 192, "shared_bytes": 164032, "barriers": 9,
            "registers": 168, "spill_bytes": null, "in_table": true,
        })
    }

    #[test]
    fn a_configuration_is_read() {
        let (name, config) = named_config(&variant()).expect("valid");
        assert_eq!(
            (name.as_str(), config.causal, config.dtype),
            ("flash3_fwd_bf16_d64_2x128x4q4", Some(true), DType::BF16)
        );
        assert_eq!((config.block_m, config.block_n, config.threads, config.shared_bytes), (128, 128, 384, 164032));
        assert_eq!(config.sequences, 1024);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |field: &str, value: Value| {
            let mut variant = variant();
            variant[field] = value;
            format!("{:#}", named_config(&variant).expect_err("bad"))
        };
        assert_eq!(error("name", json!("../x")), "\"../x\" is not the name of an entry point");
        assert_eq!(error("dtype", json!("f32")), "flash3_fwd_bf16_d64_2x128x4q4: dtype \"f32\"; allowed: f16, bf16");
        assert_eq!(error("threads", json!(-1)), "flash3_fwd_bf16_d64_2x128x4q4: threads is -1; allowed: a number");
        assert_eq!(error("causal", json!(1)), "flash3_fwd_bf16_d64_2x128x4q4: causal is not true or false");
        let missing = read(Path::new("no/such/folder")).expect_err("it is not there");
        assert!(format!("{missing:#}").starts_with("no/such/folder/variants.json: "), "{missing:#}");
    }
}
