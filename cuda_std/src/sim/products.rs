//! Products of warpgroups. They take effect as late as they may: when the first thread waits for one, it reads its
//! factors in shared memory. To the race detector an agent of each warp reads them, which is known to those alone that
//! have waited: what is written to a factor before is a race.
use super::WARP;
use super::block::{Block, Stop};
use super::boxes::swizzled;
use super::report::FindingKind;
use super::shadow::GRANULE;
use super::site::Site;
use super::unit::Actor;
use super::warpgroups::GROUP;
use crate::tensor::Swizzle;
use std::collections::HashMap;

const ROWS: usize = 64;
const DEPTH: usize = 16;
/// Elements of 16 bytes.
const CHUNK: usize = 8;

/// What a product is added to.
pub(super) enum Summand {
    Zero,
    Matrix(Vec<f32>),
    /// The product of this number, of the same warpgroup.
    Product(u32),
}

/// A left factor.
pub(super) enum LeftFactor {
    Shared(SharedFactor),
    /// 64 rows.
    Matrix(Vec<f32>),
}

/// A factor in shared memory, 16 bytes by 16: by vector and then along it, or the other way round for columns.
pub(super) struct SharedFactor {
    chunks: Vec<u32>,
    columns: bool,
}

/// A matrix descriptor as the tensor cores read it. PTX ISA: "Asynchronous warpgroup level matrix", "Matrix
/// descriptor".
pub(super) struct Descriptor {
    pub low: u32,
    pub high: u32,
}

impl Descriptor {
    fn start(&self) -> u32 {
        (self.low & 0x3fff) << 4
    }

    /// From one panel to the next.
    fn leading_stride(&self) -> u32 {
        (self.low >> 16 & 0x3fff) << 4
    }

    /// From eight rows to the next eight.
    fn stride(&self) -> u32 {
        (self.high & 0x3fff) << 4
    }

    fn swizzle(&self) -> Swizzle {
        [Swizzle::None, Swizzle::Bytes128, Swizzle::Bytes64, Swizzle::Bytes32][(self.high >> 30) as usize]
    }
}

impl SharedFactor {
    /// The factor of `count` vectors, of which each descriptor has 16 elements.
    pub fn new(steps: impl Iterator<Item = Descriptor>, count: usize, columns: bool) -> Self {
        let mut chunks = Vec::new();
        for step in steps {
            let swizzle = step.swizzle();
            let row_bytes = swizzle.row_bytes().expect("tiles are swizzled");
            let at_row = |row: u32| step.start() + row / 8 * step.stride() + row % 8 * row_bytes;
            if columns {
                let in_panel = row_bytes / GRANULE as u32;
                for row in 0..DEPTH as u32 {
                    chunks.extend((0..count.div_ceil(CHUNK) as u32).map(|chunk| {
                        let panel = chunk / in_panel * step.leading_stride();
                        swizzled(swizzle, at_row(row) + panel + chunk % in_panel * GRANULE as u32)
                    }));
                }
            } else {
                for row in 0..count as u32 {
                    chunks.extend((0..2).map(|chunk| swizzled(swizzle, at_row(row) + chunk * GRANULE as u32)));
                }
            }
        }
        SharedFactor { chunks, columns }
    }

    /// The chunks of the vectors from `first` on, `some` of `count`; of columns all.
    fn of_vectors(&self, first: usize, some: usize, count: usize) -> impl Iterator<Item = u32> + '_ {
        let step = self.chunks.len().min(2 * count);
        let is_one = move |index: &usize| self.columns || (first..first + some).contains(&(index % step / 2));
        (0..self.chunks.len()).filter(is_one).map(|index| self.chunks[index])
    }
}

/// A product in flight.
pub(super) struct Product {
    pub summand: Summand,
    pub left: LeftFactor,
    pub right: SharedFactor,
    /// Columns of the sum, and elements of a vector.
    pub columns: usize,
    pub depth: usize,
    pub to_f32: fn(u16) -> f32,
    pub site: Site,
    /// The sum, 64 rows, once it has been computed.
    sum: Option<Vec<f32>>,
    /// What the agents of its warps read in.
    epochs: [u32; 4],
    /// Threads that have waited for it, and those that have taken their part.
    waited: usize,
    taken: usize,
    /// Another product has been added to it, and has taken its sum.
    is_consumed: bool,
}

