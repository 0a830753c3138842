//! The ways to take one row from each list after a `for`.
use crate::arguments::List;
use syn::{Error, GenericArgument, GenericParam, Generics, Ident, Result};

/// One value for each bound name.
#[derive(Default)]
pub struct Combination<'a>(Vec<(&'a Ident, &'a GenericArgument)>);

impl<'a> Combination<'a> {
    fn and(&self, list: &'a List, row: &'a [GenericArgument]) -> Self {
        Combination(self.0.iter().copied().chain(list.names.iter().zip(row)).collect())
    }

    /// The value of a name.
    pub fn value(&self, name: &str) -> Option<&GenericArgument> {
        self.0.iter().find(|(bound, _)| *bound == name).map(|(_, value)| *value)
    }

    /// The values in the order in which `generics` declares their names.
    pub fn arguments(&self, generics: &Generics) -> Vec<&GenericArgument> {
        names(generics).filter_map(|name| self.value(&name.to_string())).collect()
    }
}

/// Those of all groups of lists, one group after the other; without a group there is one, of no values.
pub fn combinations(groups: &[Vec<List>]) -> Vec<Combination<'_>> {
    match groups {
        [] => vec![Combination::default()],
        _ => groups.iter().flat_map(|lists| product(lists)).collect(),
    }
}

/// The Cartesian product of the lists; the last one varies fastest.
fn product(lists: &[List]) -> Vec<Combination<'_>> {
    lists.iter().fold(vec![Combination::default()], |shorter, list| {
        shorter.iter().flat_map(|combination| list.rows.iter().map(|row| combination.and(list, row))).collect()
    })
}

/// Whether the lists of each group bind each generic parameter once, and nothing else.
pub fn check(groups: &[Vec<List>], generics: &Generics) -> Result<()> {
    if let Some(GenericParam::Lifetime(lifetime)) =
        generics.params.iter().find(|p| matches!(p, GenericParam::Lifetime(_)))
    {
        return Err(Error::new_spanned(lifetime, "a kernel cannot be generic over a lifetime"));
    }
    match groups {
        [] => check_group(&[], generics),
        _ => groups.iter().try_for_each(|lists| check_group(lists, generics)),
    }
}

fn check_group(lists: &[List], generics: &Generics) -> Result<()> {
    let bound: Vec<&Ident> = lists.iter().flat_map(|list| &list.names).collect();
    for (i, name) in bound.iter().enumerate() {
        if !names(generics).any(|declared| declared == *name) {
            return Err(Error::new(name.span(), format!("the kernel has no generic parameter `{name}`")));
        }
        if bound[..i].contains(name) {
            return Err(Error::new(name.span(), format!("`{name}` is bound twice")));
        }
    }
    match names(generics).find(|name| !bound.contains(name)) {
        Some(name) => Err(Error::new(name.span(), format!("no list after `for` in #[kernel(..)] binds `{name}`"))),
        None => Ok(()),
    }
}

fn names(generics: &Generics) -> impl Iterator<Item = &Ident> {
    generics.params.iter().filter_map(|parameter| match parameter {
        GenericParam::Type(parameter) => Some(&parameter.ident),
        GenericParam::Const(parameter) => Some(&parameter.ident),
        GenericParam::Lifetime(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Arguments;
    use quote::quote;
    use syn::ItemFn;

    fn groups(text: &str) -> Vec<Vec<List>> {
        syn::parse_str::<Arguments>(text).unwrap().groups
    }

    fn generics(text: &str) -> Generics {
        syn::parse_str::<ItemFn>(&format!("fn kernel<{text}>() {{}}")).unwrap().sig.generics
    }

    /// The arguments of all combinations, for a function with these generics.
    fn printed(lists: &str, function: &str) -> Vec<String> {
        let (groups, generics) = (groups(lists), generics(function));
        check(&groups, &generics).unwrap();
        let print = |combination: &Combination| {
            let arguments = combination.arguments(&generics);
            quote!(#(#arguments),*).to_string()
        };
        combinations(&groups).iter().map(print).collect()
    }

    #[test]
    fn arguments_follow_the_function() {
        let lists = "for C in [false, true], (N, T) in [(1, f16), (2, bf16)]";
        assert_eq!(
            printed(lists, "T: Element, const N: usize, const C: bool"),
            ["f16 , 1 , false", "bf16 , 2 , false", "f16 , 1 , true", "bf16 , 2 , true"]
        );
    }

    #[test]
    fn groups_follow_each_other() {
        let lists = "for T in [f16, bf16], N in [1, 2], for (N, T) in [(3, f32)]";
        assert_eq!(
            printed(lists, "T: Element, const N: usize"),
            ["f16 , 1", "f16 , 2", "bf16 , 1", "bf16 , 2", "f32 , 3"]
        );
        assert_eq!(printed("", ""), [""]);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |l: &str, g: &str| check(&groups(l), &generics(g)).unwrap_err().to_string();
        assert!(error("for T in [f16], D in [64]", "T").contains("no generic parameter `D`"));
        assert!(error("for T in [f16]", "T, const D: usize").contains("binds `D`"));
        assert!(error("for T in [f16], T in [bf16]", "T").contains("`T` is bound twice"));
        assert!(error("for T in [f16], D in [64], for T in [f32]", "T, const D: usize").contains("binds `D`"));
        assert!(error("", "'a").contains("lifetime"));
    }
}
