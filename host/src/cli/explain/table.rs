//! The comparison in tables.
use super::measure::Run;
use crate::cli::units::{bytes, three_digits};
use comfy_table::{CellAlignment, Table, presets};

/// Bytes by algorithm, step and tensor.
pub fn moved(runs: &[Run; 3]) -> String {
    let mut table = table(["kernel", "step", "tensor", "loaded", "stored"], 3);
    for run in runs {
        let (mut kernel, mut loaded, mut stored) = (run.name(), 0, 0);
        for step in &run.steps {
            let mut name = step.name;
            for moved in &step.tensors {
                let cells = [kernel, name, moved.tensor, &some_bytes(moved.loaded), &some_bytes(moved.stored)];
                table.add_row(cells);
                (kernel, name) = ("", "");
                loaded += moved.loaded;
                stored += moved.stored;
            }
        }
        table.add_row(["", "", "total", &bytes(loaded), &bytes(stored)]);
    }
    table.trim_fmt()
}

/// Bytes by length, each beside its ratio to the paper's leading term.
pub fn growth(growth: &[[Run; 3]]) -> String {
    let mut table = table(["N", "standard", "/ (Nd + N²)", "flash1", "/ (N²d²/M)", "flash2", "/ (N²d²/M)"], 0);
    for runs in growth {
        let mut cells = vec![runs[0].problem.seqlen_q.to_string()];
        for run in runs {
            cells.push(bytes(run.bytes()));
            cells.push(three_digits(run.bytes() as f64 / run.paper_bytes()));
        }
        table.add_row(cells);
    }
    table.trim_fmt()
}

/// Extra memory by length.
pub fn memory(growth: &[[Run; 3]]) -> String {
    let mut table = table(["N", "standard", "flash1", "flash2"], 0);
    for runs in growth {
        let length = runs[0].problem.seqlen_q.to_string();
        table.add_row([length].into_iter().chain(runs.iter().map(|run| bytes(run.extra_bytes))));
    }
    table.trim_fmt()
}

/// A table without lines, whose columns from `numbers` on are aligned to the right.
fn table<const N: usize>(header: [&str; N], numbers: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut().skip(numbers) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Bytes; nothing for none.
fn some_bytes(count: u64) -> String {
    if count == 0 { String::new() } else { bytes(count) }
}
