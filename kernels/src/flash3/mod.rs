//! FlashAttention-3, forward, for Hopper.
//!
//! Source: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", Algorithms 1
//! and 2.
//!
//! Warps are specialised: a producer keeps copies of K and V in flight, and warpgroups of consumers, 64 query rows each,
//! have the tensor cores multiply while they compute the softmax. Within a warpgroup the product S = Q Kᵀ of the next
//! block of keys and the product P V of the present one run under the softmax; the warpgroups drift apart, and one's
//! exponentials fall under the other's products. O is rescaled lazily: only when a maximum has grown by more than a
//! factor of 2⁸ ([`RowSoftmax::take_lazily`]).
//!
//! Blocks of threads are persistent: each takes one tile of queries after the other ([`schedule`]), and the producer
//! begins with the next tile while the consumers finish the last. Keys are walked from the last to the first: what is
//! masked comes first, where nothing overlaps yet.
//!
//! HBM traffic: that of [`flash2`](crate::flash2).
use crate::attention::Attention;
use crate::config::Config;
use crate::mask::{Blocks, Mask};
use crate::row_softmax::RowSoftmax;
use cuda_std::barrier::Turns;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::Accumulator;
use cuda_std::math::LOG2_E;
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::{self, Slot};
use cuda_std::tensor::{TensorMap, TensorMapRef};
use cuda_std::thread::{lane_id, sync_threads, thread_idx_x};
use cuda_std::warpgroup::{WARPGROUP, claim_registers, release_registers, warp_in_group, warpgroup_id};
use cuda_std::wgmma::{self, InFlight, Registers};
use cuda_std::{SmemTile, fence, kernel};
use memory::Memory;
use schedule::{Schedule, Tile, Tiles};

mod memory;
pub mod schedule;

/// Query rows of a consumer warpgroup.
pub const GROUP_ROWS: u32 = wgmma::ROWS;

/// Arguments of the forward kernel.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Params {
    /// Q: tiles of [`GROUP_ROWS`] rows and `headdim` columns of the configuration; heads and batches are its outer
    /// dimensions.
    pub q: TensorMap,
    /// K: tiles of `block_n` rows and `headdim` columns.
    pub k: TensorMap,
    /// V: tiles of `block_n` rows and `headdim_v` columns.
    pub v: TensorMap,
    /// The problem.
    pub attention: Attention,
    /// Who does what.
    pub schedule: Schedule,
}

const fn config<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && STEPS * 16 == BLOCK_N && O_COLUMNS * 8 == HEADDIM_V);
    Config {
        family: "flash3",
        dtype: T::DTYPE,
        tf32: false,
        headdim: HEADDIM as u32,
        headdim_v: HEADDIM_V as u32,
        causal: Some(CAUSAL),
        general: false,
        block_m: GROUPS * GROUP_ROWS,
        block_n: BLOCK_N as u32,
        threads: (1 + GROUPS) * WARPGROUP,
        min_blocks_per_sm: 1,
        shared_bytes: Memory::<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>::BYTES,
        from_keys: FROM_KEYS,
        // One at the start, and turns: at the first tile and after the last, at the first block of a tile, and at the others,
        // which with a causal mask have two loops.
        barriers: if CAUSAL { 9 } else { 7 },
    }
}

