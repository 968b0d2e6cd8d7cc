//! Header blocks: name and value pairs in one zlib stream per direction and connection.
//!
//! Source: SPDY Protocol, Draft 3, section 2.6.10. A count, then for each pair the length and bytes of the
//! lower-case name and of the value, all lengths 32 bits; several values of one name are separated by NUL.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::{SpdyError, dictionary};

/// Largest header block, uncompressed.
const MAX_BLOCK_BYTES: usize = 64 * 1024;

/// Most pairs of a block.
const MAX_PAIRS: u32 = 256;

/// Name and value pairs.
pub(super) type Headers = Vec<(String, String)>;

/// Compresses the header blocks of one direction.
pub(super) struct Encoder {
    zlib: Compress,
}

impl Encoder {
    pub(super) fn new() -> Result<Self, SpdyError> {
        let mut zlib = Compress::new(Compression::default(), true);
        zlib.set_dictionary(&dictionary::bytes())
            .map_err(|_| SpdyError::Compression)?;
        Ok(Self { zlib })
    }

    pub(super) fn encode(&mut self, headers: &[(&str, &str)]) -> Result<Vec<u8>, SpdyError> {
        let mut block = Vec::new();
        put_length(&mut block, headers.len());
        for (name, value) in headers {
            for text in [name, value] {
                put_length(&mut block, text.len());
                block.extend_from_slice(text.as_bytes());
            }
        }
        // A sync flush adds a few bytes to what deflate needs at worst.
        let mut output = Vec::with_capacity(block.len() + block.len() / 1000 + 64);
        let start = self.zlib.total_in();
        loop {
            let used = usize::try_from(self.zlib.total_in() - start).unwrap_or(usize::MAX);
            self.zlib
                .compress_vec(
                    block.get(used..).unwrap_or_default(),
                    &mut output,
                    FlushCompress::Sync,
                )
                .map_err(|_| SpdyError::Compression)?;
            if output.len() < output.capacity() {
                return Ok(output);
            }
            output.reserve(256);
        }
    }
}

fn put_length(block: &mut Vec<u8>, length: usize) {
    // Lengths are of our own few headers.
    block.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
}

/// Decompresses the header blocks of one direction.
pub(super) struct Decoder {
    zlib: Decompress,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self {
            zlib: Decompress::new(true),
        }
    }

    pub(super) fn decode(&mut self, compressed: &[u8]) -> Result<Headers, SpdyError> {
        parse(&self.inflate(compressed)?)
    }

    fn inflate(&mut self, compressed: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut output = Vec::with_capacity(4096);
        let start = self.zlib.total_in();
        loop {
            let used = usize::try_from(self.zlib.total_in() - start).unwrap_or(usize::MAX);
            let input = compressed.get(used..).unwrap_or_default();
            match self
                .zlib
                .decompress_vec(input, &mut output, FlushDecompress::Sync)
            {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.zlib
                        .set_dictionary(&dictionary::bytes())
                        .map_err(|_| SpdyError::Compression)?;
                }
                Err(_) | Ok(Status::StreamEnd) => return Err(SpdyError::Compression),
                Ok(_) if output.len() < output.capacity() => return Ok(output),
                Ok(_) if output.len() >= MAX_BLOCK_BYTES => return Err(SpdyError::TooLarge),
                Ok(_) => output.reserve(4096),
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, SpdyError> {
    let count = take_length(&mut block)?;
    if count > MAX_PAIRS {
        return Err(SpdyError::TooLarge);
    }
    (0..count)
        .map(|_| Ok((take_text(&mut block)?, take_text(&mut block)?)))
        .collect()
}

fn take_length(block: &mut &[u8]) -> Result<u32, SpdyError> {
    let (length, rest) = block
        .split_first_chunk()
        .ok_or(SpdyError::Malformed("header block"))?;
    *block = rest;
    Ok(u32::from_be_bytes(*length))
}

fn take_text(block: &mut &[u8]) -> Result<String, SpdyError> {
    let length = take_length(block)? as usize;
    let (text, rest) = block
        .split_at_checked(length)
        .ok_or(SpdyError::Malformed("header block"))?;
    *block = rest;
    Ok(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dictionary_is_the_one_of_spdy_3() {
        // Its Adler-32 is what every SPDY/3 stream names in its zlib header.
        let mut zlib = Compress::new(Compression::default(), true);
        assert_eq!(zlib.set_dictionary(&dictionary::bytes()).unwrap(), 0xe3c6_a7c2);
    }

    #[test]
    fn blocks_survive_one_stream_in_order() {
        let (mut encoder, mut decoder) = (Encoder::new().unwrap(), Decoder::new());
        for value in ["stdin", "stdout", &"x".repeat(20_000)] {
            let block = encoder.encode(&[("streamtype", value), ("port", "80")]).unwrap();
            let headers = decoder.decode(&block).unwrap();
            assert_eq!(headers[0], ("streamtype".to_owned(), value.to_owned()));
            assert_eq!(headers[1].1, "80");
        }
    }

    #[test]
    fn a_block_that_inflates_beyond_its_limit_is_refused() {
        let mut encoder = Encoder::new().unwrap();
        let bomb = encoder
            .encode(&[("a", &"x".repeat(10 * MAX_BLOCK_BYTES))])
            .unwrap();
        assert!(matches!(Decoder::new().decode(&bomb), Err(SpdyError::TooLarge)));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes: Vec<u8>) {
            let _ = Decoder::new().decode(&bytes);
            let _ = parse(&bytes);
        }
    }
}
