use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

fn counting_queue() -> (WakeQueue, WakeReceiver, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let notified = Arc::clone(&count);
    let (queue, receiver) = WakeQueue::new(move || {
        notified.fetch_add(1, Ordering::Relaxed);
    });
    (queue, receiver, count)
}

#[test]
fn connection_has_at_most_one_wake_up_in_the_queue() {
    let (queue, receiver, notified) = counting_queue();
    let (first, second) = (queue.waker(1), queue.waker(2));
    first.wake();
    first.clone().wake();
    second.wake();
    first.wake();
    assert_eq!(notified.load(Ordering::Relaxed), 1, "wake-ups coalesce");
    receiver.clear_notified();
    let tokens = [receiver.take(), receiver.take()].map(|waker| waker.unwrap().token());
    assert_eq!(tokens, [1, 2]);
    assert!(receiver.take().is_none());
}

/// Rule 8 of the event loop.
#[test]
fn wake_up_after_a_look_into_the_queue_notifies_again() {
    let (queue, receiver, notified) = counting_queue();
    let waker = queue.waker(1);
    waker.wake();
    receiver.clear_notified();
    assert!(receiver.take().unwrap().is_same(&waker));
    waker.wake();
    assert_eq!(notified.load(Ordering::Relaxed), 2);
    assert!(receiver.take().is_some());
}

#[test]
fn guard_wakes_when_it_is_dropped() {
    let (queue, receiver, _) = counting_queue();
    let guard = queue.waker(1).wake_on_drop();
    assert!(receiver.take().is_none());
    drop(guard);
    assert!(receiver.take().is_some());
}

#[test]
fn waker_of_a_worker_that_has_ended_does_nothing() {
    let (queue, receiver, _) = counting_queue();
    let waker = queue.waker(1);
    drop(receiver);
    waker.wake();
    waker.wake();
}

#[test]
fn wake_up_is_in_the_queue_before_the_notification() {
    let receiver = Arc::new(std::sync::Mutex::new(None::<WakeReceiver>));
    let (at_notification, taken) = (Arc::clone(&receiver), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&taken);
    let (queue, own) = WakeQueue::new(move || {
        let receiver = at_notification.lock().unwrap();
        let wakes = receiver.as_ref().and_then(WakeReceiver::take).into_iter();
        count.fetch_add(wakes.count(), Ordering::Relaxed);
    });
    *receiver.lock().unwrap() = Some(own);
    queue.waker(1).wake();
    assert_eq!(taken.load(Ordering::Relaxed), 1);
    drop(receiver.lock().unwrap().take());
}
