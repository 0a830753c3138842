//! A bar on the terminal while the simulator works.
use ferroflash::Session;
use indicatif::{ProgressBar, ProgressStyle};

/// Shows which kernel the simulator runs, and how many of its blocks are done; on stderr, and on a terminal only. The bar
/// goes when this is dropped.
pub struct SimulationBar(ProgressBar);

impl SimulationBar {
    /// The session, whose work a bar now shows.
    pub fn on(session: Session) -> (Session, SimulationBar) {
        const LOOK: &str = "simulating {msg} [{bar:30}] {pos}/{len} blocks, {elapsed}";
        let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(LOOK).expect("a valid template"));
        let shown = bar.clone();
        let session = session.progress(move |progress| {
            shown.set_length(progress.total);
            shown.set_position(progress.done);
            shown.set_message(progress.entry);
        });
        (session, SimulationBar(bar))
    }
}

impl Drop for SimulationBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
