//! The CRI log format: `<RFC 3339 with nanoseconds> <stream> <F|P> <text>`.

use std::io::{self, Write};

use jiff::Timestamp;

/// Longer lines are cut into partial ones.
const MAX_LINE: usize = 16 * 1024;

/// Cuts one stream into log lines.
pub(super) struct LineLog {
    stream: &'static str,
    buffer: Vec<u8>,
}

impl LineLog {
    /// For `stdout` or `stderr`.
    pub(super) fn new(stream: &'static str) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    /// Takes what the process wrote and writes the lines that it completes.
    pub(super) fn push(&mut self, now: Timestamp, mut bytes: &[u8], out: &mut impl Write) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = MAX_LINE - self.buffer.len();
            match bytes.iter().take(room + 1).position(|b| *b == b'\n') {
                Some(end) => {
                    self.buffer.extend_from_slice(&bytes[..end]);
                    bytes = &bytes[end + 1..];
                    self.emit(now, 'F', out)?;
                }
                None if bytes.len() > room => {
                    self.buffer.extend_from_slice(&bytes[..room]);
                    bytes = &bytes[room..];
                    self.emit(now, 'P', out)?;
                }
                None => {
                    self.buffer.extend_from_slice(bytes);
                    bytes = &[];
                }
            }
        }
        Ok(())
    }

    /// Writes the rest of a stream that ended without a line feed: as a part, like containerd, so that a reader prints
    /// no line feed that the process never wrote.
    pub(super) fn finish(&mut self, now: Timestamp, out: &mut impl Write) -> io::Result<()> {
        if self.buffer.is_empty() {
            Ok(())
        } else {
            self.emit(now, 'P', out)
        }
    }

    fn emit(&mut self, now: Timestamp, tag: char, out: &mut impl Write) -> io::Result<()> {
        let mut line = format!("{now:.9} {} {tag} ", self.stream).into_bytes();
        line.append(&mut self.buffer);
        line.push(b'\n');
        out.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(chunks: &[&[u8]]) -> Vec<String> {
        let mut out = Vec::new();
        let mut log = LineLog::new("stdout");
        for chunk in chunks {
            log.push(Timestamp::UNIX_EPOCH, chunk, &mut out).unwrap();
        }
        log.finish(Timestamp::UNIX_EPOCH, &mut out).unwrap();
        String::from_utf8(out)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn a_line_that_arrives_in_pieces_is_logged_once() {
        assert_eq!(
            logged(&[b"he", b"llo\n"]),
            ["1970-01-01T00:00:00.000000000Z stdout F hello"]
        );
    }

    #[test]
    fn a_line_beyond_sixteen_kibibytes_is_logged_in_parts() {
        let long = vec![b'x'; MAX_LINE + 3];
        let lines = logged(&[&long, b"\nend"]);
        assert_eq!(lines.len(), 3);
        assert!(lines[0].contains(" stdout P x"));
        assert!(lines[1].ends_with(" stdout F xxx"));
        assert!(lines[2].ends_with(" stdout P end"));
    }

    #[test]
    fn a_line_of_exactly_sixteen_kibibytes_is_whole() {
        let mut long = vec![b'x'; MAX_LINE];
        long.push(b'\n');
        assert_eq!(logged(&[&long]).len(), 1);
    }
}
