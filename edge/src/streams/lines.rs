//! The log file format of CRI: `<RFC 3339 time> <stdout|stderr> <F|P> <text>`, one entry a line.
//!
//! An entry tagged `P` is a part of a message that goes on in the next entry; `F` is the last or only part.
//! Source: Kubernetes, "CRI: Log management for container stdout/stderr streams".

use std::io::{self, SeekFrom};

use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeek, AsyncSeekExt};

/// Entries longer than this without a line end are passed on in pieces.
pub(super) const MAX_LINE_BYTES: usize = 256 * 1024;

/// Bytes read at a time while looking for the tail.
const BLOCK: u64 = 64 * 1024;

/// Enough of a line to see its tag: a time with offset, a stream name, a tag.
const PREFIX: usize = 64;

/// One parsed line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    /// As in the file.
    pub(super) time: &'a str,
    /// The message goes on in the next entry.
    pub(super) partial: bool,
    /// Without a line end.
    pub(super) text: &'a [u8],
}

/// Reads a line without its line end; `None` when it is not in the format.
pub(super) fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut fields = line.splitn(4, |&byte| byte == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?;
    let stream = fields.next()?;
    let tags = fields.next()?;
    if !time.as_bytes().first().is_some_and(u8::is_ascii_digit) || !matches!(stream, b"stdout" | b"stderr") {
        return None;
    }
    // Tags are separated by ':'; only the first one is defined.
    let partial = match tags.split(|&byte| byte == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    let text = fields.next().unwrap_or_default();
    Some(Entry { time, partial, text })
}

/// Which messages to print, and how.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Format {
    /// Put the time before each message.
    pub(super) timestamps: bool,
    /// Leave out what is older.
    pub(super) since: Option<Timestamp>,
    /// Stop after so many bytes.
    pub(super) limit: Option<u64>,
}

/// Turns a log file's bytes into what a person reads. Feed it with [`Printer::push`] and [`Printer::finish`].
pub(super) struct Printer {
    format: Format,
    pending: Vec<u8>,
    printed: u64,
    in_message: bool,
}

impl Printer {
    pub(super) fn new(format: Format) -> Self {
        Self {
            format,
            pending: Vec::new(),
            printed: 0,
            in_message: false,
        }
    }

    /// The limit is reached: nothing more will come.
    pub(super) fn full(&self) -> bool {
        self.format.limit.is_some_and(|limit| self.printed >= limit)
    }

    /// Takes the next bytes of the file and appends what they print to `to`.
    pub(super) fn push(&mut self, bytes: &[u8], to: &mut Vec<u8>) {
        self.pending.extend_from_slice(bytes);
        let pending = std::mem::take(&mut self.pending);
        let mut rest = pending.as_slice();
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            self.line(&rest[..end], true, to);
            rest = &rest[end + 1..];
        }
        if rest.len() > MAX_LINE_BYTES {
            self.line(rest, false, to);
            rest = &[];
        }
        self.pending = rest.to_vec();
    }

    /// The file ends here, or goes on in a new one: prints a last line that has no line end.
    pub(super) fn finish(&mut self, to: &mut Vec<u8>) {
        let rest = std::mem::take(&mut self.pending);
        if !rest.is_empty() {
            self.line(&rest, false, to);
        }
    }

    fn line(&mut self, line: &[u8], ended: bool, to: &mut Vec<u8>) {
        let Some(entry) = parse(line) else {
            // Not of our format: what is in the file is better than nothing.
            self.print(line, to);
            if ended {
                self.print(b"\n", to);
            }
            return;
        };
        if let Some(since) = self.format.since
            && entry.time.parse::<Timestamp>().is_ok_and(|time| time < since)
        {
            return;
        }
        if self.format.timestamps && !self.in_message {
            self.print(nine_digits(entry.time).as_bytes(), to);
            self.print(b" ", to);
        }
        self.print(entry.text, to);
        if !entry.partial && ended {
            self.print(b"\n", to);
        }
        self.in_message = entry.partial;
    }

    fn print(&mut self, bytes: &[u8], to: &mut Vec<u8>) {
        let room = match self.format.limit {
            Some(limit) => usize::try_from(limit.saturating_sub(self.printed)).unwrap_or(usize::MAX),
            None => usize::MAX,
        };
        let part = &bytes[..bytes.len().min(room)];
        to.extend_from_slice(part);
        self.printed += part.len() as u64;
    }
}

/// `kubectl logs --timestamps` prints nine digits always; runtimes leave trailing zeros out.
fn nine_digits(time: &str) -> String {
    let (seconds, rest) = time.split_at(time.len().min("2006-01-02T15:04:05".len()));
    let fraction = rest.strip_prefix('.').unwrap_or_default();
    let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
    let zone = if rest.starts_with('.') {
        &fraction[digits..]
    } else {
        rest
    };
    format!("{seconds}.{:0<9}{zone}", &fraction[..digits])
}

