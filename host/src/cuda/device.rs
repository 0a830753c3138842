//! GPUs.
use std::sync::{Mutex, PoisonError};

use cust::CudaFlags;
use cust::device::DeviceAttribute;
use cust::error::CudaError;
use driver::calls::{Handle, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, cuDeviceGetAttribute, cuLaunchKernel};

use super::codes::{check, error, through_cust};
use super::context::{Entered, PrimaryContext};
use super::modules::Modules;
use super::tensor_map;
use crate::error::{Error, Result};
use crate::launch::Launch;
use crate::ptx;
use crate::target::{Resources, Target};

/// The oldest GPUs that any kernel here runs on.
const OLDEST: (u32, u32) = (8, 0);

/// What the driver says about a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its number, from 0.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Its compute capability: (9, 0) for `sm_90`.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Memory in bytes.
    pub total_memory: u64,
    /// Shared memory that one block may have, in bytes.
    pub shared_memory_per_block: u32,
}

/// A GPU that the kernels run on, with its primary context and the kernels that have been loaded.
///
/// There is one for each GPU, made when it is first asked for and kept until the program ends.
#[derive(Debug)]
pub struct Device {
    info: DeviceInfo,
    context: PrimaryContext,
    modules: Modules,
}

/// All GPUs that the driver finds, also those that the kernels do not run on.
///
/// # Errors
/// [`Error::NoDriver`], or [`Error::Driver`] if the driver does not start. Without a GPU it is an empty list.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    (0..count()?).map(|ordinal| DeviceInfo::read(ordinal).map(|(info, _)| info)).collect()
}

/// The newest CUDA version that the driver supports: (13, 0).
///
/// # Errors
/// [`Error::NoDriver`], or [`Error::Driver`].
pub fn driver_version() -> Result<(u32, u32)> {
    loaded()?;
    let version = through_cust("cuDriverGetVersion", cust::CudaApiVersion::get())?;
    Ok((version.major() as u32, version.minor() as u32))
}

impl Device {
    /// GPU `ordinal`.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoDevice`], [`Error::UnsupportedArchitecture`], [`Error::NoKernels`] if none are
    /// embedded, or [`Error::Driver`].
    pub fn get(ordinal: u32) -> Result<&'static Self> {
        static DEVICES: Mutex<Vec<&Device>> = Mutex::new(Vec::new());
        let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = devices.iter().find(|device| device.info.ordinal == ordinal) {
            return Ok(device);
        }
        let device = Box::leak(Box::new(Device::open(ordinal)?));
        devices.push(device);
        Ok(device)
    }

    fn open(ordinal: u32) -> Result<Self> {
        let found = count()?;
        if ordinal >= found {
            return Err(Error::NoDevice { ordinal, found });
        }
        let (info, device) = DeviceInfo::read(ordinal)?;
        if info.compute_capability < OLDEST {
            let (major, minor) = info.compute_capability;
            let allowed = format!("sm_{}{} and newer", OLDEST.0, OLDEST.1);
            return Err(Error::UnsupportedArchitecture {
                device: info.name,
                found: format!("sm_{major}{minor}"),
                allowed,
            });
        }
        if ptx::embedded().is_empty() {
            return Err(Error::NoKernels);
        }
        Ok(Device { info, context: PrimaryContext::retain(device)?, modules: Modules::default() })
    }

    /// What the driver says about it.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What kernels are chosen for on it.
    pub(crate) fn target(&self) -> Target {
        Target::gpu(self.info.compute_capability, self.info.shared_memory_per_block)
    }

    /// What launches need to know of it. The driver makes tensor maps only where a context is current.
    pub(crate) fn resources(&self, _entered: &Entered) -> Resources {
        Resources { multiprocessors: self.info.multiprocessors, tensor_map: tensor_map::encode }
    }

    /// Makes its context current on this thread, for as long as the guard lives.
    pub(crate) fn enter(&self) -> Result<Entered<'_>> {
        self.context.enter()
    }

    /// Loads the kernels of these launches, those that have not been.
    pub(crate) fn load(&self, launches: &[Launch], _entered: &Entered) -> Result<()> {
        launches.iter().try_for_each(|launch| self.modules.function(self, launch.entry, launch.shared_bytes).map(drop))
    }

    /// Puts a launch on a stream.
    ///
    /// # Safety
    /// The launch's parameters point to memory of this device as large as they say, which lives until the kernel has
    /// ended, and `stream` is a stream of the current context, or null for its default one.
    pub(crate) unsafe fn launch(&self, launch: &Launch, stream: Handle, _entered: &Entered) -> Result<()> {
        let Launch { entry, grid, block, shared_bytes, .. } = *launch;
        let function = self.modules.function(self, entry, shared_bytes)?;
        let mut parameters = [launch.parameters().cast_mut()];
        // SAFETY: the kernel takes one struct by value, of the type that `Launch` was made with; the driver copies it.
        let code = unsafe {
            cuLaunchKernel(
                function,
                grid,
                1,
                1,
                block,
                1,
                1,
                shared_bytes,
                stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        if code == driver::SUCCESS { Ok(()) } else { Err(error("cuLaunchKernel", code, format!("of {entry}"))) }
    }
}

impl DeviceInfo {
    fn read(ordinal: u32) -> Result<(Self, cust::device::Device)> {
        let device = through_cust("cuDeviceGet", cust::device::Device::get_device(ordinal))?;
        let attribute =
            |attribute| through_cust("cuDeviceGetAttribute", device.get_attribute(attribute)).map(|x| x as u32);
        let mut shared_memory_per_block = 0;
        // SAFETY: stores an int.
        check("cuDeviceGetAttribute", unsafe {
            cuDeviceGetAttribute(&mut shared_memory_per_block, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device.as_raw())
        })?;
        let info = DeviceInfo {
            ordinal,
            name: through_cust("cuDeviceGetName", device.name())?,
            compute_capability: (
                attribute(DeviceAttribute::ComputeCapabilityMajor)?,
                attribute(DeviceAttribute::ComputeCapabilityMinor)?,
            ),
            multiprocessors: attribute(DeviceAttribute::MultiprocessorCount)?,
            total_memory: through_cust("cuDeviceTotalMem", device.total_memory())? as u64,
            shared_memory_per_block: shared_memory_per_block as u32,
        };
        Ok((info, device))
    }
}

/// How many GPUs there are.
fn count() -> Result<u32> {
    loaded()?;
    match cust::init(CudaFlags::empty()) {
        Ok(()) => through_cust("cuDeviceGetCount", cust::device::Device::num_devices()),
        Err(CudaError::NoDevice) => Ok(0),
        Err(error) => through_cust("cuInit", Err(error)),
    }
}

fn loaded() -> Result<()> {
    match driver::status() {
        driver::Status::Loaded => Ok(()),
        driver::Status::Missing { reason } => Err(Error::NoDriver { reason }),
    }
}
