//! A job queue: a bounded number of threads that share one bounded queue of jobs.

use std::fmt;
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Sender, TrySendError};

use crate::error::dispose;

/// Runs jobs of type `T` on its own threads, so that slow work does not block an event loop.
///
/// The threads share the jobs: an idle thread takes the oldest one, so a slow job delays no other as long as
/// a thread is idle. Jobs that run on different threads can end in any order.
///
/// Dropping the queue runs the jobs that were pushed, then joins the threads. A job that panics ends neither its
/// thread nor the other jobs; the number of panics is logged when the queue is dropped.
///
/// A handler must not wait for the queue. If [`try_push`](Self::try_push) refuses a job, it leaves the request in its
/// input, sets its timer and returns [`Action::Pending`](crate::Action::Pending):
///
/// ```
/// # use std::time::Duration;
/// # use echoserver::{Action, Context, WorkQueue};
/// /// Pushes each byte of the input as a job.
/// fn push_all(queue: &WorkQueue<u8>, context: &mut Context<'_>) -> Action {
///     while let Some(&request) = context.input.data().first() {
///         if queue.try_push(request).is_err() {
///             context.set_timer(Some(Duration::from_millis(10)));
///             return Action::Pending; // While `input` is full, nothing is read from the client.
///         }
///         context.input.consume(1);
///     }
///     Action::Continue
/// }
/// ```
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use echoserver::WorkQueue;
///
/// let sum = Arc::new(AtomicU64::new(0));
/// let total = Arc::clone(&sum);
/// let queue = WorkQueue::new(2, 16, move |job: u64| {
///     total.fetch_add(job, Ordering::Relaxed);
/// })?;
/// for job in 1..=100 {
///     queue.push(job);
/// }
/// drop(queue);
/// assert_eq!(sum.load(Ordering::Relaxed), 5050);
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct WorkQueue<T> {
    /// `None` only while it is dropped.
    jobs: Option<Sender<T>>,
    threads: Vec<JoinHandle<()>>,
    panics: Arc<AtomicUsize>,
}

impl<T: Send + 'static> WorkQueue<T> {
    /// Creates a queue of at most `capacity` waiting jobs, and starts `threads` threads that call `run` for
    /// each job. With a capacity of 0, a job is accepted only when a thread is ready to run it.
    ///
    /// # Errors
    ///
    /// Fails if a thread cannot be started, and with [`InvalidInput`](ErrorKind::InvalidInput) if `threads` is 0.
    pub fn new(
        threads: usize,
        capacity: usize,
        run: impl Fn(T) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        if threads == 0 {
            return Err(io::Error::new(ErrorKind::InvalidInput, "no threads"));
        }
        let (sender, jobs) = crossbeam_channel::bounded::<T>(capacity);
        let run = Arc::new(run);
        let mut queue = Self {
            jobs: Some(sender),
            threads: Vec::new(),
            panics: Arc::default(),
        };
        for index in 0..threads {
            let (jobs, run, panics) = (jobs.clone(), Arc::clone(&run), Arc::clone(&queue.panics));
            let work = move || {
                for job in jobs {
                    // Already reported by the panic hook.
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(job))) {
                        panics.fetch_add(1, Ordering::Relaxed);
                        dispose(panic);
                    }
                }
            };
            let thread = thread::Builder::new().name(format!("job-{index}"));
            queue.threads.push(thread.spawn(work)?);
        }
        Ok(queue)
    }

    /// Adds a job. Waits while the queue is full, so a handler must not call this: see
    /// [`try_push`](Self::try_push). Nor must a job that pushes to its own queue: if all threads wait in such jobs, none takes
    /// the next job, and they wait for ever.
    pub fn push(&self, job: T) {
        if let Some(jobs) = &self.jobs {
            // The threads live as long as the queue, so a job is never refused.
            let _accepted = jobs.send(job);
        }
    }

    /// Adds a job without waiting.
    ///
    /// # Errors
    ///
    /// Returns the job if the queue is full.
    pub fn try_push(&self, job: T) -> Result<(), T> {
        match &self.jobs {
            Some(jobs) => jobs.try_send(job).map_err(TrySendError::into_inner),
            None => Err(job),
        }
    }
}

impl<T> Drop for WorkQueue<T> {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            // A job can hold the last reference to its queue, and cannot wait for itself.
            if thread.thread().id() != thread::current().id() {
                // The threads contain panics of jobs.
                let _panicked = thread.join();
            }
        }
        let panics = self.panics.load(Ordering::Relaxed);
        if panics > 0 {
            log::warn!("{panics} jobs of a work queue have panicked");
        }
    }
}

impl<T> fmt::Debug for WorkQueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (threads, waiting) = (
            self.threads.len(),
            self.jobs.as_ref().map_or(0, Sender::len),
        );
        write!(f, "WorkQueue({threads} threads, {waiting} waiting jobs)")
    }
}

#[cfg(test)]
mod tests;
