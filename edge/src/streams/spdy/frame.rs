//! Frames: an 8-byte head, big-endian, then a payload of up to 2^24 - 1 bytes.
//!
//! Source: SPDY Protocol, Draft 3.1, section 2.2. Data payloads are passed on as they come, so that a large frame
//! needs no buffer; control frames are bounded.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::SpdyError;
use super::headers::{Decoder as HeaderDecoder, Headers};

const VERSION: u16 = 3;
const HEAD: usize = 8;
const MAX_CONTROL_BYTES: usize = 64 * 1024;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

/// What a client sends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Opens a stream.
    SynStream {
        /// Its id.
        id: u32,
        /// Nothing will come on it.
        fin: bool,
        /// Its headers.
        headers: Headers,
    },
    /// Ends a stream at once.
    Reset(u32),
    /// To be sent back.
    Ping(u32),
    /// The client opens no more streams.
    GoAway,
    /// A piece of a stream.
    Data {
        /// The stream.
        id: u32,
        /// The last piece.
        fin: bool,
        /// May be empty.
        bytes: Bytes,
    },
    /// Settings, window updates and whatever is of no use here.
    Other,
}

/// Finds frames in a byte stream.
pub(super) struct Decoder {
    buffer: BytesMut,
    /// The data frame that is being passed on: stream, FIN, bytes still to come.
    data: Option<(u32, bool, usize)>,
    headers: HeaderDecoder,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self {
            buffer: BytesMut::new(),
            data: None,
            headers: HeaderDecoder::new(),
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame, or `None` when more bytes are needed.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, SpdyError> {
        if let Some((id, fin, left)) = self.data {
            return Ok(self.data_piece(id, fin, left));
        }
        let Some(head) = self.buffer.first_chunk::<HEAD>().copied() else {
            return Ok(None);
        };
        let [a, b, c, d, flags, l0, l1, l2] = head;
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        if a & 0x80 == 0 {
            self.buffer.advance(HEAD);
            return Ok(self.data_piece(u32::from_be_bytes([a, b, c, d]), flags & FIN != 0, length));
        }
        if length > MAX_CONTROL_BYTES {
            return Err(SpdyError::TooLarge);
        }
        if self.buffer.len() < HEAD + length {
            return Ok(None);
        }
        if u16::from_be_bytes([a & 0x7f, b]) != VERSION {
            return Err(SpdyError::Malformed("version"));
        }
        self.buffer.advance(HEAD);
        let payload = self.buffer.split_to(length);
        self.control(u16::from_be_bytes([c, d]), flags, &payload)
            .map(Some)
    }

    fn data_piece(&mut self, id: u32, fin: bool, left: usize) -> Option<Frame> {
        if left > 0 && self.buffer.is_empty() {
            self.data = Some((id, fin, left));
            return None;
        }
        let bytes = self.buffer.split_to(left.min(self.buffer.len())).freeze();
        let left = left - bytes.len();
        self.data = (left > 0).then_some((id, fin, left));
        Some(Frame::Data {
            id,
            fin: fin && left == 0,
            bytes,
        })
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Frame, SpdyError> {
        let number = |at: usize| {
            let bytes = payload.get(at..).and_then(|rest| rest.first_chunk());
            bytes
                .map(|bytes| u32::from_be_bytes(*bytes))
                .ok_or(SpdyError::Malformed("control frame"))
        };
        Ok(match kind {
            SYN_STREAM => {
                let block = payload.get(10..).ok_or(SpdyError::Malformed("SYN_STREAM"))?;
                Frame::SynStream {
                    id: number(0)? & 0x7fff_ffff,
                    fin: flags & FIN != 0,
                    headers: self.headers.decode(block)?,
                }
            }
            // Of no use, but part of the compressed stream.
            SYN_REPLY | HEADERS => {
                self.headers.decode(payload.get(4..).unwrap_or_default())?;
                Frame::Other
            }
            RST_STREAM => Frame::Reset(number(0)? & 0x7fff_ffff),
            PING => Frame::Ping(number(0)?),
            GOAWAY => Frame::GoAway,
            _ => Frame::Other,
        })
    }
}

fn control(kind: u16, flags: u8, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD + payload.len());
    frame.put_u16(0x8000 | VERSION);
    frame.put_u16(kind);
    put_length(&mut frame, flags, payload.len());
    frame.put_slice(payload);
    frame.freeze()
}

fn put_length(frame: &mut BytesMut, flags: u8, length: usize) {
    frame.put_u8(flags);
    // Payloads are ours and below 2^24: tunnel chunks and small control frames.
    frame.put_uint(length as u64 & 0xff_ffff, 3);
}

/// Accepts a stream.
pub(super) fn syn_reply(id: u32, block: &[u8]) -> Bytes {
    let mut payload = id.to_be_bytes().to_vec();
    payload.extend_from_slice(block);
    control(SYN_REPLY, 0, &payload)
}

/// Refuses a stream (status 3, REFUSED_STREAM).
pub(super) fn refuse(id: u32) -> Bytes {
    let mut payload = id.to_be_bytes().to_vec();
    payload.extend_from_slice(&3_u32.to_be_bytes());
    control(RST_STREAM, 0, &payload)
}

/// Answers a ping.
pub(super) fn ping(id: u32) -> Bytes {
    control(PING, 0, &id.to_be_bytes())
}

/// Says goodbye; `last` is the newest stream that was served.
pub(super) fn goaway(last: u32) -> Bytes {
    let mut payload = last.to_be_bytes().to_vec();
    payload.extend_from_slice(&0_u32.to_be_bytes());
    control(GOAWAY, 0, &payload)
}

/// A piece of a stream.
pub(super) fn data(id: u32, fin: bool, bytes: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD + bytes.len());
    frame.put_u32(id & 0x7fff_ffff);
    put_length(&mut frame, if fin { FIN } else { 0 }, bytes.len());
    frame.put_slice(bytes);
    frame.freeze()
}

