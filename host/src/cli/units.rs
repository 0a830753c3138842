//! Numbers as people read them.

/// Bytes in binary units, three digits: `640 KiB`, `1.25 MiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // From 999.5 on, three digits would show 1000.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 { value.to_string() } else { three_digits(value) };
    format!("{digits} {}", UNITS[unit])
}

/// Seconds in the unit that suits them, three digits.
pub fn seconds(seconds: f64) -> String {
    let (factor, unit) = match seconds {
        s if s < 1e-3 => (1e6, "µs"),
        s if s < 1.0 => (1e3, "ms"),
        _ => (1.0, "s"),
    };
    format!("{} {unit}", three_digits(seconds * factor))
}

/// At least three significant digits: `0.0123`, `1.23`, `12.3`, `123`, `1234`; no zeros after the point.
pub fn three_digits(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let decimals = (2 - value.abs().log10().floor() as i32).clamp(0, 12) as usize;
    let digits = format!("{value:.decimals$}");
    match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_a_unit() {
        let written = [0, 999, 1000, 1024, 655_360, 1_310_720, 1 << 40].map(bytes);
        assert_eq!(written, ["0 B", "999 B", "0.977 KiB", "1 KiB", "640 KiB", "1.25 MiB", "1 TiB"]);
    }

    #[test]
    fn seconds_have_a_unit() {
        let written = [2.5e-6, 1.234e-3, 0.5, 75.0].map(seconds);
        assert_eq!(written, ["2.5 µs", "1.23 ms", "500 ms", "75 s"]);
    }
}
