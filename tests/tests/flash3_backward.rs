//! FlashAttention-3's backward kernels on the simulated GPU, against gradients in f64. The simulator fails a run for
//! any race, missing fence, uninitialised read or access out of bounds.
use cuda_std::element::{bf16, f16};
use cuda_std::sim::{Buffer, Launch, Memory, Options, launch_clusters};
use cuda_std::tensor::{TensorMap, TensorMapDescription};
use cuda_std::{DType, Element, Global, Kernel};
use kernels::attention::{Attention, Tensor};
use kernels::dropout::Dropout;
use kernels::flash2_backward::{self, fused};
use kernels::flash3_backward::{
    FINISH, FINISH_RING, HEADS, ORDERED, ORDERED_SPLIT, Order, Params, RING, Ring, SHARED, SHARED_RING, SHARED_SPLIT,
    SPLIT, Shares, WHOLE, can_finish_in_order,
};
use kernels::flash3_backward::{PREPARE, PREPARE_HEADS, PREPARE_ORDERED, PREPARE_RING};
use kernels::{Config, mask};

/// A problem: sequences of `(seqlen_q, seqlen_k)`, which follow each other if `packed`, and are all alike if not.
#[derive(Clone, Copy)]
struct Problem {
    lengths: &'static [(usize, usize)],
    packed: bool,
    nheads: usize,
    nheads_k: usize,
    headdim: usize,
    causal: bool,
}

/// Of one head of one sequence, rows of `headdim`.
struct Head {
    d_q: Vec<f64>,
    d_k: Vec<f64>,
    d_v: Vec<f64>,
    o: Vec<f64>,
    lse: Vec<f64>,
}

/// Numbers between -1 and 1, the same in each run.
fn numbers<T: Element>(count: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| T::from_f32(next())).collect()
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// The gradients of one head, from its rows of Q, K, V and dO and the gradient of its LSE.
fn gradients(p: &Problem, scale: f64, [q, k, v, d_o]: [&[f64]; 4], d_lse: &[f64]) -> Head {
    let d = p.headdim;
    let (rows, keys) = (q.len() / d, k.len() / d);
    let mut head = Head {
        d_q: vec![0.0; q.len()],
        d_k: vec![0.0; k.len()],
        d_v: vec![0.0; k.len()],
        o: vec![0.0; q.len()],
        lse: vec![f64::NEG_INFINITY; rows],
    };
    let row_of = |x: &[f64], i: usize| x[i * d..][..d].to_vec();
    let add = |to: &mut [f64], i: usize, factor: f64, x: &[f64]| {
        to[i * d..][..d].iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
    };
    for (i, d_lse) in d_lse.iter().enumerate() {
        let seen = if p.causal { (i + 1 + keys).saturating_sub(rows).min(keys) } else { keys };
        if seen == 0 {
            continue;
        }
        let (q_i, d_o_i) = (row_of(q, i), row_of(d_o, i));
        let s: Vec<f64> = (0..seen).map(|j| scale * dot(&q_i, &k[j * d..][..d])).collect();
        let m = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let l: f64 = s.iter().map(|s| (s - m).exp()).sum();
        head.lse[i] = m + l.ln();
        let weights: Vec<f64> = s.iter().map(|s| (s - head.lse[i]).exp()).collect();
        for (j, &weight) in weights.iter().enumerate() {
            add(&mut head.o, i, weight, &row_of(v, j));
        }
        let sum = dot(&d_o_i, &head.o[i * d..][..d]) - d_lse;
        for (j, weight) in weights.into_iter().enumerate() {
            let d_s = scale * weight * (dot(&d_o_i, &v[j * d..][..d]) - sum);
            add(&mut head.d_v, j, weight, &d_o_i);
            add(&mut head.d_q, i, d_s, &row_of(k, j));
            add(&mut head.d_k, j, d_s, &q_i);
        }
    }
    head
}