impl Product {
    pub fn new(summand: Summand, left: LeftFactor, right: SharedFactor, to_f32: fn(u16) -> f32, site: Site) -> Self {
        Product {
            summand,
            left,
            right,
            columns: 0,
            depth: 0,
            to_f32,
            site,
            sum: None,
            epochs: [0; 4],
            waited: 0,
            taken: 0,
            is_consumed: false,
        }
    }
}

/// The products of a block, by number.
#[derive(Default)]
pub(super) struct Products {
    all: Vec<Option<Product>>,
    free: Vec<u32>,
    /// Of each warp that has said one.
    agents: HashMap<usize, usize>,
}

impl Products {
    pub fn clear(&mut self) {
        *self = Products::default();
    }

    fn add(&mut self, product: Product) -> u32 {
        let number = self.free.pop().unwrap_or_else(|| {
            self.all.push(None);
            self.all.len() as u32 - 1
        });
        self.all[number as usize] = Some(product);
        number
    }

    fn get(&mut self, number: u32) -> &mut Product {
        self.all[number as usize].as_mut().expect("a product that is in flight")
    }

    fn remove(&mut self, number: u32) -> Option<Product> {
        self.free.push(number);
        self.all[number as usize].take()
    }
}

/// The rows of a product that element `i` of a thread's registers lies in, and the column.
pub(super) fn position(thread: usize, n: usize, i: usize) -> (usize, usize) {
    let (warp, lane) = (thread / WARP, thread % WARP);
    (16 * warp + lane / 4 + 8 * (i / 2), 8 * n + 2 * (lane % 4) + i % 2)
}

impl Block {
    /// The warpgroup that begins at `first_thread` issues a product: its number.
    pub fn begin_product(&mut self, first_thread: usize, product: Product) -> Result<u32, Stop> {
        let number = self.products.add(product);
        for warp in 0..4 {
            self.read_factors(number, first_thread + warp * WARP)?;
        }
        for thread in first_thread..first_thread + GROUP {
            self.threads[thread].products.push_back(number);
        }
        Ok(number)
    }

    /// The agent of a warp, which its first thread employs, reads the factors of a product.
    fn read_factors(&mut self, number: u32, thread: usize) -> Result<(), Stop> {
        let warp = thread / WARP;
        let site = self.products.get(number).site;
        let mut actor = self.actor(thread, site);
        if self.context.race_detector {
            let agent = *self.products.agents.entry(warp).or_insert_with(|| self.clocks.add_agent());
            self.clocks.employ(agent, self.first_id() + thread);
            actor = Actor::new(agent, site);
        }
        let product = self.products.get(number);
        let mut chunks: Vec<u32> = product.right.chunks.clone();
        if let LeftFactor::Shared(left) = &product.left {
            chunks.extend(left.of_vectors(thread % GROUP / WARP * 16, 16, ROWS));
        }
        for chunk in chunks {
            self.read_shared_async(thread, actor, chunk)?;
        }
        if self.context.race_detector {
            self.products.get(number).epochs[warp % 4] = self.clocks.dismiss(actor.thread());
        }
        Ok(())
    }

    /// The running thread waits until at most `pending` of its products have not ended.
    pub fn wait_for_products(&mut self, pending: usize) {
        let thread = self.current;
        while self.threads[thread].products.len() > pending {
            let Some(number) = self.threads[thread].products.pop_front() else { break };
            if self.products.get(number).sum.is_none() {
                self.compute(number);
            }
            let warp = thread / WARP;
            if self.context.race_detector {
                let (agent, epoch) = (self.products.agents[&warp], self.products.get(number).epochs[warp % 4]);
                self.clocks.learn_of(self.first_id() + thread, agent, epoch);
            }
            let product = self.products.get(number);
            product.waited += 1;
            if product.is_consumed && product.waited == GROUP {
                self.products.remove(number);
            }
            self.ready.progress();
        }
    }

