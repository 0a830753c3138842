//! Matrices between shared memory and the registers of a warp.
use super::super::WARP;
use super::super::block::{Block, Stop, here};
use super::super::rendezvous::{Word, meet};
use super::super::site::Site;
use super::super::unit::Use;

/// Bytes of a row of a matrix.
const ROW: u32 = 16;

/// What a lane brings to `ldmatrix`, and takes from it.
struct Loaded<const N: usize> {
    rows: [u32; N],
    matrices: [[u32; 4]; N],
}

#[inline(always)]
#[track_caller]
pub(crate) fn ldmatrix<const N: usize, const TRANS: bool>(rows: [u32; N]) -> [[u32; 4]; N] {
    let (word, site) = (Word::Ldmatrix { count: N as u8, trans: TRANS }, here());
    let mut operand = Loaded { rows, matrices: [[0; 4]; N] };
    meet(word, u32::MAX, site, &mut operand, |block, meeting| {
        for i in 0..N {
            for m in 0..4 {
                let addresses = std::array::from_fn(|row| meeting.operand(m * 8 + row).rows[i]);
                let matrix = load_matrix(block, meeting.first_thread + m * 8, addresses, site)?;
                let matrix = if TRANS { transpose(matrix) } else { matrix };
                for lane in 0..WARP {
                    let (row, column) = (lane / 4, lane % 4 * 2);
                    let pair = matrix[row][column] as u32 | (matrix[row][column + 1] as u32) << 16;
                    meeting.operand(lane).matrices[i][m] = pair;
                }
            }
        }
        Ok(())
    });
    operand.matrices
}

#[inline(always)]
#[track_caller]
pub(crate) fn stmatrix<const N: usize, const TRANS: bool>(rows: [u32; N], matrices: [[u32; 4]; N]) {
    let (word, site) = (Word::Stmatrix { count: N as u8, trans: TRANS }, here());
    meet(word, u32::MAX, site, &mut Loaded { rows, matrices }, |block, meeting| {
        for i in 0..N {
            for m in 0..4 {
                let mut matrix = [[0; 8]; 8];
                for lane in 0..WARP {
                    let pair = meeting.operand(lane).matrices[i][m];
                    let (row, column) = (lane / 4, lane % 4 * 2);
                    [matrix[row][column], matrix[row][column + 1]] = [pair as u16, (pair >> 16) as u16];
                }
                let matrix = if TRANS { transpose(matrix) } else { matrix };
                let addresses = std::array::from_fn(|row| meeting.operand(m * 8 + row).rows[i]);
                store_matrix(block, meeting.first_thread + m * 8, addresses, matrix, site)?;
            }
        }
        Ok(())
    });
}

/// An 8 x 8 matrix whose rows the threads from `first_thread` on give the addresses of.
#[inline(always)]
pub(super) fn load_matrix(
    block: &mut Block,
    first_thread: usize,
    rows: [u32; 8],
    site: Site,
) -> Result<[[u16; 8]; 8], Stop> {
    let mut matrix = [[0; 8]; 8];
    for (i, address) in rows.into_iter().enumerate() {
        let data = block.use_shared(first_thread + i, address, ROW, Use::Read, site)?;
        // SAFETY: `use_shared` has checked that 16 bytes lie there.
        matrix[i] = unsafe { data.cast::<[u16; 8]>().read_unaligned() };
    }
    block.count_matrix(&rows, Use::Read, site);
    Ok(matrix)
}

fn store_matrix(
    block: &mut Block,
    first_thread: usize,
    rows: [u32; 8],
    matrix: [[u16; 8]; 8],
    site: Site,
) -> Result<(), Stop> {
    for (i, address) in rows.into_iter().enumerate() {
        let data = block.use_shared(first_thread + i, address, ROW, Use::Write, site)?;
        // SAFETY: `use_shared` has checked that 16 bytes lie there.
        unsafe { data.cast::<[u16; 8]>().write_unaligned(matrix[i]) };
    }
    block.count_matrix(&rows, Use::Write, site);
    Ok(())
}

#[inline(always)]
pub(super) fn transpose(matrix: [[u16; 8]; 8]) -> [[u16; 8]; 8] {
    std::array::from_fn(|row| std::array::from_fn(|column| matrix[column][row]))
}