/// ‖x - exact‖ / ‖exact‖.
fn relative_error<T: Element>(x: &[T], exact: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut x.iter().zip(exact).map(|(x, exact)| f64::from(x.to_f32()) - exact));
    error / norm(&mut exact.iter().copied())
}

/// The kernels of a table for this dtype and the least head dimension that is enough, of those that are asked for.
fn kernels_of<P>(
    tables: [&'static [Kernel<P, Config>]; 2],
    dtype: DType,
    headdim: usize,
    is_it: impl Fn(&Config) -> bool,
) -> Vec<&'static Kernel<P, Config>> {
    let fits = |config: &Config| config.dtype == dtype && config.headdim as usize >= headdim && is_it(config);
    let mut fitting: Vec<_> = tables.into_iter().flatten().filter(|kernel| fits(&kernel.config)).collect();
    let least = fitting.iter().map(|kernel| kernel.config.headdim).min().expect("a kernel");
    fitting.retain(|kernel| kernel.config.headdim == least);
    fitting
}

fn run<P: Copy + Send + Sync>(kernel: &Kernel<P, Config>, blocks: usize, seed: u64, memory: &Memory, p: P) {
    let Config { threads, shared_bytes, .. } = kernel.config;
    let described = Launch { kernel: kernel.name, grid: [blocks as u32, 1, 1], block: [threads, 1, 1], shared_bytes };
    let options = Options { seed, ..Options::default() };
    let report = launch_clusters(&described, kernel.cluster, memory, &options, || (kernel.run)(p));
    assert!(report.findings.is_empty(), "{}", report.findings[0]);
}

/// Of (tokens, heads, headdim) rows `first` to `first + count` of one head.
fn rows<T: Element>(
    x: &[T],
    (heads, headdim): (usize, usize),
    (first, count): (usize, usize),
    head: usize,
) -> Vec<f64> {
    let row = |i| x[((first + i) * heads + head) * headdim..][..headdim].iter();
    (0..count).flat_map(row).map(|x| f64::from(x.to_f32())).collect()
}

/// Adds `values` to those rows.
fn add_rows(to: &mut [f64], (heads, headdim): (usize, usize), first: usize, head: usize, values: &[f64]) {
    for (i, row) in values.chunks_exact(headdim).enumerate() {
        let to = &mut to[((first + i) * heads + head) * headdim..][..headdim];
        to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
    }
}

/// The gradients of a problem by all kernels for it are those in f64, as far as T can say.
fn check<T: Element>(p: Problem, seed: u64) {
    let is_causal = |config: &Config| config.causal == Some(p.causal);
    for pass in kernels_of([WHOLE, SPLIT], T::DTYPE, p.headdim, is_causal) {
        check_pass::<T>(p, pass, Takes::OneBlock, (seed, seed));
    }
    let mut of_heads = None;
    if p.headdim <= 64 {
        for pass in kernels_of([HEADS, &[]], T::DTYPE, p.headdim, is_causal) {
            of_heads = Some((pass, bits(check_pass::<T>(p, pass, Takes::WholeHead, (seed, seed)))));
        }
    }
    for pass in kernels_of([ORDERED, ORDERED_SPLIT], T::DTYPE, p.headdim, is_causal) {
        let in_order = Takes::OneInOrder { finishes: can_finish(pass) };
        let found = bits(check_pass::<T>(p, pass, in_order, (seed, seed)));
        let again = bits(check_pass::<T>(p, pass, in_order, (seed, seed + 1)));
        assert!(found == again, "{}: other bits where threads run in another order", pass.name);
        if let Some((heads, of_heads)) = &of_heads {
            assert!(&found == of_heads, "{}: other bits than {}", pass.name, heads.name);
        }
    }
}

/// Whether the first keys can finish dQ.
fn can_finish(pass: &Kernel<Params, Config>) -> bool {
    can_finish_in_order(pass.config.headdim, pass.config.block_m)
}

