//! Work that may block, on a thread of its own; its result comes back to the control thread.

use std::sync::{Arc, Mutex, PoisonError};

use engine::App;
use reactor::{Handle, Turn};

/// Runs `work` on a new thread and then `then` on the control thread. If there is no thread for it, `work` runs here: it
/// blocks the control thread, but nothing is lost.
pub(super) fn run<T: Send + 'static>(
    control: &Handle,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
    then: impl FnOnce(&mut App, &mut Turn<'_>, T) + Send + 'static,
) {
    let handle = control.clone();
    let job: Job = Box::new(move || {
        let result = work();
        App::send(&handle, move |app, cx| then(app, cx, result));
    });
    // Outside of the thread's closure, so that the job is still there if there is no thread.
    let job = Arc::new(Mutex::new(Some(job)));
    let shared = job.clone();
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(move || do_once(&shared));
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for a blocking call; the control thread waits for it");
        do_once(&job);
    }
}

type Job = Box<dyn FnOnce() + Send>;

fn do_once(job: &Mutex<Option<Job>>) {
    let job = job.lock().unwrap_or_else(PoisonError::into_inner).take();
    job.into_iter().for_each(|job| job());
}