/// Where the last `count` messages of a file begin, read backwards block by block.
pub(super) async fn tail_start<F>(file: &mut F, count: u64) -> io::Result<u64>
where
    F: AsyncRead + AsyncSeek + Unpin,
{
    let length = file.seek(SeekFrom::End(0)).await?;
    let mut tail = Tail {
        wanted: count,
        line_start: None,
        last: true,
    };
    // The first bytes of what was read before: a line's tag may lie in the next block.
    let mut after: Vec<u8> = Vec::new();
    let mut end = length;
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        let mut block = vec![0; usize::try_from(end - start).unwrap_or_default()];
        file.seek(SeekFrom::Start(start)).await?;
        file.read_exact(&mut block).await?;
        let size = block.len();
        block.extend_from_slice(&after);
        for at in (0..size).rev().filter(|&at| block[at] == b'\n') {
            if let Some(found) = tail.line_begins(start + at as u64 + 1, &block[at + 1..]) {
                return Ok(found);
            }
        }
        block.truncate(PREFIX);
        after = block;
        end = start;
    }
    Ok(tail.line_begins(0, &after).unwrap_or(0))
}

/// Counts messages from the end of a file.
struct Tail {
    /// Messages still to be found.
    wanted: u64,
    /// Begin of the line after the one that is looked at; `None` before the first line end is seen.
    line_start: Option<u64>,
    /// Only the file's last line has been seen so far.
    last: bool,
}

impl Tail {
    /// A line begins at `start` with the bytes in `text`. Answers where the wanted messages begin once that is known.
    fn line_begins(&mut self, start: u64, text: &[u8]) -> Option<u64> {
        let next = self.line_start.replace(start);
        // What follows the last line end is empty, or a line that is being written and is no message yet.
        let next = next?;
        let ends_message = !tagged_partial(&text[..text.len().min(PREFIX)]);
        let counts = ends_message || self.last;
        self.last = false;
        if !counts {
            return None;
        }
        if self.wanted == 0 {
            return Some(next);
        }
        self.wanted -= 1;
        None
    }
}

fn tagged_partial(prefix: &[u8]) -> bool {
    prefix
        .split(|&byte| byte == b' ')
        .nth(2)
        .is_some_and(|tags| tags == b"P" || tags.starts_with(b"P:"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    const FILE: &str = "\
2026-01-01T00:00:01Z stdout F one
2026-01-01T00:00:02.5Z stderr P tw
2026-01-01T00:00:02.6Z stderr F o
2026-01-01T00:00:03.123456789+02:00 stdout F 
";

    fn print(format: Format, file: &str) -> String {
        let mut printer = Printer::new(format);
        let mut text = vec![];
        // Small pieces, so that lines are split.
        for piece in file.as_bytes().chunks(7) {
            printer.push(piece, &mut text);
        }
        printer.finish(&mut text);
        String::from_utf8(text).unwrap()
    }

    async fn tail(file: &str, count: u64) -> String {
        let start = tail_start(&mut Cursor::new(file.as_bytes()), count)
            .await
            .unwrap();
        print(Format::default(), &file[usize::try_from(start).unwrap()..])
    }

    #[test]
    fn parts_are_joined_and_empty_messages_kept() {
        assert_eq!(print(Format::default(), FILE), "one\ntwo\n\n");
    }

    #[test]
    fn timestamps_have_nine_digits_and_stand_once_a_message() {
        let format = Format {
            timestamps: true,
            ..Format::default()
        };
        assert_eq!(
            print(format, FILE),
            "2026-01-01T00:00:01.000000000Z one\n2026-01-01T00:00:02.500000000Z two\n\
             2026-01-01T00:00:03.123456789+02:00 \n"
        );
    }

    #[test]
    fn since_leaves_out_what_is_older() {
        let format = Format {
            since: Some("2026-01-01T00:00:02Z".parse().unwrap()),
            ..Format::default()
        };
        assert_eq!(print(format, FILE), "two\n");
    }

    #[test]
    fn a_limit_cuts_at_the_byte() {
        let format = Format {
            limit: Some(5),
            ..Format::default()
        };
        assert_eq!(print(format, FILE), "one\nt");
    }

    #[test]
    fn a_line_of_another_format_is_printed_as_it_is() {
        assert_eq!(print(Format::default(), "hello\nworld"), "hello\nworld");
    }

    #[tokio::test]
    async fn the_tail_counts_messages_not_lines() {
        assert_eq!(tail(FILE, 0).await, "");
        assert_eq!(tail(FILE, 1).await, "\n");
        assert_eq!(tail(FILE, 2).await, "two\n\n");
        assert_eq!(tail(FILE, 3).await, "one\ntwo\n\n");
        assert_eq!(tail(FILE, 9).await, "one\ntwo\n\n");
        assert_eq!(tail("", 9).await, "");
    }

    #[tokio::test]
    async fn an_unfinished_message_at_the_end_counts_as_one() {
        let file = format!("{FILE}2026-01-01T00:00:04Z stdout P par\n");
        assert_eq!(tail(&file, 1).await, "par");
        assert_eq!(tail(&file, 2).await, "\npar");
    }

    #[tokio::test]
    async fn the_tail_is_found_across_blocks() {
        let mut file = String::new();
        for n in 0..6000 {
            file.push_str(&format!("2026-01-01T00:00:01.{n:09}Z stdout F line {n}\n"));
        }
        let mut expected = String::new();
        for n in 1000..6000 {
            expected.push_str(&format!("line {n}\n"));
        }
        assert_eq!(tail(&file, 5000).await, expected);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_print_something(bytes: Vec<u8>) {
            let mut text = vec![];
            let mut printer = Printer::new(Format { timestamps: true, ..Format::default() });
            printer.push(&bytes, &mut text);
            printer.finish(&mut text);
        }
    }
}