/// O = softmax(softmax_scale · Q Kᵀ) V and its LSE.
///
/// Grid: as many walkers as the GPU runs at once, at most one a unit of work, and those that take a tile each
/// ([`schedule`]). A tile has `GROUPS` times [`GROUP_ROWS`] query rows; S is `S_COLUMNS` and O `O_COLUMNS` blocks of eight
/// columns wide, P `STEPS` of sixteen. Tensors may have fewer columns than `HEADDIM` and `HEADDIM_V`. `FROM_KEYS`:
/// [`Config::from_keys`].
#[kernel(
    name = "flash3_fwd_{T}_d{HEADDIM}{HEADDIM_V!=HEADDIM?_v}_{GROUPS}x{BLOCK_N}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS) in [
            // On an H100, TFLOP/s at 512, 2k and 16k tokens: 403, 540, 604; two warpgroups 382, 443, 464.
            (64, 64, 3, 128, 4, 8, 16, 8),
            (96, 96, 2, 128, 3, 8, 16, 12),
            // 541, 689, 737; with two stages 532, 689, 731; with 176 keys a block 525, 671, 727.
            (128, 128, 2, 128, 3, 8, 16, 16),
            (192, 128, 2, 128, 2, 8, 16, 16),
            (192, 192, 2, 96, 2, 6, 12, 24),
            // 566, 780, 843; with 80 keys a block 546, 772, 838.
            (256, 256, 2, 64, 2, 4, 8, 32),
        ],
        (CAUSAL, FROM_KEYS) in [(false, 0)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS) in [
            // 244, 402, 480: short tiles have less to hide.
            (64, 64, 2, 128, 4, 8, 16, 8, 0),
            // 180, 410, 581.
            (64, 64, 3, 128, 4, 8, 16, 8, 2048),
            (96, 96, 2, 128, 3, 8, 16, 12, 0),
            // 320, 588, 732; with 176 keys a block 240, 553, 728.
            (128, 128, 2, 128, 2, 8, 16, 16, 0),
            (192, 128, 2, 128, 2, 8, 16, 16, 0),
            (192, 192, 2, 96, 2, 6, 12, 24, 0),
            // 312, 635, 815.
            (256, 256, 2, 64, 2, 4, 8, 32, 0),
        ],
        CAUSAL in [true],
    config = config,
    table = FORWARD,
)]
pub fn forward<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>(
    p: Params,
) {
    let memory = Memory::<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>::of_block();
    if thread_idx_x() == 0 {
        memory.init_barriers();
        fence::mbarrier_init();
    }
    sync_threads();
    let a = p.attention.of::<T>();
    let tiles = Tiles::<CAUSAL>::new(p.schedule, GROUPS * GROUP_ROWS, BLOCK_N as u32);
    match warpgroup_id() {
        0 => {
            if const { GROUPS > 2 } {
                release_registers::<32>()
            } else {
                release_registers::<40>()
            }
            if thread_idx_x() == 0 {
                produce(&p, &a, memory, tiles);
            }
        }
        group => {
            if const { GROUPS > 2 } {
                claim_registers::<160>()
            } else {
                claim_registers::<232>()
            }
            let consumer =
                Consumer::<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, CAUSAL>::new(
                    memory,
                    group - 1,
                    a.softmax_scale,
                );
            consumer.run(&a, tiles);
        }
    }
}

/// The producer, one thread: Q of each tile, and its blocks of K and V in the order in which they are used.
#[inline(always)]
#[track_caller]
fn produce<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const CAUSAL: bool,
>(
    p: &Params,
    a: &Attention<T>,
    memory: Memory<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>,
    mut tiles: Tiles<CAUSAL>,
) {
    let [q_map, k_map, v_map] = [&p.q, &p.k, &p.v].map(|map| TensorMapRef::of(p, map));
    let mut queries = memory.queries.producer();
    let mut keys = memory.keys.producer();
    let mut values = memory.values.producer();
    while let Some(Tile { first_row, head, sequence, blocks }) = tiles.next(a) {
        if blocks.count() == 0 {
            continue;
        }
        let batch = a.batch_of_map(sequence.batch) as i32;
        let (of_q, of_k) = ([head as i32, batch], [a.head_k(head) as i32, batch]);
        let mut load_queries = |group: u32| {
            let slot = queries.acquire();
            slot.expect(SmemTile::<T, { GROUP_ROWS as usize }, HEADDIM>::BYTES);
            let row = sequence.first_q + first_row + group * GROUP_ROWS;
            q_map.load_tile(memory.q.stage(slot.index), row as i32, of_q, slot.full());
            queries.advance();
        };
        let row_of = |block: u32| (sequence.first_k + block * BLOCK_N as u32) as i32;
        let mut load_keys = |block: u32| {
            let slot = keys.acquire();
            slot.expect(SmemTile::<T, BLOCK_N, HEADDIM>::BYTES);
            k_map.load_tile(memory.k.stage(slot.index), row_of(block), of_k, slot.full());
            keys.advance();
        };
        let mut load_values = |block: u32| {
            let slot = values.acquire();
            slot.expect(SmemTile::<T, BLOCK_N, HEADDIM_V>::BYTES);
            v_map.load_tile(memory.v.stage(slot.index), row_of(block), of_k, slot.full());
            values.advance();
        };
        load_queries(0);
        load_keys(blocks.end - 1);
        for group in 1..GROUPS {
            load_queries(group);
        }
        for block in (blocks.begin + 1..blocks.end).rev() {
            load_keys(block - 1);
            load_values(block);
        }
        load_values(blocks.begin);
    }
}

