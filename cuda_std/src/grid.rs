//! Launches that overlap: a kernel may begin before the one that it depends on has ended, if its launch allows it
//! (programmatic dependent launch). Elsewhere, and on the simulated GPU, both words do nothing.
//! PTX ISA: `griddepcontrol`. sm_90.
use crate::machine;

/// Lets the kernels that depend on this one begin: once all its blocks have said so, or ended.
/// PTX ISA: `griddepcontrol.launch_dependents`.
#[inline(always)]
pub fn launch_dependents() {
    machine::launch_dependents();
}

/// Waits until the kernels that this one depends on have ended, and sees what they wrote. PTX ISA:
/// `griddepcontrol.wait`.
#[inline(always)]
pub fn wait_for_prerequisites() {
    machine::wait_for_prerequisites();
}
