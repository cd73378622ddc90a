//! How stored types are encoded, as text that changes when a type does: an example of each, and the digest of many.
//!
//! The examples are made by decoding what a reader makes up, so that no type can be forgotten to be filled in: numbers are
//! small, and where a value is refused the next one is tried. What it cannot see: two fields of one type that change
//! places, and a field that means something else.

use std::fmt::Write as _;
use std::path::Path;

use bincode::de::read::Reader;
use bincode::error::DecodeError;
use bincode::{Decode, Encode};
use sha2::{Digest, Sha256};

/// Examples of a type whose digest is taken.
const EXAMPLES: u64 = 64;
/// Values of one example after which all others are 0, so that it ends.
const VALUES_MAX: usize = 300;
/// More variants than any type has.
const TAGS: u8 = 32;

/// Makes values up, and remembers them.
struct Invented<'a> {
    /// One per read.
    values: &'a mut Vec<u8>,
    at: usize,
    /// State of a random number generator that is the same everywhere.
    random: &'a mut u64,
}

impl Reader for Invented<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> Result<(), DecodeError> {
        let Some((first, rest)) = bytes.split_first_mut() else { return Ok(()) };
        if self.at == self.values.len() {
            let value = match self.values.len() < VALUES_MAX {
                true => draw(self.random),
                false => 0,
            };
            self.values.push(value);
        }
        // A number, the length of something or which variant it is: all are little-endian.
        *first = self.values[self.at];
        rest.fill(0);
        self.at += 1;
        Ok(())
    }
}

fn draw(random: &mut u64) -> u8 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    let drawn = (*random >> 33) as u8;
    if drawn.is_multiple_of(8) { (drawn / 8) % TAGS } else { drawn % 3 }
}

fn example<T: Decode<()> + Encode>(seed: u64) -> Vec<u8> {
    let config = bincode::config::standard().with_little_endian().with_fixed_int_encoding();
    let (mut values, mut random) = (Vec::new(), (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut tried = 0;
    loop {
        let reader = Invented { values: &mut values, at: 0, random: &mut random };
        match bincode::decode_from_reader::<T, _, _>(reader, config) {
            Ok(value) => return bincode::encode_to_vec(&value, config).expect("what was decoded is encoded"),
            // The last value is not one that may stand there; or, where none may, what was read before does not fit together.
            Err(error) => {
                tried += 1;
                assert!(tried < 1_000_000, "no {}: {error}", std::any::type_name::<T>());
                if tried % u32::from(TAGS) == 0 {
                    let kept = usize::from(draw(&mut random)) * values.len() / usize::from(TAGS);
                    values.truncate(kept);
                } else if let Some(last) = values.last_mut() {
                    *last = (*last + 1) % TAGS;
                }
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A line about a type.
pub(crate) fn line<T: Decode<()> + Encode>(name: &str) -> String {
    let mut all = Sha256::new();
    for seed in 0..EXAMPLES {
        let bytes = example::<T>(seed);
        all.update((bytes.len() as u64).to_le_bytes());
        all.update(&bytes);
    }
    format!("{name} {} {}\n", hex(&all.finalize()), hex(&example::<T>(0)))
}

/// Compares with what was written for this format.
pub(crate) fn check(dir: &Path, format: u64, lines: &str) {
    let file = dir.join(format!("{format}.txt"));
    let rule = "write it with `cargo test -p PACKAGE --lib -- --ignored write_the_format`";
    let kept = std::fs::read_to_string(&file).unwrap_or_else(|error| {
        panic!("{}: {error}: format {format} has no examples yet; {rule}", file.display())
    });
    let changed = |line: &&str| !kept.lines().any(|kept| kept == *line);
    let names = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
    let changed: Vec<String> = lines.lines().filter(changed).map(names).collect();
    assert!(
        changed.is_empty() && kept.lines().count() == lines.lines().count(),
        "{changed:?} are encoded otherwise than in format {format}, and a state of that format cannot be read any more: \
         raise FORMAT_VERSION in runtime/src/state/mod.rs; the new format has a file of examples: {rule}"
    );
}

/// Writes the file of a new format; that of one which is there already is never changed.
pub(crate) fn write(dir: &Path, format: u64, lines: &str) {
    std::fs::create_dir_all(dir).expect("a directory");
    let file = dir.join(format!("{format}.txt"));
    assert!(!file.exists(), "{} is there: what it says holds for ever", file.display());
    std::fs::write(file, lines).expect("written");
}