/// The bits of gradients.
fn bits<T: Element>(found: [Vec<T>; 3]) -> [Vec<u32>; 3] {
    found.map(|x| x.into_iter().map(|x| x.to_f32().to_bits()).collect())
}

/// Which keys a block of threads takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    OneBlock,
    /// One, of which so many are shared, from `first` on, by so many blocks of threads each.
    OneShared {
        first: u32,
        count: u32,
        parts: u32,
    },
    /// One, with sums of dQ in a ring of so many heads, which are finished so many heads later. Those of the last head are shared
    /// by so many.
    OneOfRing {
        heads: u32,
        lag: u32,
        parts: u32,
    },
    /// One, which adds to dQ in its turn; the first keys may finish it.
    OneInOrder {
        finishes: bool,
    },
    WholeHead,
}

/// The gradients of a problem by all kernels for it, with blocks of keys that are shared: all of them, or the last. They are the same
/// bits where threads run in another order.
fn check_shares<T: Element>(p: Problem, seed: u64) {
    let is_causal = |config: &Config| config.causal == Some(p.causal);
    for pass in kernels_of([SHARED, SHARED_SPLIT], T::DTYPE, p.headdim, is_causal) {
        let block_n = pass.config.block_n * pass.cluster;
        let longest = p.lengths.iter().map(|lengths| lengths.1).max().expect("a sequence");
        let all = (longest as u32).div_ceil(block_n) * (p.nheads_k * p.lengths.len()) as u32;
        for (count, parts) in [(all, 3), (1, 2)] {
            let first = all - count;
            let shared = Takes::OneShared { first, count, parts };
            let [_, d_k, d_v] = bits(check_pass::<T>(p, pass, shared, (seed, seed)));
            let [_, again_k, again_v] = bits(check_pass::<T>(p, pass, shared, (seed, seed + 1)));
            assert!(d_k == again_k && d_v == again_v, "{}: other bits where threads run in another order", pass.name);
        }
    }
}

/// The gradients of a problem by all kernels for it whose heads take turns at the sums of dQ: at as few as may be, and so many
/// `more`. Without a mask also where several blocks of threads share keys of the last head.
fn check_ring<T: Element>(p: Problem, more: &[u32], seed: u64) {
    let in_turn = if p.causal { 2 } else { 1 };
    let is_causal = |config: &Config| config.causal == Some(p.causal);
    let shared = if p.causal || p.headdim <= 64 {
        vec![]
    } else {
        kernels_of([SHARED_RING, &[]], T::DTYPE, p.headdim, is_causal)
    };
    let alone = kernels_of([RING, &[]], T::DTYPE, p.headdim, is_causal);
    for (pass, parts) in alone.into_iter().map(|pass| (pass, 1)).chain(shared.into_iter().map(|pass| (pass, 2))) {
        for more in more {
            let (places, lag) = (2 * in_turn + more, in_turn + more);
            check_pass::<T>(p, pass, Takes::OneOfRing { heads: places, lag, parts }, (seed, seed));
        }
    }
}

