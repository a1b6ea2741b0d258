use super::*;

const TEXT: Style = Style {
    format: Format::Text,
    is_journal: false,
};

#[test]
fn queue_is_bounded_in_bytes_until_the_end() {
    let (log, messages) = Log::queue(TEXT);
    let line = "x".repeat(150);
    for _ in 0..6_000 {
        log.push(line.clone());
    }
    let dropped = || log.counters.dropped_lines.load(Relaxed);
    assert_eq!((messages.len(), dropped()), (6_000, 0));
    while dropped() < 5 {
        log.push(line.clone());
    }
    let full = MAX_QUEUED_BYTES / line.len();
    assert_eq!(messages.len(), full);
    log.end();
    log.push(line.clone());
    assert_eq!((messages.len(), dropped()), (full + 1, 5));
}

/// An output that takes only so many bytes.
struct Disk {
    text: String,
    room: usize,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room);
        if count == 0 {
            return Err(io::Error::other("full"));
        }
        self.room -= count;
        self.text += std::str::from_utf8(&bytes[..count]).expect("ASCII");
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn partial_line_is_ended_and_lost_lines_are_reported() {
    let (log, messages) = Log::queue(TEXT);
    let disk = Disk {
        text: String::new(),
        room: 9,
    };
    let mut writer = Writer::new(disk, TEXT, Arc::clone(&log.counters));
    let mut write = |lines: &[&str], room| {
        for line in lines {
            log.push(format!("{line}\n"));
        }
        let (done, _written) = bounded(1);
        log.queue.send(Message::Flush(done)).expect("it is open");
        while let Ok(message) = messages.try_recv() {
            let (queue, one) = unbounded();
            queue.send(message).expect("it is open");
            drop(queue);
            writer.run(&one);
        }
        writer.output.room += room;
        writer.output.text.clone()
    };
    assert_eq!(write(&["first", "second", "third"], 1), "first\nsec");
    // The newline fits, the line does not.
    assert_eq!(write(&["fourth"], 1000), "first\nsec\n");
    let text = write(&["fifth"], 0);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..3], ["first", "sec", "fifth"], "{text}");
    assert!(lines[3].ends_with("WARN  echoserver] 3 log lines were not written: full"));
    assert_eq!(lines.len(), 4, "{text}");
    assert_eq!(log.counters.queued_bytes.load(Relaxed), 0);
}
