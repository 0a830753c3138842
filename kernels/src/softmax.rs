//! Softmax over the rows of a matrix, as kernels of their own: two-pass and online, a row a block and a row a warp.
//!
//! - Two-pass ("safe") softmax: one pass finds m = max x, a second l = Σ e^(x - m), and a third writes y = e^(x - m) / l:
//!   HBM traffic of three reads and one write of the row.
//! - Online softmax finds m and l in one pass (Milakov and Gimelshein, Algorithm 3): two reads and one write.
use crate::attention::Untyped;
use crate::config::Config;
use cuda_std::element::{bf16, f16};
use cuda_std::math::max;
use cuda_std::thread::{WARP, block_idx_x, lane_id, sync_threads, thread_idx_x, warp_id};
use cuda_std::warp::{ALL, reduce, shuffle_xor};
use cuda_std::{Element, Global, SharedArray, kernel, shared_array};

/// Elements come without a factor of a kernel's.
type OnlineSoftmax = crate::online_softmax::OnlineSoftmax<true>;

const THREADS: u32 = 128;
const WARPS: usize = (THREADS / WARP) as usize;

/// Arguments of the softmax kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// Input: `rows` rows of `columns` elements.
    pub x: Global<Untyped>,
    /// Output, of the same shape and strides; may be the input.
    pub y: Global<Untyped>,
    /// How many rows.
    pub rows: u32,
    /// Elements of a row, any number.
    pub columns: u32,
    /// From one row to the next, in elements.
    pub row_stride: u64,
}

impl Params {
    /// Row `row` of x and of y.
    #[inline(always)]
    fn row<T: Element>(&self, row: u32) -> (Global<T>, Global<T>) {
        let first = (row as u64 * self.row_stride) as usize;
        (self.x.cast::<T>().offset(first), self.y.cast::<T>().offset(first))
    }
}

const fn config<T: Element, const ONLINE: bool>(family: &'static str, block_m: u32, barriers: u32) -> Config {
    Config {
        family,
        dtype: T::DTYPE,
        tf32: false,
        headdim: 0,
        headdim_v: 0,
        causal: None,
        general: false,
        block_m,
        block_n: 0,
        from_keys: 0,
        few: false,
        sequences: 0,
        threads: THREADS,
        min_blocks_per_sm: 8,
        claimed_registers: 0,
        accumulators: 0,
        shared_bytes: 0,
        barriers,
    }
}

const fn row_a_warp<T: Element, const ONLINE: bool>() -> Config {
    config::<T, ONLINE>(if ONLINE { "softmax.online.warp" } else { "softmax.two_pass.warp" }, WARPS as u32, 0)
}

const fn row_a_block<T: Element, const ONLINE: bool>() -> Config {
    let barriers = if ONLINE { 1 } else { 2 };
    config::<T, ONLINE>(if ONLINE { "softmax.online.block" } else { "softmax.two_pass.block" }, 1, barriers)
}

/// y = softmax(x), a row a warp. Grid: `ceil(rows / 4)`.
#[kernel(
    name = "softmax{ONLINE?_online}_warp_{T}",
    for T in [f32, f16, bf16], ONLINE in [false, true],
    config = row_a_warp,
    table = ROW_A_WARP,
)]
pub fn warp_rows<T: Element, const ONLINE: bool>(p: Params) {
    let row = block_idx_x() * WARPS as u32 + warp_id();
    if row >= p.rows {
        return;
    }
    let (x, y) = p.row::<T>(row);
    let state = if ONLINE {
        online_state(x, p.columns)
    } else {
        let m = reduce::<32, f32>(row_max(x, p.columns, lane_id(), WARP), max);
        let l = reduce::<32, f32>(row_sum(x, p.columns, m, lane_id(), WARP), |a, b| a + b);
        OnlineSoftmax { m, l }
    };
    write_row(x, y, p.columns, state, lane_id(), WARP);
}

