use super::*;
use crate::serve::logging::format::Format;

const TEXT: Style = Style {
    format: Format::Text,
    is_journal: false,
    is_coloured: false,
};

#[test]
fn queue_is_bounded_in_bytes_until_the_end() {
    let (log, messages) = Log::new(TEXT);
    let line = "x".repeat(150);
    for _ in 0..6_000 {
        log.push(line.clone());
    }
    assert_eq!((messages.len(), log.lost_lines()), (6_000, 0));
    while log.lost_lines() < 5 {
        log.push(line.clone());
    }
    let full = MAX_QUEUED_BYTES / line.len();
    assert_eq!(messages.len(), full);
    log.keep_all_lines();
    log.push(line.clone());
    assert_eq!((messages.len(), log.lost_lines()), (full + 1, 5));
}

/// env_logger holds a lock during a write, and panics for ever if one has panicked. An error is ignored.
#[test]
fn write_takes_a_whole_line_even_if_the_queue_is_full_or_closed() {
    let (mut log, messages) = Log::new(TEXT);
    let line = vec![b'x'; 1 + MAX_QUEUED_BYTES];
    assert_eq!(log.write(&line).unwrap(), line.len());
    assert_eq!((messages.len(), log.lost_lines()), (0, 1));
    assert_eq!(log.write(b"\xff\n").unwrap(), 2);
    log.flush().unwrap();
    let Ok(Message::Line(text)) = messages.try_recv() else {
        panic!("no line");
    };
    assert_eq!(text, "\u{fffd}\n");
    drop(messages);
    assert_eq!(log.write(b"more\n").unwrap(), 5);
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
    let (log, messages) = Log::new(TEXT);
    let disk = Disk {
        text: String::new(),
        room: 9,
    };
    let mut writer = Writer {
        output: disk,
        log: log.clone(),
        is_partial: false,
        reported: 0,
        error: None,
    };
    let mut write = |lines: &[&str], room| {
        for line in lines {
            log.push(format!("{line}\n"));
        }
        let (done, _written) = bounded(1);
        log.messages.send(Message::Flush(done)).expect("it is open");
        while let Ok(message) = messages.try_recv() {
            let (sender, one) = unbounded();
            sender.send(message).expect("it is open");
            drop(sender);
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
    assert!(lines[3].ends_with("WARN  echoserver] log lines were dropped: lines=3 reason=full"));
    assert_eq!(lines.len(), 4, "{text}");
    assert_eq!(log.state.queued_bytes.load(Relaxed), 0);
}