    /// The running thread takes what it has of a product.
    pub fn take_product(
        &mut self,
        number: u32,
        site: Site,
        mut element: impl FnMut(usize, usize, f32),
    ) -> Result<(), Stop> {
        let thread = self.current;
        if let Some(place) = self.threads[thread].products.iter().position(|&pending| pending == number) {
            let later = self.threads[thread].products.len() - 1 - place;
            let message = format!("takes a product that may be in flight: only {later} were issued after it");
            let issue = self.products.get(number).site;
            let other = self.party(thread, issue);
            return Err(self.fault(FindingKind::UnfinishedCopy, site, Some(other), message));
        }
        let product = self.products.get(number);
        let sum = product.sum.as_ref().expect("it has been waited for");
        for n in 0..product.columns / 8 {
            for i in 0..4 {
                let (row, column) = position(thread % GROUP, n, i);
                element(n, i, sum[row * product.columns + column]);
            }
        }
        product.taken += 1;
        if product.taken == GROUP {
            self.products.remove(number);
        }
        Ok(())
    }

    /// Computes a product with what shared memory holds now.
    fn compute(&mut self, number: u32) {
        let summand = std::mem::replace(&mut self.products.get(number).summand, Summand::Zero);
        let (columns, depth, to_f32) = {
            let product = self.products.get(number);
            (product.columns, product.depth, product.to_f32)
        };
        let mut sum = match summand {
            Summand::Zero => vec![0.0; ROWS * columns],
            Summand::Matrix(matrix) => matrix,
            Summand::Product(before) => {
                // Products end in their order.
                if self.products.get(before).sum.is_none() {
                    self.compute(before);
                }
                let product = self.products.get(before);
                product.is_consumed = true;
                let sum = product.sum.replace(Vec::new()).expect("it has been computed");
                if product.waited == GROUP {
                    self.products.remove(before);
                }
                sum
            }
        };
        let product = self.products.all[number as usize].as_ref().expect("a product that is in flight");
        let right = gather(&mut self.shared, &product.right, columns, depth, to_f32);
        let left = match &product.left {
            LeftFactor::Matrix(matrix) => matrix,
            LeftFactor::Shared(factor) => {
                &transposed(&gather(&mut self.shared, factor, ROWS, depth, to_f32), depth, ROWS)
            }
        };
        for (left, sum) in left.chunks_exact(depth).zip(sum.chunks_exact_mut(columns)) {
            for (&x, right) in left.iter().zip(right.chunks_exact(columns)) {
                sum.iter_mut().zip(right).for_each(|(sum, y)| *sum += x * y);
            }
        }
        self.traffic.tally.flops.tensor += (2 * ROWS * columns * depth) as u64;
        self.products.get(number).sum = Some(sum);
    }

    /// The running thread has exited: nobody is to wait for its products.
    pub fn leave_products(&mut self) {
        if let Some(&number) = self.threads[self.current].products.front() {
            let site = self.products.get(number).site;
            let message = "exits with a product of its warpgroup in flight".to_owned();
            self.report(FindingKind::UnfinishedCopy, site, None, message);
        }
    }
}

/// A factor as a matrix of `depth` rows and `count` columns: a column a vector.
fn gather(
    shared: &mut super::shared_memory::SharedMemory,
    factor: &SharedFactor,
    count: usize,
    depth: usize,
    to_f32: fn(u16) -> f32,
) -> Vec<f32> {
    let mut matrix = vec![0.0; depth * count];
    let per_step = factor.chunks.len() / (depth / DEPTH);
    for (index, &address) in factor.chunks.iter().enumerate() {
        // SAFETY: the chunk was read when the product was issued, which has checked that it lies in shared memory.
        let chunk = unsafe { shared.data(address).cast::<[u16; CHUNK]>().read_unaligned() };
        let (step, within) = (index / per_step * DEPTH, index % per_step);
        for (i, bits) in chunk.into_iter().enumerate() {
            let (k, vector) = if factor.columns {
                let in_row = per_step / DEPTH;
                (step + within / in_row, within % in_row * CHUNK + i)
            } else {
                (step + within % 2 * CHUNK + i, within / 2)
            };
            matrix[k * count + vector] = to_f32(bits);
        }
    }
    matrix
}

fn transposed(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|i| matrix[i % rows * columns + i / rows]).collect()
}
