//! The arguments of attention that are numbers, as several commands take them.
use ferroflash::{AttentionOptions, WindowSize};
use std::str::FromStr;

/// All that attention may be told besides its tensors.
#[derive(clap::Args)]
pub struct OptionArguments {
    /// Each query sees only the keys up to its own position (counted from the end, where the lengths differ)
    #[arg(long)]
    pub causal: bool,
    /// Each query sees so many keys to the left and to the right of its own position: numbers, or `all`
    #[arg(long, value_name = "LEFT,RIGHT")]
    window: Option<Window>,
    /// What Q Kᵀ is multiplied with [default: 1/√headdim]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    softmax_scale: Option<f32>,
    /// Cap the scores: S becomes X · tanh(S / X)
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    softcap: Option<f32>,
    /// Drop each element of P with this probability, at least 0 and below 1
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    dropout: Option<f32>,
    /// The key of dropout's random numbers
    #[arg(long, value_name = "N", default_value = "0", requires = "dropout")]
    seed: u64,
    /// Where in the sequence of dropout's random numbers to begin
    #[arg(long, value_name = "N", default_value = "0", requires = "dropout")]
    offset: u64,
    /// Compute gradients that are the same bits in every run
    #[arg(long)]
    deterministic: bool,
    /// Allow products of f32 in tf32, with 10 bits of mantissa
    #[arg(long)]
    tf32: bool,
    /// Divide the keys of a tile among so many blocks of threads; 0: as many as seems best, 1: none [default: 0]
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    num_splits: usize,
}

impl OptionArguments {
    /// The options.
    pub fn options(&self) -> AttentionOptions {
        let mut options = AttentionOptions::new().causal(self.causal).allow_tf32(self.tf32);
        options.num_splits = self.num_splits;
        options = options.deterministic(self.deterministic);
        options.window_size = self.window.map_or(WindowSize::default(), |Window(window)| window);
        options.softmax_scale = self.softmax_scale;
        options.softcap = self.softcap;
        match self.dropout {
            Some(p) => options.dropout(p, self.seed, self.offset),
            None => options,
        }
    }
}

/// What options ask for besides plain attention, in words that each begin with a comma.
pub fn in_words(options: &AttentionOptions) -> String {
    let side = |keys: Option<usize>| keys.map_or_else(|| "all".to_owned(), |keys| keys.to_string());
    let AttentionOptions { causal, window_size: WindowSize { left, right }, softmax_scale, .. } = *options;
    let mut words = String::new();
    if causal {
        words += ", causal";
    }
    if left.or(right).is_some() {
        words += &format!(", window {},{}", side(left), side(right));
    }
    let numbers = [("scale", softmax_scale), ("softcap", options.softcap), ("dropout", options.dropout.map(|d| d.p))];
    for (name, number) in numbers {
        words += &number.map_or_else(String::new, |number| format!(", {name} {number}"));
    }
    if options.num_splits > 0 {
        words += &format!(", num_splits {}", options.num_splits);
    }
    let choices = [("deterministic", options.deterministic), ("tf32", options.allow_tf32)];
    choices.iter().filter(|(_, chosen)| *chosen).for_each(|(name, _)| words += &format!(", {name}"));
    words
}

/// A window, from `LEFT,RIGHT`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Window(WindowSize);

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |word: &str| match word.trim() {
            "all" => Ok(None),
            number => number.parse().map(Some).map_err(|_| format!("{word:?}; allowed: a number, or all")),
        };
        let (left, right) = text.split_once(',').ok_or("allowed: LEFT,RIGHT, as 128,0 or all,0")?;
        Ok(Window(WindowSize { left: side(left)?, right: side(right)? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_in_words() {
        let options = AttentionOptions::new().causal(true).window_size(128, None).softcap(30.0).dropout(0.5, 1, 0);
        assert_eq!(in_words(&options), ", causal, window 128,all, softcap 30, dropout 0.5");
        assert_eq!(in_words(&AttentionOptions::new()), "");
    }

    #[test]
    fn windows_are_two_numbers_or_all() {
        let window = |text: &str| text.parse::<Window>().map(|Window(window)| (window.left, window.right));
        assert_eq!(window("128,0"), Ok((Some(128), Some(0))));
        assert_eq!(window("all, 3"), Ok((None, Some(3))));
        for bad in ["128", "-1,0", "1,2,3", "some,0", ""] {
            assert!(window(bad).expect_err("no window").contains("allowed"), "{bad}");
        }
    }
}