/// By one pass.
/// Gives dQ, dK and dV.
fn check_pass<T: Element>(
    p: Problem,
    pass: &'static Kernel<Params, Config>,
    takes: Takes,
    (seed, order): (u64, u64),
) -> [Vec<T>; 3] {
    let Problem { lengths, packed, nheads, nheads_k, headdim, causal } = p;
    let (batch, scale) = (lengths.len(), 1.0 / (headdim as f64).sqrt());
    let begins = |of: fn(&(usize, usize)) -> usize| -> Vec<usize> {
        (0..=batch).map(|b| lengths[..b].iter().map(of).sum()).collect()
    };
    let (q_begins, k_begins) = (begins(|l| l.0), begins(|l| l.1));
    let (tokens_q, tokens_k) = (q_begins[batch], k_begins[batch]);
    let (of_q, of_k) = ((nheads, headdim), (nheads_k, headdim));
    let q = numbers::<T>(tokens_q * nheads * headdim, seed);
    let k = numbers::<T>(tokens_k * nheads_k * headdim, seed + 1);
    let v = numbers::<T>(tokens_k * nheads_k * headdim, seed + 2);
    let d_o = numbers::<T>(tokens_q * nheads * headdim, seed + 3);
    let d_lse = numbers::<f32>(nheads * tokens_q, seed + 4);

    // Where the LSE of a row is: (nheads, tokens) if packed, else (batch, nheads, seqlen).
    let longest = |of: fn(&(usize, usize)) -> usize| lengths.iter().map(of).max().unwrap();
    let (seqlen_q, seqlen_k) = (longest(|l| l.0), longest(|l| l.1));
    let lse_at = |b: usize, head: usize| match packed {
        true => head * tokens_q + q_begins[b],
        false => (b * nheads + head) * seqlen_q,
    };
    let mut exact = [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()], vec![0.0; q.len()]];
    let mut lse = vec![0f32; nheads * tokens_q];
    for (b, &(seqlen_q, seqlen_k)) in lengths.iter().enumerate() {
        for head in 0..nheads {
            let (head_k, of_queries, of_keys) =
                (head / (nheads / nheads_k), (q_begins[b], seqlen_q), (k_begins[b], seqlen_k));
            let inputs = [
                rows(&q, of_q, of_queries, head),
                rows(&k, of_k, of_keys, head_k),
                rows(&v, of_k, of_keys, head_k),
                rows(&d_o, of_q, of_queries, head),
            ];
            let first = lse_at(b, head);
            let d_lse: Vec<f64> = d_lse[first..][..seqlen_q].iter().map(|&x| x.into()).collect();
            let found = gradients(&p, scale, inputs.each_ref().map(|x| &x[..]), &d_lse);
            add_rows(&mut exact[0], of_q, q_begins[b], head, &found.d_q);
            add_rows(&mut exact[1], of_k, k_begins[b], head_k, &found.d_k);
            add_rows(&mut exact[2], of_k, k_begins[b], head_k, &found.d_v);
            add_rows(&mut exact[3], of_q, q_begins[b], head, &found.o);
            (0..seqlen_q).for_each(|i| lse[first + i] = found.lse[i] as f32);
        }
    }
    let o: Vec<T> = exact[3].iter().map(|&x| T::from_f32(x as f32)).collect();

    let Config { headdim: tile_columns, block_m, block_n, .. } = pass.config;
    let blocks_of_head = seqlen_k.div_ceil((block_n * pass.cluster) as usize) as u32;
    let shared = match takes {
        Takes::OneShared { first, count, parts } => Some((first, count, parts)),
        Takes::OneOfRing { parts, .. } if parts > 1 => {
            Some((((batch * nheads_k) as u32 - 1) * blocks_of_head, blocks_of_head, parts))
        }
        _ => None,
    };

    let memory = Memory::new();
    let batches = if packed { 1 } else { batch };
    let stride = |tokens: usize, heads: usize| if packed { 0 } else { (tokens / batch * heads * headdim) as u64 };
    let tensor = |at: Buffer<T>, tokens: usize, heads: usize| Tensor {
        data: at.global().cast(),
        batch_stride: stride(tokens, heads),
        row_stride: (heads * headdim) as u64,
        head_stride: headdim as u64,
    };
    let map = |at: Buffer<T>, tokens: usize, heads: usize, rows: u32| -> TensorMap {
        let row_stride = (heads * headdim) as u64;
        let rows_of_batch = tokens / batches;
        let outer = [(heads as u64, headdim as u64), (batches as u64, rows_of_batch as u64 * row_stride)];
        let extents = (rows_of_batch as u64, headdim as u64);
        let address = at.global().address();
        let map = TensorMapDescription::of_panels(T::DTYPE, (rows, tile_columns), address, extents, row_stride, &outer);
        map.and_then(|map| map.simulated()).expect("a tensor map")
    };
    let [q_at, d_o_at, o_at] = [("q", &q), ("d_o", &d_o), ("o", &o)].map(|(name, x)| memory.upload(name, x));
    let [k_at, v_at] = [("k", &k), ("v", &v)].map(|(name, x)| memory.upload(name, x));
    let d_q_at = memory.allocate::<T>("d_q", q.len());
    let [d_k_at, d_v_at] = ["d_k", "d_v"].map(|name| memory.allocate::<T>(name, k.len()));
    let upload_begins = |name, begins: &[usize]| {
        let begins: Vec<i32> = begins.iter().map(|&x| x as i32).collect();
        if packed { memory.upload(name, &begins).global() } else { Global::NULL }
    };
    let places = fused::places_in_blocks(block_m, batch as u64, seqlen_q as u64, packed.then_some(tokens_q as u64));
    let places = places as usize * nheads;
    let pairs = nheads_k * batch;
    let (sums, ring) = match takes {
        Takes::OneOfRing { heads, lag, .. } => {
            let counters = memory.allocate::<u32>("counters", 2 * pairs).global();
            (places / pairs * heads as usize, Ring { counters, heads, lag })
        }
        _ => (places, Ring::NONE),
    };
    let nothing = Tensor { data: Global::NULL, batch_stride: 0, row_stride: 0, head_stride: 0 };
    let parameters = Params {
        q: map(q_at, tokens_q, nheads, block_m),
        k: map(k_at, tokens_k, nheads_k, block_n),
        v: map(v_at, tokens_k, nheads_k, block_n),
        d_o: map(d_o_at, tokens_q, nheads, block_m),
        backward: flash2_backward::Params {
            attention: Attention {
                q: tensor(q_at, tokens_q, nheads),
                k: tensor(k_at, tokens_k, nheads_k),
                v: tensor(v_at, tokens_k, nheads_k),
                o: tensor(o_at, tokens_q, nheads),
                bias: nothing,
                mask: Tensor { data: Global::NULL, batch_stride: 0, row_stride: 0, head_stride: 0 },
                alibi_slopes: Global::NULL,
                alibi_batch_stride: 0,
                sinks: Global::NULL,
                softmax_lse: memory.upload("lse", &lse).global(),
                lse_batch_stride: if packed { 0 } else { (nheads * seqlen_q) as u64 },
                lse_head_stride: if packed { tokens_q } else { seqlen_q } as u64,
                cu_seqlens_q: upload_begins("cu_seqlens_q", &q_begins),
                cu_seqlens_k: upload_begins("cu_seqlens_k", &k_begins),
                dropout: Dropout::NONE,
                batch: batch as u32,
                nheads: nheads as u32,
                nheads_k: nheads_k as u32,
                seqlen_q: seqlen_q as u32,
                seqlen_k: seqlen_k as u32,
                headdim: headdim as u32,
                headdim_v: headdim as u32,
                softmax_scale: scale as f32,
                softcap: 0.0,
                window_left: mask::UNBOUNDED,
                window_right: if causal { 0 } else { mask::UNBOUNDED },
                aligned: 1,
            },
            d_o: tensor(d_o_at, tokens_q, nheads),
            d_q: tensor(d_q_at, tokens_q, nheads),
            d_k: tensor(d_k_at, tokens_k, nheads_k),
            d_v: tensor(d_v_at, tokens_k, nheads_k),
            d_lse: memory.upload("d_lse", &d_lse).global(),
            row_sums: Global::NULL,
            d_bias: nothing,
            bias_batch: 0,
            bias_heads: 0,
            bias_rows: 0,
            d_sinks: Global::NULL,
            statistics: memory.allocate::<f32>("statistics", 2 * places).global(),
            d_q_sums: memory.allocate::<f32>("d_q_sums", sums * tile_columns as usize).global(),
        },
        heads_in_turn: 2,
        ring,
        order: match takes {
            Takes::OneInOrder { finishes } => {
                let key_blocks = pairs * seqlen_k.div_ceil(Order::BLOCK_N as usize);
                let counters = memory.allocate::<u32>("counters", key_blocks * Order::COUNTERS as usize);
                Order { counters: counters.global(), finishes: finishes.into() }
            }
            _ => Order::NONE,
        },
        shares: match shared {
            Some((first, count, parts)) => {
                let of_block = block_n * pass.cluster * (pass.config.headdim + pass.config.headdim_v);
                let left = memory.allocate::<f32>("shares", (count * (parts - 1) * of_block) as usize).global();
                let counters = memory.allocate::<u32>("counters of shares", (count * Shares::COUNTERS) as usize);
                Shares { left, counters: counters.global(), first, count, parts }
            }
            None => Shares::NONE,
        },
    };
    let query_blocks = seqlen_q.div_ceil(block_m as usize) * nheads * batch;
    let of_heads = |blocks: usize| blocks * nheads_k * batch;
    let cluster = pass.cluster as usize;
    let key_blocks = seqlen_k.div_ceil(block_n as usize * cluster) * cluster;
    let key_blocks = match takes {
        Takes::WholeHead => of_heads(1),
        _ => of_heads(key_blocks),
    };
    let more = shared.map_or(0, |(_, count, parts)| count * (parts - 1) * pass.cluster) as usize;
    fn of_queries<P>(table: &'static [Kernel<P, Config>], pass: &Config) -> &'static Kernel<P, Config> {
        let key = |config: &Config| (config.dtype, config.headdim, config.block_m);
        table.iter().find(|kernel| key(&kernel.config) == key(pass)).expect("a kernel in step")
    }
    let of_queries_too = |table, blocks| run(of_queries(table, &pass.config), blocks, order, &memory, parameters);
    let of_queries = |table| run(of_queries(table, &pass.config), query_blocks, order, &memory, parameters.backward);
    match takes {
        Takes::OneOfRing { .. } => of_queries_too(PREPARE_RING, query_blocks),
        Takes::OneInOrder { .. } => of_queries_too(PREPARE_ORDERED, query_blocks),
        Takes::WholeHead => of_queries(PREPARE_HEADS),
        Takes::OneBlock | Takes::OneShared { .. } => of_queries_too(PREPARE, query_blocks),
    }
    run(pass, key_blocks + more, order, &memory, parameters);
    match takes {
        Takes::OneOfRing { lag, .. } => of_queries_too(FINISH_RING, query_blocks / pairs * lag as usize),
        Takes::WholeHead => {}
        Takes::OneInOrder { finishes: true } => {}
        Takes::OneBlock | Takes::OneShared { .. } | Takes::OneInOrder { .. } => of_queries(FINISH),
    }

    let tolerance = if T::DTYPE == DType::F16 { 5e-4 } else { 4e-3 };
    let found = [("dQ", memory.read(&d_q_at)), ("dK", memory.read(&d_k_at)), ("dV", memory.read(&d_v_at))];
    for ((name, found), exact) in found.iter().zip(&exact) {
        let error = relative_error(found, exact);
        println!("{} {name} {error:.2e}", pass.name);
        assert!(error < tolerance, "{name}: {error:.2e} of {tolerance:.0e}, {}", pass.name);
    }
    found.map(|(_, found)| found)
}

