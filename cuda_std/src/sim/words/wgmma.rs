//! Products of a warpgroup.
use super::super::block::{Block, here, unless_stopped, with};
use super::super::products::{Descriptor, LeftFactor, Product, SharedFactor, Summand, position};
use super::super::rendezvous::{Word, meet as meet_warp};
use super::super::warpgroups::{GROUP, GroupMeeting, GroupWord, meet};
use super::product::to_f32;
use crate::matrix::{Format, PackedElement};
use crate::wgmma::{DEPTH, ROWS, Right};

/// What a product is added to.
pub struct Sum<const N: usize>(ThreadSum<N>);

#[derive(Clone, Copy)]
enum ThreadSum<const N: usize> {
    Zero,
    Registers([[f32; 4]; N]),
    Flight(u32),
}

impl<const N: usize> Sum<N> {
    pub(crate) fn zero() -> Self {
        Sum(ThreadSum::Zero)
    }

    pub(crate) fn from_registers(registers: [[f32; 4]; N]) -> Self {
        Sum(ThreadSum::Registers(registers))
    }

    pub(crate) fn from_flight(flight: Flight<N>) -> Self {
        Sum(ThreadSum::Flight(flight.0))
    }
}

/// The number of a product of the block.
pub struct Flight<const N: usize>(u32);

/// What a thread brings to a product, and takes from it. The left factor is in registers if there are any.
struct Operand<'a, const N: usize> {
    sum: ThreadSum<N>,
    left: &'a [[u32; 4]],
    number: u32,
}

fn factor<T: PackedElement, V: Right<T>>(vectors: V, count: usize) -> SharedFactor {
    let step = |step| Descriptor { low: vectors.descriptor_low(step), high: V::DESCRIPTOR_HIGH };
    SharedFactor::new((0..V::LENGTH / DEPTH).map(step), count, V::COLUMNS)
}

#[track_caller]
pub(crate) fn wgmma_shared<T: PackedElement, A: Right<T>, B: Right<T>, const N: usize>(
    sum: Sum<N>,
    a: A,
    b: B,
) -> Flight<N> {
    multiply::<T, B, N>(sum, &[], b, |_| LeftFactor::Shared(factor::<T, A>(a, ROWS as usize)))
}

#[track_caller]
pub(crate) fn wgmma_registers<T: PackedElement, const STEPS: usize, B: Right<T>, const N: usize>(
    sum: Sum<N>,
    a: [[u32; 4]; STEPS],
    b: B,
) -> Flight<N> {
    multiply::<T, B, N>(sum, &a, b, |meeting| {
        let depth = DEPTH * STEPS;
        let mut matrix = vec![0.0; ROWS as usize * depth];
        for thread in 0..GROUP {
            let registers = meeting.operand(thread).left;
            for (step, fragment) in registers.iter().enumerate() {
                for (i, &pair) in fragment.iter().enumerate() {
                    // An accumulator's blocks lie in the lanes as the blocks of a left operand do.
                    let (row, column) = position(thread, 2 * step + i / 2, 2 * (i % 2));
                    matrix[row * depth + column] = to_f32::<T>(pair as u16);
                    matrix[row * depth + column + 1] = to_f32::<T>((pair >> 16) as u16);
                }
            }
        }
        LeftFactor::Matrix(matrix)
    })
}

#[track_caller]
fn multiply<T: PackedElement, B: Right<T>, const N: usize>(
    sum: Sum<N>,
    left: &[[u32; 4]],
    b: B,
    left_factor: impl FnOnce(&mut GroupMeeting<Operand<'_, N>>) -> LeftFactor,
) -> Flight<N> {
    let (columns, depth) = (8 * N, B::LENGTH);
    let word = GroupWord::Product { columns: columns as u16, depth: depth as u16, bf16: T::FORMAT == Format::BF16 };
    let site = here();
    let mut operand = Operand { sum: sum.0, left, number: 0 };
    meet(word, site, &mut operand, |block: &mut Block, meeting| {
        let left = left_factor(meeting);
        let mut product = Product::new(summand(meeting), left, factor::<T, B>(b, columns), to_f32::<T>, site);
        (product.columns, product.depth) = (columns, depth);
        let number = block.begin_product(meeting.first_thread, product)?;
        (0..GROUP).for_each(|thread| meeting.operand(thread).number = number);
        Ok(())
    });
    Flight(operand.number)
}

/// What all threads of the warpgroup bring together.
fn summand<const N: usize>(meeting: &mut GroupMeeting<Operand<'_, N>>) -> Summand {
    match meeting.operand(0).sum {
        ThreadSum::Zero => Summand::Zero,
        ThreadSum::Flight(number) => Summand::Product(number),
        ThreadSum::Registers(_) => {
            let mut matrix = vec![0.0; ROWS as usize * 8 * N];
            for thread in 0..GROUP {
                let ThreadSum::Registers(registers) = &meeting.operand(thread).sum else { continue };
                for (n, block) in registers.iter().enumerate() {
                    for (i, &x) in block.iter().enumerate() {
                        let (row, column) = position(thread, n, i);
                        matrix[row * 8 * N + column] = x;
                    }
                }
            }
            Summand::Matrix(matrix)
        }
    }
}

#[track_caller]
pub(crate) fn wgmma_wait<const PENDING: usize, const N: usize>(flight: Flight<N>) -> [[f32; 4]; N] {
    let site = here();
    let mut registers = [[0.0; 4]; N];
    // Lanes wait together (`.sync.aligned`): what one does afterwards, all have done what comes before.
    meet_warp(Word::WaitForProducts { pending: PENDING as u8 }, u32::MAX, site, &mut (), |_, _| Ok(()));
    unless_stopped(with(|block| {
        block.wait_for_products(PENDING);
        block.take_product(flight.0, site, |n, i, x| registers[n][i] = x)
    }));
    registers
}

#[inline(always)]
pub(crate) fn pin<const N: usize>(_: &mut [[f32; 4]; N]) {}
