//! The `#[kernel]` attribute of `cuda_std`.
mod arguments;
mod combination;
mod expand;
mod template;

use proc_macro::TokenStream;
use syn::parse_macro_input;

/// Makes entry points of a function: on `nvptx64` as PTX, elsewhere as a table for a host and its simulated GPU.
///
/// # One entry point
///
/// ```text
/// #[kernel(threads = 256, min_blocks = 2)]
/// pub fn scale(x: Global<f32>, factor: f32, n: u32) {
///     let i = thread::index_1d();
///     if i < n {
///         x.store(i as usize, x.load(i as usize) * factor);
///     }
/// }
/// ```
///
/// is, besides the function itself, an entry `scale` in the PTX. `threads` is the largest block it is launched with and
/// `min_blocks` (by default 1) the number of blocks that are to fit one multiprocessor: the compiler's budget of
/// registers. Both may be left out.
///
/// # Many entry points from one generic function
///
/// ```text
/// /// What a host needs to know to launch `forward`.
/// pub struct Config {
///     pub threads: u32,
///     pub min_blocks_per_sm: u32,
///     pub head_dim: usize,
/// }
///
/// const fn config<T: Element, const HEAD_DIM: usize, const BLOCK_N: usize, const CAUSAL: bool>() -> Config { .. }
///
/// #[kernel(
///     name = "forward_{T}_d{HEAD_DIM}{CAUSAL?_causal}",
///     for T in [f16, bf16], (HEAD_DIM, BLOCK_N) in [(64, 128), (128, 64)], CAUSAL in [false, true],
///     config = config, table = FORWARD: Config,
/// )]
/// pub fn forward<T: Element, const HEAD_DIM: usize, const BLOCK_N: usize, const CAUSAL: bool>(p: Params) { .. }
/// ```
///
/// makes eight entry points, `forward_f16_d64`, `forward_f16_d64_causal` and so on: one for each way to take a row from
/// each list. Together the lists bind each generic parameter of the function once. Another `for` begins other lists, which
/// do the same on their own, and whose entry points follow those of the first:
///
/// ```text
/// for T in [f16, bf16], HEAD_DIM in [64, 128], for T in [f32], HEAD_DIM in [32]
/// ```
///
/// - `name`: `{T}` is the last segment of a type's path, `{HEAD_DIM}` a number, and `{CAUSAL?text}` stands for `text`
///   where `CAUSAL` is true; `{D_V!=D?text}` for `text` and the number `D_V` where that is not `D`. By default it is the
///   name of the function.
/// - `config`: a `const fn` with the generic parameters of the kernel. It returns the fields `threads: u32` and
///   `min_blocks_per_sm: u32`, which become the launch bounds, and whatever else a host wants to know.
/// - `arch`: what the entry points are built for: `sm_80`, if nothing is said, or `sm_90a`, for kernels that say words
///   of Hopper. They are in the PTX of that architecture alone.
/// - `cluster`: how many blocks, neighbours in the first dimension of the grid, make a cluster: part of the entry
///   point.
/// - `table`: the name of the `static` of type `&[cuda_std::Kernel<Params, Config>]` that lists the entry points where
///   the target is not a GPU, and the type that `config` returns (if left out, whatever `Config` is in scope).
///
/// Launch bounds go into the PTX as comments, `// .launch_bounds NAME THREADS MIN_BLOCKS`, clusters as
/// `// .cluster NAME BLOCKS`: rustc has no attribute for them, so `cuda_builder` turns them into directives. It also
/// enables the two unstable features that entry points need on the device, `abi_ptx` and `asm_experimental_arch`.
#[proc_macro_attribute]
pub fn kernel(arguments: TokenStream, function: TokenStream) -> TokenStream {
    let arguments = parse_macro_input!(arguments as arguments::Arguments);
    let function = parse_macro_input!(function as syn::ItemFn);
    expand::expand(&arguments, function).unwrap_or_else(syn::Error::into_compile_error).into()
}
