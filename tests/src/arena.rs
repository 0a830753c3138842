//! One allocation in which all tensors of a problem lie: as large as is asked for, though the host holds no more than what is
//! written.
use std::ptr::null_mut;

use cust::context::Context;
use cust::memory::{CopyDestination, DevicePointer, DeviceSlice};
use ferroflash::cuda::{Device, DeviceTensor};
use ferroflash::raw::{BackwardCall, Call, RawTensor};
use ferroflash::{Error, Layout, SimulatorOptions, Tensor, sim};

use crate::guarded;
use crate::pointers::Machine;

/// An allocation of a machine, all of whose bits are set where nothing was written: NaN in every dtype.
pub struct Arena(Memory);

enum Memory {
    Gpu {
        tensor: DeviceTensor<u8>,
        device: &'static Device,
        /// The device's primary one, which copies want to be current.
        _context: Context,
    },
    Simulator {
        memory: sim::Memory,
        buffer: sim::Buffer<u8>,
    },
}

/// A tensor in an arena.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The byte at which its first element begins.
    pub at: usize,
    /// Its dtype, shape and strides.
    pub layout: Layout,
}

impl Placed {
    /// Where its elements lie, in row-major order: (byte, bytes) of as many as follow each other.
    fn runs(&self) -> Vec<(usize, usize)> {
        let size = self.layout.dtype().bytes();
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for place in guarded::places(&self.layout) {
            let at = self.at + place;
            match runs.last_mut() {
                Some((first, bytes)) if *first + *bytes == at => *bytes += size,
                _ => runs.push((at, size)),
            }
        }
        runs
    }

    /// The part that begins at element `first` of each dimension and has this shape.
    pub fn part(&self, first: &[usize], shape: &[usize]) -> Self {
        let elements: usize = first.iter().zip(self.layout.strides()).map(|(first, stride)| first * stride).sum();
        let layout = Layout::strided(self.layout.dtype(), shape, self.layout.strides()).expect("as many dimensions");
        Placed { at: self.at + elements * self.layout.dtype().bytes(), layout }
    }
}

impl Arena {
    /// So many bytes, with these tensors in them.
    ///
    /// # Errors
    /// Why there is no room.
    pub fn new(machine: Machine, bytes: usize, tensors: &[(Placed, Tensor)]) -> Result<Self, Error> {
        Self::holding(machine, bytes, |write| {
            for (placed, tensor) in tensors {
                let mut rest = tensor.bytes();
                for (at, bytes) in placed.runs() {
                    let (run, after) = rest.split_at(bytes);
                    write(at, run);
                    rest = after;
                }
            }
        })
    }

    /// So many bytes, with what is written into them: the byte to begin at, and the bytes.
    ///
    /// # Errors
    /// Why there is no room.
    pub fn holding(
        machine: Machine,
        bytes: usize,
        contents: impl FnOnce(&mut dyn FnMut(usize, &[u8])),
    ) -> Result<Self, Error> {
        Ok(Arena(match machine {
            Machine::Gpu(device) => {
                let ordinal = cust::device::Device::get_device(device.info().ordinal).expect("it was found");
                let context = Context::new(ordinal).expect("it has a primary context");
                let tensor = DeviceTensor::uninitialised(device, &[bytes])?;
                // SAFETY: the allocation is so large, and nothing else uses it.
                unsafe { slice(&tensor, 0, bytes) }.set_8(0xff).expect("its memory");
                contents(&mut |at, run| {
                    // SAFETY: as before; that the run lies within it is asserted.
                    unsafe { slice(&tensor, at, run.len()) }.copy_from(run).expect("its memory");
                });
                Memory::Gpu { tensor, device, _context: context }
            }
            Machine::Simulator => {
                let mut image = vec![0xff; bytes];
                contents(&mut |at, run| image[at..at + run.len()].copy_from_slice(run));
                let memory = sim::Memory::new();
                let buffer = memory.upload("arena", &image);
                Memory::Simulator { memory, buffer }
            }
        }))
    }

