//! A job queue: a bounded number of threads that share one bounded queue of jobs.

use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Sender, TrySendError};

use crate::connection::dispose;

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
/// use std::num::NonZeroUsize;
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use echoserver::WorkQueue;
///
/// let two = NonZeroUsize::new(2).unwrap();
/// let sum = Arc::new(AtomicU64::new(0));
/// let total = Arc::clone(&sum);
/// let queue = WorkQueue::new(two, 16, move |job: u64| {
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
    /// Fails if a thread cannot be started.
    pub fn new(
        threads: NonZeroUsize,
        capacity: usize,
        run: impl Fn(T) + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let (sender, jobs) = crossbeam_channel::bounded::<T>(capacity);
        let run = Arc::new(run);
        let mut queue = Self {
            jobs: Some(sender),
            threads: Vec::new(),
            panics: Arc::default(),
        };
        for index in 0..threads.get() {
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
    /// [`try_push`](Self::try_push).
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
        let waiting = self.jobs.as_ref().map_or(0, Sender::len);
        write!(
            f,
            "WorkQueue({} threads, {waiting} waiting jobs)",
            self.threads.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver};
    use std::sync::{Barrier, Mutex};

    use super::*;

    fn threads(count: usize) -> NonZeroUsize {
        NonZeroUsize::new(count).expect("a number of threads")
    }

    /// A queue whose jobs wait until the sender is dropped, once they have told that they run.
    fn blocked_queue(
        count: usize,
        capacity: usize,
    ) -> (WorkQueue<u32>, mpsc::Sender<()>, Receiver<u32>) {
        let (release, released) = mpsc::channel::<()>();
        let (started, starts) = mpsc::channel();
        let released = Mutex::new(released);
        let queue = WorkQueue::new(threads(count), capacity, move |job| {
            started.send(job).expect("the test waits");
            let _dropped = released.lock().map(|released| released.recv());
        });
        (queue.expect("threads"), release, starts)
    }

    /// Dealt round-robin to two threads, four of the short jobs would wait behind the first.
    #[test]
    fn slow_job_delays_no_other() {
        let barrier = Arc::new(Barrier::new(2));
        let (done, finished) = mpsc::channel();
        let shared = Arc::clone(&barrier);
        let queue = WorkQueue::new(threads(2), 16, move |job| {
            if job == 0 {
                shared.wait();
            }
            done.send(job).expect("the test waits");
        });
        let queue = queue.expect("threads");
        for job in 0..10 {
            queue.push(job);
        }
        let short: Vec<u32> = finished.iter().take(9).collect();
        assert_eq!(short, (1..10).collect::<Vec<_>>());
        barrier.wait();
        assert_eq!(finished.recv(), Ok(0));
    }

    #[test]
    fn full_queue_refuses_a_job() {
        let (queue, release, starts) = blocked_queue(1, 2);
        queue.push(0);
        assert_eq!(starts.recv(), Ok(0));
        assert_eq!(queue.try_push(1), Ok(()));
        assert_eq!(queue.try_push(2), Ok(()));
        assert_eq!(queue.try_push(3), Err(3));
        assert_eq!(format!("{queue:?}"), "WorkQueue(1 threads, 2 waiting jobs)");
        drop(release);
        drop(queue);
        // Without waiting: drop has waited.
        assert_eq!(starts.try_iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn push_waits_for_room() {
        let (queue, release, starts) = blocked_queue(1, 1);
        queue.push(0);
        assert_eq!(starts.recv(), Ok(0));
        queue.push(1);
        thread::scope(|scope| {
            scope.spawn(|| queue.push(2));
            drop(release);
        });
        drop(queue);
        assert_eq!(starts.iter().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn panic_of_a_job_loses_no_other() {
        let (done, finished) = mpsc::channel();
        let queue = WorkQueue::new(threads(1), 4, move |job: u32| {
            assert!(!job.is_multiple_of(2), "deliberate panic");
            done.send(job).expect("the test waits");
        });
        let queue = queue.expect("threads");
        for job in 0..10 {
            queue.push(job);
        }
        let panics = Arc::clone(&queue.panics);
        drop(queue);
        assert_eq!(finished.iter().collect::<Vec<_>>(), [1, 3, 5, 7, 9]);
        assert_eq!(panics.load(Ordering::Relaxed), 5);
    }

    #[test]
    fn job_can_drop_the_last_reference_to_its_queue() {
        type Job = Box<dyn FnOnce() + Send>;
        let queue = WorkQueue::new(threads(1), 1, |job: Job| job());
        let queue = Arc::new(queue.expect("threads"));
        let (sender, receiver) = mpsc::channel::<Arc<WorkQueue<Job>>>();
        let (done, finished) = mpsc::channel();
        queue.push(Box::new(move || {
            drop(receiver.recv().expect("the test sends it"));
            done.send(()).expect("the test waits");
        }));
        sender.send(queue).expect("the job waits");
        assert_eq!(finished.recv(), Ok(()));
    }
}
