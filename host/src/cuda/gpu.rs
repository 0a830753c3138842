//! Launches for host tensors.
use std::marker::PhantomData;

use cuda_std::Global;
use cust::event::{Event, EventFlags};
use cust::stream::{Stream, StreamFlags};

use super::codes::through_cust;
use super::context::Entered;
use super::device::Device;
use super::memory::DeviceMemory;
use crate::element::Datum;
use crate::error::Result;
use crate::launch::Launch;
use crate::machine::Machine;
use crate::report::LaunchReport;
use crate::target::Resources;

/// A device, for one call: its context is current as long as this lives.
pub struct Gpu {
    device: &'static Device,
    stream: Stream,
    entered: Entered<'static>,
}

/// `len` elements of device memory.
pub struct GpuBuffer<T> {
    memory: DeviceMemory,
    element: PhantomData<T>,
}

impl Gpu {
    pub fn new(device: &'static Device) -> Result<Self> {
        let entered = device.enter()?;
        let stream = through_cust("cuStreamCreate", Stream::new(StreamFlags::DEFAULT, None))?;
        Ok(Gpu { device, stream, entered })
    }
}

impl Machine for Gpu {
    type Buffer<T: Datum> = GpuBuffer<T>;

    fn upload<T: Datum>(&self, name: &'static str, data: &[T]) -> Result<GpuBuffer<T>> {
        let mut buffer = self.allocate(name, data.len())?;
        buffer.memory.copy_from(bytemuck::cast_slice(data))?;
        Ok(buffer)
    }

    fn allocate<T: Datum>(&self, name: &'static str, len: usize) -> Result<GpuBuffer<T>> {
        Ok(GpuBuffer { memory: DeviceMemory::allocate::<T>(self.device, name, len)?, element: PhantomData })
    }

    fn output<T: Datum>(&self, name: &'static str, len: usize) -> Result<GpuBuffer<T>> {
        let mut buffer = self.allocate(name, len)?;
        buffer.memory.fill_with_ones()?;
        Ok(buffer)
    }

    fn global<T: Datum>(&self, buffer: &GpuBuffer<T>) -> Global<T> {
        // SAFETY: the allocation lives as long as the buffer, which the launches of a call do not outlive.
        unsafe { Global::from_address(buffer.memory.address()) }
    }

    fn download<T: Datum>(&self, buffer: &GpuBuffer<T>, to: &mut [T]) -> Result<()> {
        buffer.memory.copy_to(bytemuck::cast_slice_mut(to))
    }

    fn resources(&self) -> Resources {
        self.device.resources(&self.entered)
    }

    fn run(&self, launches: &[Launch]) -> Result<(Vec<LaunchReport>, f64)> {
        self.device.load(launches, &self.entered)?;
        let event = || through_cust("cuEventCreate", Event::new(EventFlags::DEFAULT));
        let (start, end) = (event()?, event()?);
        through_cust("cuEventRecord", start.record(&self.stream))?;
        let stream = self.stream.as_inner().cast();
        for launch in launches {
            // SAFETY: the parameters point to this call's buffers, sized from the same problem; they live until the stream
            // has been waited for, also if a launch fails.
            if let Err(error) = unsafe { self.device.launch(launch, stream, &self.entered) } {
                through_cust("cuStreamSynchronize", self.stream.synchronize())?;
                return Err(error);
            }
        }
        through_cust("cuEventRecord", end.record(&self.stream))?;
        through_cust("cuStreamSynchronize", self.stream.synchronize())?;
        let milliseconds = through_cust("cuEventElapsedTime", end.elapsed_time_f32(&start))?;
        Ok((launches.iter().map(Launch::report).collect(), f64::from(milliseconds) * 1e-3))
    }
}
