//! The measurements as a table: for a reader, or for a program.
use super::measure::{Row, Setting};
use crate::cli::options::in_words;
use crate::cli::units::{bytes, seconds, three_digits};
use comfy_table::{CellAlignment, Table, presets};
use ferroflash::Report;
use serde_json::{Value, json};

const HEADER: [&str; 7] = ["seqlen", "batch", "kernel", "time", "TFLOP/s", "extra memory", "/ (Q, K, V)"];
const KERNEL: usize = 2;

/// A line for each row; the lines of one shape name it once.
pub fn text(rows: &[Row]) -> String {
    let mut table = Table::new();
    // The last column, of no name, is for what went wrong.
    table.load_style(presets::NOTHING).set_header(HEADER.into_iter().chain([""]));
    for (i, column) in table.column_iter_mut().take(HEADER.len()).enumerate() {
        if i != KERNEL {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut last = None;
    for row in rows {
        let shape = row.shape;
        let named = [shape.seqlen, shape.batch];
        let mut cells = named.map(|x| if last == Some(named) { String::new() } else { x.to_string() }).to_vec();
        last = Some(named);
        cells.push(row.name().to_owned());
        match &row.outcome {
            Ok(report) => cells.extend(measured(row, report)),
            Err(reason) => {
                cells.extend(["-", "-", "-", "-"].map(str::to_owned));
                cells.push(reason.to_string());
            }
        }
        table.add_row(cells);
    }
    table.trim_fmt()
}

fn measured(row: &Row, report: &Report) -> [String; 4] {
    [
        seconds(report.seconds),
        three_digits(report.tflops()),
        bytes(report.extra_bytes),
        three_digits(row.extra_per_input(report)),
    ]
}

/// The same as an object.
pub fn json(setting: &Setting, rows: &[Row]) -> Value {
    json!({
        "backend": setting.session.backend().to_string(),
        "device": setting.session.device_name(),
        "dtype": setting.dtype.name(),
        "causal": setting.options.causal,
        "options": in_words(&setting.options).trim_start_matches(", "),
        "pass": if setting.backward { "backward" } else { "forward" },
        "repetitions": setting.repetitions,
        "rows": rows.iter().map(row_json).collect::<Vec<_>>(),
    })
}

fn row_json(row: &Row) -> Value {
    let shape = row.shape;
    let mut object = json!({
        "kernel": row.name(),
        "batch": shape.batch,
        "seqlen": shape.seqlen,
        "nheads": shape.nheads,
        "headdim": shape.headdim,
        "input_bytes": row.input_bytes,
    });
    match &row.outcome {
        Ok(report) => {
            object["seconds"] = json!(report.seconds);
            object["tflops"] = json!(report.tflops());
            object["flops"] = json!(report.flops);
            object["extra_bytes"] = json!(report.extra_bytes);
            object["extra_per_input"] = json!(row.extra_per_input(report));
        }
        Err(reason) => object["error"] = json!(reason.to_string()),
    }
    object
}
