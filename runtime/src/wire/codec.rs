//! How values become bytes: bincode with fixed-width little-endian integers and a limit on what a length may claim.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::enc::write::Writer;
use bincode::error::EncodeError;
use bincode::{Decode, Encode};

use super::FRAME_BYTES_MAX;

type Config = Configuration<LittleEndian, Fixint, Limit<FRAME_BYTES_MAX>>;

/// Without the limit a hostile length makes the decoder allocate without bound and panic.
const CONFIG: Config = bincode::config::standard()
    .with_little_endian()
    .with_fixed_int_encoding()
    .with_limit::<FRAME_BYTES_MAX>();

/// A value that could not be encoded or bytes that are not the expected value.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct CodecError(pub(crate) String);

/// Encodes a value as the wire does; for `ActorSpec::args` and everything that is stored.
pub fn to_bytes<T: Encode>(value: &T) -> Result<Vec<u8>, CodecError> {
    let mut out = Vec::new();
    encode_into(value, &mut out)?;
    Ok(out)
}

/// Decodes a value; bytes left over are an error.
pub fn from_bytes<T: Decode<()>>(bytes: &[u8]) -> Result<T, CodecError> {
    let name = std::any::type_name::<T>;
    let (value, used) = bincode::decode_from_slice(bytes, CONFIG)
        .map_err(|e| CodecError(format!("{} bytes are not a {}: {e}", bytes.len(), name())))?;
    if used != bytes.len() {
        return Err(CodecError(format!(
            "{} of {} bytes left over after a {}",
            bytes.len() - used,
            bytes.len(),
            name()
        )));
    }
    Ok(value)
}

/// Appends the encoded value to `out`.
pub(crate) fn encode_into<T: Encode>(value: &T, out: &mut Vec<u8>) -> Result<(), CodecError> {
    bincode::encode_into_writer(value, Append(out), CONFIG)
        .map_err(|e| CodecError(format!("{} cannot be encoded: {e}", std::any::type_name::<T>())))
}

struct Append<'a>(&'a mut Vec<u8>);

impl Writer for Append<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_lengths_are_errors() {
        let mut bytes = u64::MAX.to_le_bytes().to_vec();
        bytes.extend([0; 64]);
        assert!(from_bytes::<Vec<u8>>(&bytes).is_err());
        assert!(from_bytes::<Vec<String>>(&bytes).is_err());
        assert!(from_bytes::<String>(&bytes).is_err());
        assert!(from_bytes::<u8>(&[1, 2]).unwrap_err().to_string().contains("1 of 2 bytes left over"));
    }
}