    /// The tensor that kernels find there.
    pub fn raw(&self, placed: &Placed) -> RawTensor {
        let address = match &self.0 {
            Memory::Gpu { tensor, .. } => tensor.address(),
            Memory::Simulator { buffer, .. } => buffer.global().address(),
        };
        RawTensor { address: address + placed.at as u64, layout: placed.layout.clone() }
    }

    /// What these tensors hold.
    pub fn read<const N: usize>(&self, tensors: [&Placed; N]) -> [Tensor; N] {
        let image = match &self.0 {
            Memory::Gpu { .. } => Vec::new(),
            Memory::Simulator { memory, buffer } => memory.read(buffer),
        };
        tensors.map(|placed| {
            let mut bytes = Vec::new();
            for (at, len) in placed.runs() {
                match &self.0 {
                    Memory::Gpu { tensor, .. } => {
                        let mut run = vec![0; len];
                        // SAFETY: it lies within the allocation, as is asserted, and launches are waited for.
                        unsafe { slice(tensor, at, len) }.copy_to(&mut run).expect("its memory");
                        bytes.extend(run);
                    }
                    Memory::Simulator { .. } => bytes.extend_from_slice(&image[at..at + len]),
                }
            }
            Tensor::from_bytes(placed.layout.dtype(), &bytes, placed.layout.shape()).expect("as many")
        })
    }

    /// Runs a forward pass of tensors in it, in a workspace of its own.
    ///
    /// # Errors
    /// What the machine says.
    pub fn forward(&self, call: &Call) -> Result<(), Error> {
        self.with_workspace(
            call.workspace_bytes(),
            // SAFETY: all tensors lie in the arena, whose layouts were made for it; the launches are waited for.
            |device, workspace| unsafe { call.launch(device, workspace, null_mut()) }.map(drop),
            |memory, workspace| call.simulate(memory, workspace, &SimulatorOptions::default()).map(drop),
        )
    }

    /// Runs a backward pass likewise.
    ///
    /// # Errors
    /// What the machine says.
    pub fn backward(&self, call: &BackwardCall) -> Result<(), Error> {
        self.with_workspace(
            call.workspace_bytes(),
            // SAFETY: as above.
            |device, workspace| unsafe { call.launch(device, workspace, null_mut()) }.map(drop),
            |memory, workspace| call.simulate(memory, workspace, &SimulatorOptions::default()).map(drop),
        )
    }

    /// Launches or simulates with the address of a workspace, and waits.
    fn with_workspace(
        &self,
        bytes: u64,
        launch: impl FnOnce(&'static Device, u64) -> Result<(), Error>,
        simulate: impl FnOnce(&sim::Memory, u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match &self.0 {
            Memory::Gpu { device, .. } => {
                let workspace = DeviceTensor::<u8>::uninitialised(device, &[bytes as usize])?;
                launch(device, workspace.address())?;
                wait()
            }
            Memory::Simulator { memory, .. } => {
                let workspace = memory.allocate::<u8>("workspace", bytes as usize);
                simulate(memory, workspace.global().address())
            }
        }
    }
}

/// Waits for all launches, before what they work in goes.
fn wait() -> Result<(), Error> {
    cust::context::CurrentContext::synchronize().expect("no kernel fails");
    Ok(())
}

/// Bytes of a tensor.
///
/// # Safety
/// No launch uses them meanwhile. The tensor's context is current.
unsafe fn slice(tensor: &DeviceTensor<u8>, at: usize, bytes: usize) -> DeviceSlice<u8> {
    assert!(at + bytes <= tensor.shape()[0], "{bytes} bytes from byte {at} on of {:?}", tensor.shape());
    // SAFETY: they are in the allocation.
    unsafe { DeviceSlice::from_raw_parts(DevicePointer::from_raw(tensor.address() + at as u64), bytes) }
}