/// y = softmax(x), a row a block. Grid: `rows`.
#[kernel(
    name = "softmax{ONLINE?_online}_block_{T}",
    for T in [f32, f16, bf16], ONLINE in [false, true],
    config = row_a_block,
    table = ROW_A_BLOCK,
)]
pub fn block_rows<T: Element, const ONLINE: bool>(p: Params) {
    let (x, y) = p.row::<T>(block_idx_x());
    let thread = thread_idx_x();
    // What each warp found, written by its first lane for all to merge.
    let (m, l) = (shared_array![f32; WARPS], shared_array![f32; WARPS]);
    let publish = |of: SharedArray<f32, WARPS>, x: f32| {
        if lane_id() == 0 {
            of.store(warp_id(), x);
        }
    };
    let mut state = OnlineSoftmax::EMPTY;
    if ONLINE {
        let own = reduce_state(lane_state(x, p.columns, thread, THREADS));
        publish(m, own.m);
        publish(l, own.l);
        sync_threads();
        for warp in 0..WARPS as u32 {
            state = state.merge(OnlineSoftmax { m: m.load(warp), l: l.load(warp) });
        }
    } else {
        publish(m, reduce::<32, f32>(row_max(x, p.columns, thread, THREADS), max));
        sync_threads();
        for warp in 0..WARPS as u32 {
            state.m = max(state.m, m.load(warp));
        }
        publish(l, reduce::<32, f32>(row_sum(x, p.columns, state.m, thread, THREADS), |a, b| a + b));
        sync_threads();
        for warp in 0..WARPS as u32 {
            state.l += l.load(warp);
        }
    }
    write_row(x, y, p.columns, state, thread, THREADS);
}

/// The state of a whole row, found by one warp in one pass.
#[inline(always)]
#[track_caller]
pub(crate) fn online_state<T: Element>(x: Global<T>, columns: u32) -> OnlineSoftmax {
    reduce_state(lane_state(x, columns, lane_id(), WARP))
}

/// y = e^(x - m) / l.
#[inline(always)]
#[track_caller]
pub(crate) fn write_row<T: Element>(
    x: Global<T>,
    y: Global<T>,
    columns: u32,
    state: OnlineSoftmax,
    thread: u32,
    threads: u32,
) {
    let inverse = state.inverse();
    for_each(columns, thread, threads, |i| {
        y.store(i, T::from_f32(state.weight(x.load(i).to_f32()) * inverse));
    });
}

/// One thread's share of the row: elements `thread`, `thread + threads` and so on.
#[inline(always)]
#[track_caller]
fn lane_state<T: Element>(x: Global<T>, columns: u32, thread: u32, threads: u32) -> OnlineSoftmax {
    let mut state = OnlineSoftmax::EMPTY;
    for_each(columns, thread, threads, |i| state.push(x.load(i).to_f32()));
    state
}

#[inline(always)]
#[track_caller]
fn row_max<T: Element>(x: Global<T>, columns: u32, thread: u32, threads: u32) -> f32 {
    let mut m = f32::NEG_INFINITY;
    for_each(columns, thread, threads, |i| m = max(m, x.load(i).to_f32()));
    m
}

#[inline(always)]
#[track_caller]
fn row_sum<T: Element>(x: Global<T>, columns: u32, m: f32, thread: u32, threads: u32) -> f32 {
    let mut state = OnlineSoftmax { m, l: 0.0 };
    for_each(columns, thread, threads, |i| state.l += state.weight(x.load(i).to_f32()));
    state.l
}

/// The merge of the states of all lanes; each lane gets it.
#[inline(always)]
#[track_caller]
fn reduce_state(mut state: OnlineSoftmax) -> OnlineSoftmax {
    let mut lane_mask = 1;
    while lane_mask < WARP {
        let other = OnlineSoftmax { m: shuffle_xor(ALL, state.m, lane_mask), l: shuffle_xor(ALL, state.l, lane_mask) };
        state = state.merge(other);
        lane_mask *= 2;
    }
    state
}

#[inline(always)]
#[track_caller]
fn for_each(columns: u32, thread: u32, threads: u32, mut f: impl FnMut(usize)) {
    let mut i = thread;
    while i < columns {
        f(i as usize);
        i += threads;
    }
}