/// A warpgroup of consumers, and what it has of its rows of a tile.
struct Consumer<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
> {
    memory: Memory<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>,
    group: u32,
    rows: Rows<CAUSAL>,
    queries: pipeline::Consumer<GROUPS>,
    keys: pipeline::Consumer<STAGES>,
    values: pipeline::Consumer<STAGES>,
    /// The softmax scale in log2 units.
    scale: f32,
    softmax: RowSoftmax<1>,
    p: Registers<T, STEPS>,
    o: Accumulator<1, O_COLUMNS>,
}

impl<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
> Consumer<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, CAUSAL>
{
    const TURN: Turns<1, GROUPS, WARPGROUP> = Turns;

    /// Before the first tile.
    #[inline(always)]
    #[track_caller]
    fn new(memory: Memory<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>, group: u32, softmax_scale: f32) -> Self {
        if group + 1 == GROUPS {
            Self::TURN.pass(group);
        }
        Consumer {
            memory,
            group,
            rows: Rows { first: group * GROUP_ROWS, block_n: BLOCK_N as u32 },
            queries: memory.queries.consumer_at(group),
            keys: memory.keys.consumer(),
            values: memory.values.consumer(),
            scale: softmax_scale * LOG2_E,
            softmax: RowSoftmax::EMPTY,
            p: Registers::zero(),
            o: Accumulator::zero(),
        }
    }

    /// Algorithm 2 for each tile. S of a block of keys is in flight together with the O of the one before it.
    #[inline(always)]
    #[track_caller]
    fn run(mut self, a: &Attention<T>, mut tiles: Tiles<CAUSAL>) {
        let mut next = tiles.next(a);
        while let Some(tile) = next {
            (self.softmax, self.o) = (RowSoftmax::EMPTY, Accumulator::zero());
            let Blocks { begin, full_end, end, .. } = tile.blocks;
            if begin < end {
                let mut block = end - 1;
                self.first(a, &tile, block);
                while CAUSAL && block > begin && block > full_end {
                    block -= 1;
                    self.step(a, &tile, block, true);
                }
                while block > begin {
                    block -= 1;
                    self.step(a, &tile, block, false);
                }
                next = self.last(a, &mut tiles);
            } else {
                next = tiles.next(a);
            }
            self.rows.store(a, &tile, self.softmax, &mut self.o);
        }
        if self.group == 0 {
            Self::TURN.take(self.group);
        }
    }

    /// P of the first block.
    #[inline(always)]
    #[track_caller]
    fn first(&mut self, a: &Attention<T>, tile: &Tile, block: u32) {
        self.queries.wait();
        let k = self.keys.wait();
        self.keys.advance();
        Self::TURN.take(self.group);
        let s = self.product_with(k);
        Self::TURN.pass(self.group);
        let mut s = s.wait::<0>();
        release(k);
        self.rows.hide(a, tile, block, &mut s);
        self.softmax.take_lazily(&mut s, self.scale);
        self.p = Registers::of(&s);
    }

    /// O += P V of the block before, and P of this one.
    #[inline(always)]
    #[track_caller]
    fn step(&mut self, a: &Attention<T>, tile: &Tile, block: u32, is_partial: bool) {
        let k = self.keys.wait();
        self.keys.advance();
        Self::TURN.take(self.group);
        let s = self.product_with(k);
        let v = self.values.wait();
        let o = wgmma::add_product(self.o, self.p, self.memory.v.stage(v.index).columns(0));
        Self::TURN.pass(self.group);
        let mut s = s.wait::<1>();
        release(k);
        if is_partial {
            self.rows.hide(a, tile, block, &mut s);
        }
        let rescale = self.softmax.take_lazily(&mut s, self.scale);
        // The exponentials and their sums stay before the wait: the assembler moves it up to the next barrier, and sums
        // down below it. This is a barrier, and needs the sums.
        wgmma::pin(&mut s);
        self.values.wait_once(self.softmax.sums());
        self.values.advance();
        self.o = o.wait::<0>();
        wgmma::pin(&mut s);
        release(v);
        self.p = Registers::of(&s);
        rescale.apply_if_any(&mut self.o);
    }

    /// O += P V of the last block. The next tile is looked up meanwhile.
    #[inline(always)]
    #[track_caller]
    fn last(&mut self, a: &Attention<T>, tiles: &mut Tiles<CAUSAL>) -> Option<Tile> {
        release(self.queries.slot());
        self.queries.next_round();
        let v = self.values.wait();
        self.values.advance();
        let o = wgmma::add_product(self.o, self.p, self.memory.v.stage(v.index).columns(0));
        let next = tiles.next(a);
        self.o = o.wait::<0>();
        release(v);
        next
    }

    /// S = Q Kᵀ, in flight.
    #[inline(always)]
    #[track_caller]
    fn product_with(&self, k: Slot<STAGES>) -> InFlight<S_COLUMNS> {
        wgmma::product(self.memory.q.stage(self.group).rows(0), self.memory.k.stage(k.index).rows(0))
    }
}