const FIXED: Problem =
    Problem { lengths: &[(200, 200); 2], packed: false, nheads: 2, nheads_k: 2, headdim: 128, causal: false };

#[test]
fn one_head() {
    for causal in [false, true] {
        check::<bf16>(Problem { lengths: &[(256, 256)], nheads: 1, nheads_k: 1, causal, ..FIXED }, 1);
        check::<f16>(Problem { lengths: &[(256, 256)], nheads: 1, nheads_k: 1, headdim: 64, causal, ..FIXED }, 2);
    }
}

#[test]
fn tails_and_narrow_heads() {
    for causal in [false, true] {
        check::<f16>(Problem { causal, ..FIXED }, 3);
        check::<bf16>(Problem { lengths: &[(130, 70); 2], headdim: 40, causal, ..FIXED }, 4);
        check::<bf16>(Problem { lengths: &[(70, 260)], headdim: 96, causal, ..FIXED }, 5);
    }
}

#[test]
fn wide_heads() {
    for causal in [false, true] {
        check::<bf16>(Problem { lengths: &[(150, 330)], headdim: 256, causal, ..FIXED }, 9);
        check::<f16>(Problem { lengths: &[(130, 70)], headdim: 192, nheads_k: 1, causal, ..FIXED }, 10);
    }
}

