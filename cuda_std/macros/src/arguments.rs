//! What stands between the parentheses of `#[kernel(..)]`.
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{Error, Expr, GenericArgument, Ident, LitStr, Path, Result, Token, Type};
use syn::{bracketed, parenthesized, parse_quote, token};

/// The arguments, as written.
#[derive(Default)]
pub struct Arguments {
    /// The template of the entry points' names.
    pub name: Option<LitStr>,
    /// For each `for`, the lists after it.
    pub groups: Vec<Vec<List>>,
    /// Where the launch bounds come from.
    pub bounds: Bounds,
    /// The table for the host.
    pub table: Option<Table>,
    /// What the entry points are built for: `sm_80` if nothing is said, or `sm_90a`.
    pub arch: Option<Ident>,
    /// Blocks of a cluster.
    pub cluster: Option<Expr>,
}

/// Where the launch bounds of an entry point come from.
#[derive(Default)]
pub enum Bounds {
    /// It has none.
    #[default]
    None,
    /// `threads = .., min_blocks = ..`
    Stated { threads: Box<Expr>, min_blocks: Box<Expr> },
    /// `config = ..`: a `const fn` with the kernel's generic parameters.
    Config(Path),
}

/// `table = NAME: Config`.
pub struct Table {
    pub name: Ident,
    pub config: Type,
}

/// `T in [f16, bf16]` or `(HEAD_DIM, BLOCK_N) in [(64, 128), (128, 64)]`.
pub struct List {
    /// The generic parameters that it binds.
    pub names: Vec<Ident>,
    /// Rows of as many values.
    pub rows: Vec<Vec<GenericArgument>>,
}