/// Opens a stream as a client does.
#[cfg(test)]
pub(super) fn syn_stream(id: u32, block: &[u8]) -> Bytes {
    let mut payload = id.to_be_bytes().to_vec();
    payload.extend_from_slice(&[0; 6]);
    payload.extend_from_slice(block);
    control(SYN_STREAM, 0, &payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::spdy::headers::Encoder;

    #[test]
    fn frames_survive_a_stream_that_comes_byte_by_byte() {
        let block = Encoder::new()
            .unwrap()
            .encode(&[("streamtype", "stdin")])
            .unwrap();
        let stream = [
            syn_stream(1, &block),
            ping(7),
            data(1, true, b"hi"),
            refuse(1),
            goaway(1),
        ]
        .concat();
        let mut decoder = Decoder::new();
        let (mut frames, mut text, mut finished) = (vec![], vec![], false);
        for byte in stream {
            decoder.push(&[byte]);
            while let Some(frame) = decoder.next().unwrap() {
                match frame {
                    Frame::Data { id: 1, fin, bytes } => {
                        text.extend_from_slice(&bytes);
                        finished |= fin;
                    }
                    other => frames.push(other),
                }
            }
        }
        let headers = vec![("streamtype".to_owned(), "stdin".to_owned())];
        let opened = Frame::SynStream {
            id: 1,
            fin: false,
            headers,
        };
        assert_eq!(frames, [opened, Frame::Ping(7), Frame::Reset(1), Frame::GoAway]);
        assert_eq!((text.as_slice(), finished), (&b"hi"[..], true));
    }

    #[test]
    fn an_empty_last_piece_is_a_frame() {
        let mut decoder = Decoder::new();
        decoder.push(&data(3, true, b""));
        let expected = Frame::Data {
            id: 3,
            fin: true,
            bytes: Bytes::new(),
        };
        assert_eq!(decoder.next().unwrap(), Some(expected));
        assert_eq!(decoder.next().unwrap(), None);
    }

    #[test]
    fn a_control_frame_beyond_its_limit_is_refused_before_it_has_come() {
        let mut decoder = Decoder::new();
        decoder.push(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]);
        assert!(matches!(decoder.next(), Err(SpdyError::TooLarge)));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_frames_or_an_error(bytes: Vec<u8>, control: bool) {
            let mut decoder = Decoder::new();
            if control {
                decoder.push(&[0x80, 3, 0]);
            }
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next() {}
        }
    }
}