#[test]
fn grouped_queries() {
    for headdim in [64, 128] {
        check::<bf16>(Problem { nheads: 6, causal: true, headdim, ..FIXED }, 6);
    }
}

#[test]
fn packed_sequences() {
    for causal in [false, true] {
        let lengths = &[(100, 40), (0, 130), (1, 1), (190, 210)];
        check::<bf16>(Problem { lengths, packed: true, nheads_k: 1, causal, ..FIXED }, 7);
        check::<f16>(Problem { lengths, packed: true, headdim: 64, causal, ..FIXED }, 8);
        check::<bf16>(Problem { lengths, packed: true, headdim: 256, nheads_k: 1, causal, ..FIXED }, 11);
    }
}

/// More blocks of keys than two, of heads that share them, which add in turn; also where nobody sees the first queries.
#[test]
fn many_keys_in_order() {
    for causal in [false, true] {
        for (lengths, headdim) in [(&[(330, 520); 4], 64), (&[(420, 300); 4], 128), (&[(150, 300); 4], 256)] {
            let problem = Problem { lengths, nheads: 2, nheads_k: 1, headdim, causal, ..FIXED };
            for pass in
                kernels_of([ORDERED, ORDERED_SPLIT], DType::BF16, headdim, |config| config.causal == Some(causal))
            {
                let [finished, apart] = [can_finish(pass), false]
                    .map(|finishes| check_pass::<bf16>(problem, pass, Takes::OneInOrder { finishes }, (18, 18)));
                assert!(bits(finished) == bits(apart), "{}: dQ is the same whoever finishes it", pass.name);
            }
        }
    }
}