impl Parse for Arguments {
    fn parse(input: ParseStream) -> Result<Self> {
        let mut arguments = Arguments::default();
        let (mut threads, mut min_blocks, mut config) = (None, None, None);
        while !input.is_empty() {
            if input.peek(Token![for]) {
                input.parse::<Token![for]>()?;
                let mut group = vec![input.parse()?];
                while begins_list(input) {
                    input.parse::<Token![,]>()?;
                    group.push(input.parse()?);
                }
                arguments.groups.push(group);
            } else {
                let key: Ident = input.parse()?;
                input.parse::<Token![=]>()?;
                let twice = match key.to_string().as_str() {
                    "name" => arguments.name.replace(input.parse()?).is_some(),
                    "threads" => threads.replace(input.parse()?).is_some(),
                    "min_blocks" => min_blocks.replace((key.clone(), input.parse()?)).is_some(),
                    "config" => config.replace((key.clone(), input.parse()?)).is_some(),
                    "table" => arguments.table.replace(input.parse()?).is_some(),
                    "arch" => arguments.arch.replace(input.parse()?).is_some(),
                    "cluster" => arguments.cluster.replace(input.parse()?).is_some(),
                    _ => {
                        let known = "name, for, threads, min_blocks, config, table, arch and cluster";
                        return Err(Error::new(
                            key.span(),
                            format!("unknown argument `{key}`: a kernel knows {known}"),
                        ));
                    }
                };
                if twice {
                    return Err(Error::new(key.span(), format!("`{key}` is given twice")));
                }
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        if let Some(arch) = &arguments.arch
            && arch != "sm_80"
            && arch != "sm_90a"
        {
            return Err(Error::new(arch.span(), "kernels are built for `sm_80` or `sm_90a`"));
        }
        arguments.bounds = match (threads, min_blocks, config) {
            (None, None, None) => Bounds::None,
            (None, None, Some((_, path))) => Bounds::Config(path),
            (Some(threads), None, None) => Bounds::Stated { threads, min_blocks: parse_quote!(1) },
            (Some(threads), Some((_, min_blocks)), None) => Bounds::Stated { threads, min_blocks },
            (None, Some((key, _)), _) => return Err(Error::new(key.span(), "`min_blocks` needs `threads`")),
            (_, _, Some((key, _))) => {
                return Err(Error::new(key.span(), "launch bounds come from `config` or from `threads`, not both"));
            }
        };
        Ok(arguments)
    }
}

/// Whether another list follows the comma: `T in` or `(..) in`.
fn begins_list(input: ParseStream) -> bool {
    let ahead = input.fork();
    ahead.parse::<Token![,]>().is_ok()
        && (ahead.peek(token::Paren) || ahead.peek(syn::Ident) && ahead.peek2(Token![in]))
}

impl Parse for List {
    fn parse(input: ParseStream) -> Result<Self> {
        let tuple = input.peek(token::Paren);
        let names: Vec<Ident> = if tuple {
            let content;
            parenthesized!(content in input);
            Punctuated::<_, Token![,]>::parse_terminated(&content)?.into_iter().collect()
        } else {
            vec![input.parse()?]
        };
        input.parse::<Token![in]>()?;
        let content;
        bracketed!(content in input);
        let mut rows = Vec::new();
        while !content.is_empty() {
            rows.push(if tuple { parse_row(&content, names.len())? } else { vec![content.parse()?] });
            if !content.is_empty() {
                content.parse::<Token![,]>()?;
            }
        }
        Ok(List { names, rows })
    }
}

fn parse_row(input: ParseStream, width: usize) -> Result<Vec<GenericArgument>> {
    let span = input.span();
    let content;
    parenthesized!(content in input);
    let row: Vec<_> = Punctuated::<_, Token![,]>::parse_terminated(&content)?.into_iter().collect();
    if row.len() == width {
        Ok(row)
    } else {
        Err(Error::new(span, format!("this row has {} values for {width} names", row.len())))
    }
}

impl Parse for Table {
    fn parse(input: ParseStream) -> Result<Self> {
        let name = input.parse()?;
        let config = if input.peek(Token![:]) {
            input.parse::<Token![:]>()?;
            input.parse()?
        } else {
            parse_quote!(Config)
        };
        Ok(Table { name, config })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quote::ToTokens;

    fn error(text: &str) -> String {
        match syn::parse_str::<Arguments>(text) {
            Ok(_) => panic!("this should not parse: {text}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn everything_in_any_order() {
        let text = "table = ALL: host::Config, for T in [f16, bf16,], (D, N) in [(64, 128), (-1, { 2 + 2 })],
            config = Self::config, name = \"f_{T}\", for T in [f32], (D, N) in [(32, 64)]";
        let arguments: Arguments = syn::parse_str(text).unwrap();
        let names =
            |group: &[List]| -> Vec<_> { group.iter().flat_map(|list| &list.names).map(Ident::to_string).collect() };
        let groups: Vec<_> = arguments.groups.iter().map(|group| names(group)).collect();
        assert_eq!(groups, [["T", "D", "N"], ["T", "D", "N"]]);
        assert_eq!(arguments.groups[0][1].rows.len(), 2);
        assert_eq!(arguments.name.unwrap().value(), "f_{T}");
        assert_eq!(arguments.table.unwrap().name, "ALL");
        assert!(matches!(arguments.bounds, Bounds::Config(_)));
    }

    #[test]
    fn one_block_per_multiprocessor_unless_more_are_asked_for() {
        let arguments: Arguments = syn::parse_str("threads = 4 * 32").unwrap();
        let Bounds::Stated { min_blocks, .. } = arguments.bounds else { panic!("threads were stated") };
        assert_eq!(min_blocks.to_token_stream().to_string(), "1");
    }

    #[test]
    fn mistakes_are_named() {
        assert!(error("thread = 3").contains("unknown argument `thread`"));
        assert!(error("threads = 3, threads = 4").contains("`threads` is given twice"));
        assert!(error("min_blocks = 3").contains("needs `threads`"));
        assert!(error("config = config, threads = 3").contains("not both"));
        assert!(error("config = config, threads = 3, min_blocks = 2").contains("not both"));
        assert!(error("for (A, B) in [(1, 2), (3)]").contains("1 values for 2 names"));
        assert!(error("arch = sm_75").contains("`sm_80` or `sm_90a`"));
        assert!(error("for A in 3").contains("expected square brackets"));
    }
}
