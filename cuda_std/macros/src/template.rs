//! Names of entry points: `"forward_{T}_d{HEAD_DIM}{CAUSAL?_causal}"`.
use crate::combination::Combination;
use syn::{Error, Expr, GenericArgument, Lit, LitStr, Result, Type};

/// A parsed template.
pub struct Template<'a> {
    parts: Vec<Part>,
    /// Where it was written, for errors.
    literal: &'a LitStr,
}

#[derive(Debug, PartialEq)]
enum Part {
    Text(String),
    /// `{T}`
    Value(String),
    /// `{CAUSAL?text}`
    Choice(String, String),
    /// `{D_V!=D?text}`
    Unlike(String, String, String),
}

impl<'a> Template<'a> {
    pub fn parse(literal: &'a LitStr) -> Result<Self> {
        let text = literal.value();
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let (inside, after) = after
                .split_once('}')
                .ok_or_else(|| Error::new(literal.span(), format!("`{{{after}` is not closed by `}}`")))?;
            parts.push(Part::Text(before.to_owned()));
            parts.push(match inside.split_once('?') {
                Some((condition, text)) => match condition.split_once("!=") {
                    Some((name, other)) => Part::Unlike(name.to_owned(), other.to_owned(), text.to_owned()),
                    None => Part::Choice(condition.to_owned(), text.to_owned()),
                },
                None => Part::Value(inside.to_owned()),
            });
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Template { parts, literal })
    }

    /// The name of one combination.
    pub fn name(&self, combination: &Combination) -> Result<String> {
        let mut name = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => name.push_str(text),
                Part::Value(of) => name.push_str(&self.printed(of, combination)?),
                Part::Unlike(of, other, text) => {
                    let value = self.printed(of, combination)?;
                    if value != self.printed(other, combination)? {
                        name.push_str(text);
                        name.push_str(&value);
                    }
                }
                Part::Choice(of, text) => match self.value(of, combination)? {
                    GenericArgument::Const(Expr::Lit(value)) if matches!(value.lit, Lit::Bool(_)) => {
                        if matches!(&value.lit, Lit::Bool(on) if on.value) {
                            name.push_str(text);
                        }
                    }
                    _ => return Err(self.error(format!("`{{{of}?{text}}}` needs `true` or `false` for `{of}`"))),
                },
            }
        }
        let is_identifier = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            && name.starts_with(|c: char| c.is_ascii_alphabetic());
        if is_identifier { Ok(name) } else { Err(self.error(format!("`{name}` cannot be the name of an entry point"))) }
    }

    fn printed(&self, of: &str, combination: &Combination) -> Result<String> {
        match self.value(of, combination)? {
            GenericArgument::Type(Type::Path(value)) => {
                Ok(value.path.segments.last().map(|last| last.ident.to_string()).unwrap_or_default())
            }
            GenericArgument::Const(Expr::Lit(value)) => match &value.lit {
                Lit::Int(number) => Ok(number.base10_digits().to_owned()),
                Lit::Bool(_) => Err(self.error(format!("`{of}` is true or false: say `{{{of}?text if true}}`"))),
                _ => Err(self.error(format!("`{{{of}}}` prints a type's name or a number"))),
            },
            _ => Err(self.error(format!("`{{{of}}}` prints a type's name or a number"))),
        }
    }

    fn value<'c>(&self, of: &str, combination: &'c Combination) -> Result<&'c GenericArgument> {
        combination.value(of).ok_or_else(|| self.error(format!("no list after `for` binds `{of}`")))
    }

    fn error(&self, message: String) -> Error {
        Error::new(self.literal.span(), message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Arguments;
    use crate::combination::combinations;
    use proc_macro2::Span;

    /// The names that a template gives the combinations of some lists.
    fn names(template: &str, lists: &str) -> Result<Vec<String>> {
        let arguments: Arguments = syn::parse_str(lists)?;
        let literal = LitStr::new(template, Span::call_site());
        let template = Template::parse(&literal)?;
        combinations(&arguments.groups).iter().map(|combination| template.name(combination)).collect()
    }

    fn error(template: &str, lists: &str) -> String {
        names(template, lists).unwrap_err().to_string()
    }

    #[test]
    fn types_numbers_and_choices() {
        let lists = "for T in [f16, half::bf16], (D, N) in [(64, 128usize), (0x80, 64)], CAUSAL in [false, true]";
        assert_eq!(
            names("f_{T}_d{D}x{N}{CAUSAL?_causal}", lists).unwrap(),
            [
                "f_f16_d64x128",
                "f_f16_d64x128_causal",
                "f_f16_d128x64",
                "f_f16_d128x64_causal",
                "f_bf16_d64x128",
                "f_bf16_d64x128_causal",
                "f_bf16_d128x64",
                "f_bf16_d128x64_causal",
            ]
        );
    }

    #[test]
    fn a_number_that_is_unlike_another() {
        let lists = "for (D, D_V) in [(64, 64), (192, 128)], C in [true]";
        assert_eq!(names("f_d{D}{D_V!=D?_v}{C?_c}", lists).unwrap(), ["f_d64_c", "f_d192_v128_c"]);
        assert!(error("f{D!=E?_v}", "for D in [64]").contains("binds `E`"));
    }

    #[test]
    fn without_lists_there_is_one_name() {
        assert_eq!(names("copy", "").unwrap(), ["copy"]);
    }

    #[test]
    fn mistakes_are_named() {
        assert!(error("f_{T", "for T in [f16]").contains("not closed"));
        assert!(error("f_{U}", "for T in [f16]").contains("binds `U`"));
        assert!(error("f_{C}", "for C in [true]").contains("say `{C?text if true}`"));
        assert!(error("f_{D?_x}", "for D in [64]").contains("needs `true` or `false`"));
        assert!(error("f_{T}", "for T in [[f16; 2]]").contains("prints a type's name"));
        assert!(error("f-{T}", "for T in [f16]").contains("cannot be the name"));
        assert!(error("", "").contains("cannot be the name"));
    }
}
