use std::sync::mpsc::{self, Receiver};
use std::sync::{Barrier, Mutex};

use super::*;

/// A queue whose jobs wait until the sender is dropped, once they have told that they run.
fn blocked_queue(
    count: usize,
    capacity: usize,
) -> (WorkQueue<u32>, mpsc::Sender<()>, Receiver<u32>) {
    let (release, released) = mpsc::channel::<()>();
    let (started, starts) = mpsc::channel();
    let released = Mutex::new(released);
    let queue = WorkQueue::new(count, capacity, move |job| {
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
    let queue = WorkQueue::new(2, 16, move |job| {
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
    let queue = WorkQueue::new(1, 4, move |job: u32| {
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
    let queue = WorkQueue::new(1, 1, |job: Job| job());
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

#[test]
fn queue_without_threads_is_refused() {
    let error = WorkQueue::new(0, 16, |_job: u32| {}).expect_err("no thread would run a job");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}
