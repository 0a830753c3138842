//! From a function to its entry points.
use crate::arguments::{Arguments, Bounds, Table};
use crate::combination::{Combination, check, combinations};
use crate::template::Template;
use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{Error, FnArg, ItemFn, LitStr, Result, Type, parse_quote};

/// The function, and what `#[kernel(..)]` adds to it.
pub fn expand(arguments: &Arguments, mut function: ItemFn) -> Result<TokenStream> {
    check(&arguments.groups, &function.sig.generics)?;
    let entries = entries(arguments, &function)?;
    let only = std::env::var(ONLY).ok();
    let built = entries.iter().filter(|entry| is_wanted(&entry.name, only.as_deref()));
    let on_device = built.map(|entry| on_device(entry, arguments, &function)).collect::<Result<Vec<_>>>()?;
    let on_host = arguments.table.as_ref().map(|table| on_host(table, &entries, arguments, &function)).transpose()?;
    if !function.attrs.iter().any(|attribute| attribute.path().is_ident("inline")) {
        function.attrs.push(parse_quote!(#[cfg_attr(target_arch = "nvptx64", inline(always))]));
    }
    let condition = condition(arguments);
    Ok(quote! {
        #function
        // What names the variable is compiled again when it changes.
        #[cfg(#condition)]
        const _: Option<&str> = ::core::option_env!(#ONLY);
        #(#on_device)*
        #on_host
    })
}

/// The environment variable that says which entry points to build, where not all: those whose name contains one of its
/// parts, which commas separate. `cuda_builder` sets it.
const ONLY: &str = "CUDA_BUILDER_ONLY";

fn is_wanted(name: &str, only: Option<&str>) -> bool {
    only.is_none_or(|parts| parts.split(',').any(|part| name.contains(part)))
}

/// One entry point.
struct Entry<'a> {
    name: String,
    combination: Combination<'a>,
}

impl Entry<'_> {
    /// `::<f16, 64, 128, true>`, or nothing.
    fn turbofish(&self, function: &ItemFn) -> Option<TokenStream> {
        let arguments = self.combination.arguments(&function.sig.generics);
        (!arguments.is_empty()).then(|| quote!(::<#(#arguments),*>))
    }
}

fn entries<'a>(arguments: &'a Arguments, function: &ItemFn) -> Result<Vec<Entry<'a>>> {
    let function_name = LitStr::new(&function.sig.ident.to_string(), function.sig.ident.span());
    let literal = arguments.name.as_ref().unwrap_or(&function_name);
    let template = Template::parse(literal)?;
    let mut entries: Vec<Entry> = Vec::new();
    for combination in combinations(&arguments.groups) {
        let name = template.name(&combination)?;
        if entries.iter().any(|other| other.name == name) {
            let message =
                format!("two entry points would be named `{name}`: the name must tell the combinations apart");
            return Err(Error::new(literal.span(), message));
        }
        entries.push(Entry { name, combination });
    }
    Ok(entries)
}

/// Where an entry point is built: PTX for Hopper alone holds only what is for Hopper, other PTX only what is not.
fn condition(arguments: &Arguments) -> TokenStream {
    match &arguments.arch {
        Some(arch) if arch == "sm_90a" => quote!(all(target_arch = "nvptx64", target_feature = "sm_90a")),
        _ => quote!(all(target_arch = "nvptx64", not(target_feature = "sm_90a"))),
    }
}

/// The PTX entry, and the comments that carry its launch bounds and its cluster.
fn on_device(entry: &Entry, arguments: &Arguments, function: &ItemFn) -> Result<TokenStream> {
    let condition = condition(arguments);
    let name = &entry.name;
    let turbofish = entry.turbofish(function);
    let kernel = &function.sig.ident;
    let types = parameter_types(function)?;
    let parameters: Vec<_> = (0..types.len()).map(|i| format_ident!("p{i}")).collect();
    let call = quote!(#kernel #turbofish(#(#parameters),*));
    let call = if function.sig.unsafety.is_some() { quote!(unsafe { #call }) } else { call };
    let bounds = match &arguments.bounds {
        Bounds::None => None,
        Bounds::Stated { threads, min_blocks } => Some((quote!(#threads), quote!(#min_blocks))),
        Bounds::Config(config) => {
            Some((quote!(#config #turbofish().threads), quote!(#config #turbofish().min_blocks_per_sm)))
        }
    };
    let bounds = bounds.map(|(threads, min_blocks)| {
        let comment = format!("// .launch_bounds {name} {{0}} {{1}}");
        quote! {
            #[cfg(#condition)]
            ::cuda_std::entry::global_asm!(#comment, const #threads, const #min_blocks);
        }
    });
    let cluster = arguments.cluster.as_ref().map(|blocks| {
        let comment = format!("// .cluster {name} {{0}}");
        quote! {
            #[cfg(#condition)]
            ::cuda_std::entry::global_asm!(#comment, const #blocks);
        }
    });
    Ok(quote! {
        #[cfg(#condition)]
        const _: () = {
            #[unsafe(export_name = #name)]
            pub unsafe extern "ptx-kernel" fn entry(#(#parameters: #types),*) {
                #call
            }
        };
        #bounds
        #cluster
    })
}

/// The table of all entry points.
fn on_host(table: &Table, entries: &[Entry], arguments: &Arguments, function: &ItemFn) -> Result<TokenStream> {
    let Table { name: table, config: config_type } = table;
    let Bounds::Config(config) = &arguments.bounds else {
        return Err(Error::new(table.span(), "a table needs `config`"));
    };
    let types = parameter_types(function)?;
    let [parameters] = types[..] else {
        return Err(Error::new_spanned(
            &function.sig,
            "a kernel with a table takes one struct of parameters, by value",
        ));
    };
    if let Some(keyword) = &function.sig.unsafety {
        return Err(Error::new_spanned(keyword, "a kernel with a table is a safe function"));
    }
    let (visibility, kernel) = (&function.vis, &function.sig.ident);
    let arch = arguments.arch.as_ref().map_or("sm_80".to_owned(), |arch| arch.to_string());
    let cluster = arguments.cluster.as_ref().map_or(quote!(1), |blocks| quote!(#blocks));
    let rows = entries.iter().map(|entry| {
        let name = &entry.name;
        let turbofish = entry.turbofish(function);
        quote! {
            ::cuda_std::Kernel {
                name: #name,
                config: #config #turbofish(),
                arch: #arch,
                cluster: #cluster,
                #[cfg(not(target_arch = "nvptx64"))]
                run: ::cuda_std::simulated!(#kernel #turbofish),
                parameters: ::core::marker::PhantomData,
            }
        }
    });
    let docs = format!("The entry points of [`{kernel}`], as a host sees them.");
    Ok(quote! {
        #[doc = #docs]
        #visibility static #table: &[::cuda_std::Kernel<#parameters, #config_type>] = &[#(#rows),*];
    })
}

fn parameter_types(function: &ItemFn) -> Result<Vec<&Type>> {
    let inputs = function.sig.inputs.iter();
    inputs
        .map(|parameter| match parameter {
            FnArg::Typed(parameter) => Ok(&*parameter.ty),
            FnArg::Receiver(receiver) => Err(Error::new_spanned(receiver, "a kernel is a free function")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(arguments: &str, function: &str) -> Result<String> {
        let arguments: Arguments = syn::parse_str(arguments)?;
        expand(&arguments, syn::parse_str(function)?).map(|tokens| dense(&tokens.to_string()))
    }

    /// Without white space, so that expectations can be laid out as Rust.
    fn dense(text: &str) -> String {
        text.split_whitespace().collect()
    }

    #[test]
    fn a_plain_kernel() {
        let text = expanded("threads = 256", "pub fn scale(x: Global<f32>, _: u32) {}").unwrap();
        let expected = r#"
            #[cfg_attr(target_arch = "nvptx64", inline(always))]
            pub fn scale(x: Global<f32>, _: u32) {}
            #[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_90a")))]
            const _: Option<&str> = ::core::option_env!("CUDA_BUILDER_ONLY");
            #[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_90a")))]
            const _: () = {
                #[unsafe(export_name = "scale")]
                pub unsafe extern "ptx-kernel" fn entry(p0: Global<f32>, p1: u32) { scale(p0, p1) }
            };
            #[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_90a")))]
            ::cuda_std::entry::global_asm!("// .launch_bounds scale {0} {1}", const 256, const 1);
        "#;
        assert_eq!(text, dense(expected));
    }

    #[test]
    fn a_generic_kernel_with_a_table() {
        let arguments = r#"name = "f_{T}_{N}", for N in [1], T in [f16], config = config, table = ALL"#;
        let text = expanded(arguments, "#[inline] pub fn forward<T: Element, const N: u32>(p: Params) {}").unwrap();
        let expected = r#"
            #[inline]
            pub fn forward<T: Element, const N: u32>(p: Params) {}
            #[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_90a")))]
            const _: Option<&str> = ::core::option_env!("CUDA_BUILDER_ONLY");
            #[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_90a")))]
            const _: () = {
                #[unsafe(export_name = "f_f16_1")]
                pub unsafe extern "ptx-kernel" fn entry(p0: Params) { forward::<f16, 1>(p0) }
            };
            #[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_90a")))]
            ::cuda_std::entry::global_asm!(
                "// .launch_bounds f_f16_1 {0} {1}",
                const config::<f16, 1>().threads,
                const config::<f16, 1>().min_blocks_per_sm
            );
            #[doc = "The entry points of [`forward`], as a host sees them."]
            pub static ALL: &[::cuda_std::Kernel<Params, Config>] = &[
                ::cuda_std::Kernel {
                    name: "f_f16_1",
                    config: config::<f16, 1>(),
                    arch: "sm_80",
                    cluster: 1,
                    #[cfg(not(target_arch = "nvptx64"))]
                    run: ::cuda_std::simulated!(forward::<f16, 1>),
                    parameters: ::core::marker::PhantomData,
                }
            ];
        "#;
        assert_eq!(text, dense(expected));
    }

    #[test]
    fn a_kernel_for_hopper() {
        let text = expanded("arch = sm_90a, cluster = 2, threads = 384", "pub fn scale() {}").unwrap();
        let expected = r#"
            #[cfg_attr(target_arch = "nvptx64", inline(always))]
            pub fn scale() {}
            #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
            const _: Option<&str> = ::core::option_env!("CUDA_BUILDER_ONLY");
            #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
            const _: () = {
                #[unsafe(export_name = "scale")]
                pub unsafe extern "ptx-kernel" fn entry() { scale() }
            };
            #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
            ::cuda_std::entry::global_asm!("// .launch_bounds scale {0} {1}", const 384, const 1);
            #[cfg(all(target_arch = "nvptx64", target_feature = "sm_90a"))]
            ::cuda_std::entry::global_asm!("// .cluster scale {0}", const 2);
        "#;
        assert_eq!(text, dense(expected));
    }

    #[test]
    fn entry_points_can_be_chosen() {
        assert!(is_wanted("flash3_fwd_f16_d64", None));
        assert!(is_wanted("flash3_fwd_f16_d64", Some("flash2,f16_d64")));
        assert!(!is_wanted("flash3_fwd_f16_d64", Some("flash2,bf16")));
    }

    #[test]
    fn mistakes_are_named() {
        let error = |arguments: &str, function: &str| expanded(arguments, function).unwrap_err().to_string();
        let two = r#"name = "f_{T}", for T in [f16], N in [1, 2]"#;
        assert!(error(two, "fn f<T, const N: u32>() {}").contains("two entry points would be named `f_f16`"));
        assert!(error("table = ALL", "fn f(p: Params) {}").contains("a table needs `config`"));
        assert!(
            error("config = config, table = ALL", "fn f(p: Params, n: u32) {}").contains("one struct of parameters")
        );
        assert!(error("config = config, table = ALL", "unsafe fn f(p: Params) {}").contains("a safe function"));
        assert!(error("", "fn f(&self) {}").contains("a free function"));
        assert!(error("", "fn f<T>() {}").contains("binds `T`"));
    }
}