/// The rows of a tile that a consumer warpgroup has, from `first` on.
#[derive(Clone, Copy)]
struct Rows<const CAUSAL: bool> {
    first: u32,
    block_n: u32,
}

impl<const CAUSAL: bool> Rows<CAUSAL> {
    /// Sets the scores of keys that rows do not see to -inf.
    #[inline(always)]
    #[track_caller]
    fn hide<T, const N: usize>(self, a: &Attention<T>, tile: &Tile, block: u32, s: &mut Accumulator<1, N>) {
        let mask = Mask::of::<T, CAUSAL, false>(a, &tile.sequence);
        let first_row = tile.first_row + self.first;
        if mask.key_blocks(first_row, GROUP_ROWS, self.block_n).is_partial(block) {
            mask.apply(s, first_row + 16 * warp_in_group(), block * self.block_n);
        }
    }

    /// O = diag(l)⁻¹ O and LSE = m + log(l), to global memory.
    #[inline(always)]
    #[track_caller]
    fn store<T: PackedElement, const N: usize>(
        self,
        a: &Attention<T>,
        tile: &Tile,
        softmax: RowSoftmax<1>,
        o: &mut Accumulator<1, N>,
    ) {
        let Tile { head, sequence, .. } = tile;
        let first_row = tile.first_row + self.first + 16 * warp_in_group();
        let lse = a.softmax_lse.offset(a.first_row(sequence, *head));
        softmax.finish(o, f32::NEG_INFINITY, |row, state| {
            let row = first_row + row;
            if lane_id().is_multiple_of(4) && row < sequence.seqlen_q {
                lse.store(row as usize, state.lse());
            }
        });
        o.store_rows(sequence.query_matrix(&a.o, *head, first_row, a.headdim_v, true));
    }
}

/// This warp needs a stage no more.
#[inline(always)]
#[track_caller]
fn release<const STAGES: u32>(slot: Slot<STAGES>) {
    if lane_id() == 0 {
        slot.release();
    }
}