/// More blocks of threads than there are blocks of keys, in which some have nothing to do, as keys are seen by few queries.
#[test]
fn several_share_a_block_of_keys() {
    for causal in [false, true] {
        for (lengths, headdim) in [(&[(330, 300); 2], 64), (&[(430, 300); 2], 128), (&[(300, 330); 2], 256)] {
            check_shares::<bf16>(Problem { lengths, nheads: 2, nheads_k: 1, headdim, causal, ..FIXED }, 19);
        }
        check_shares::<f16>(Problem { lengths: &[(700, 200)], headdim: 96, causal, ..FIXED }, 20);
    }
}

/// Places are taken over, and shares of heads are uneven: blocks of queries are more or fewer than blocks of keys.
#[test]
fn heads_take_turns_at_sums() {
    for causal in [false, true] {
        let few = Problem { lengths: &[(200, 200); 4], causal, ..FIXED };
        // With six more each has a place, and the pass finishes one of them, or none.
        check_ring::<bf16>(few, &[0, 1, 6], 12);
        check_ring::<f16>(Problem { headdim: 64, ..few }, &[0], 13);
        check_ring::<bf16>(Problem { lengths: &[(130, 330); 4], headdim: 96, nheads: 4, ..few }, &[0], 14);
        check_ring::<bf16>(Problem { lengths: &[(330, 130); 4], headdim: 40, ..few }, &[0], 15);
    }
}

#[test]
fn grouped_queries_take_turns_at_sums() {
    for causal in [false, true] {
        let grouped = Problem { lengths: &[(200, 260); 4], nheads: 6, nheads_k: 2, causal, ..FIXED };
        check_ring::<bf16>(grouped, &[0], 16);
        check_ring::<bf16>(Problem { headdim: 64, ..grouped }, &[0], 17);
    }
}
