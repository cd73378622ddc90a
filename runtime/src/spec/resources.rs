//! Amounts that actors ask for and nodes offer. Plain data: nothing here decides who gets them.

use std::collections::BTreeMap;
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, SubAssign};

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// Parts that a unit has: amounts are counted in ten-thousandths, as Ray does.
const PARTS: u64 = 10_000;

/// An amount of something that can be divided, exact to a ten-thousandth. Sums never drift as floats would.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Quantity(u64);

impl Quantity {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// `units` whole ones.
    pub const fn whole(units: u32) -> Self {
        Self(units as u64 * PARTS)
    }

    /// `parts` thousandths: 500 is a half, as in Kubernetes' `500m`.
    pub const fn milli(parts: u32) -> Self {
        Self(parts as u64 * (PARTS / 1000))
    }

    /// The amount, rounded up to a ten-thousandth. Fails for what is negative, no number, or beyond four billion.
    pub fn from_f64(amount: f64) -> Result<Self, InvalidQuantity> {
        if !(0.0..=f64::from(u32::MAX)).contains(&amount) {
            return Err(InvalidQuantity(amount));
        }
        // What only looks finer than a ten-thousandth because of binary fractions is not rounded up.
        let parts = amount * PARTS as f64;
        let near = parts.round();
        Ok(Self(if (parts - near).abs() < 1e-4 { near } else { parts.ceil() } as u64))
    }

    /// The amount as a number.
    pub fn as_f64(self) -> f64 {
        self.0 as f64 / PARTS as f64
    }

    /// What is left of this after `other`; nothing if that is more.
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Quantity {
    /// How often `part` is in this.
    pub(crate) fn times(self, part: Self) -> u64 {
        self.0.checked_div(part.0).unwrap_or(u64::MAX)
    }
}

/// No amount.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{0} is no amount; write a number from 0 to 4294967295")]
pub struct InvalidQuantity(f64);

impl Add for Quantity {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Quantity {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl SubAssign for Quantity {
    fn sub_assign(&mut self, other: Self) {
        *self = self.saturating_sub(other);
    }
}

impl Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::ZERO, Add::add)
    }
}

impl From<u32> for Quantity {
    fn from(units: u32) -> Self {
        Self::whole(units)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_f64())
    }
}

impl Serialize for Quantity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_multiple_of(PARTS) {
            serializer.serialize_u64(self.0 / PARTS)
        } else {
            serializer.serialize_f64(self.as_f64())
        }
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_f64(f64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// What a node has beside its devices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Capacity {
    /// Logical CPUs that actors can reserve.
    pub cpus: u32,
    /// Bytes of memory that actors can reserve.
    pub memory: u64,
    /// Anything else, by name: licences, links, or what a device has beside itself.
    pub custom: BTreeMap<String, Quantity>,
}

impl Capacity {
    /// Says what is wrong with the names.
    pub fn validate(&self) -> Result<(), String> {
        self.custom.keys().try_for_each(|name| check_name(name))
    }
}

/// What somebody asks of a node. Reserved, so that no more is promised than there is, but not enforced.
#[derive(
    Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// Devices. An actor owns at most one, and alone; a bundle may hold several for its actors.
    pub devices: u32,
    /// Logical CPUs, or parts of one; 0 reserves none.
    pub cpus: Quantity,
    /// Bytes of memory; 0 reserves none.
    pub memory: u64,
    /// Anything else that nodes were told they have, by name.
    pub custom: BTreeMap<String, Quantity>,
}

impl Resources {
    /// One device.
    pub fn device() -> Self {
        Self { devices: 1, ..Self::default() }
    }

    /// So many CPUs.
    pub fn cpus(cpus: impl Into<Quantity>) -> Self {
        Self { cpus: cpus.into(), ..Self::default() }
    }

    /// The same with so many of a custom resource.
    pub fn with(mut self, name: impl Into<String>, amount: impl Into<Quantity>) -> Self {
        self.custom.insert(name.into(), amount.into());
        self
    }

    /// Says what is wrong with the names.
    pub fn validate(&self) -> Result<(), String> {
        self.custom.keys().try_for_each(|name| check_name(name))
    }

    /// Takes these into account, too.
    pub(crate) fn add(&mut self, other: &Self) {
        self.devices += other.devices;
        self.cpus += other.cpus;
        self.memory = self.memory.saturating_add(other.memory);
        for (name, amount) in &other.custom {
            *self.custom.entry(name.clone()).or_default() += *amount;
        }
    }

    /// No longer takes these into account.
    pub(crate) fn remove(&mut self, other: &Self) {
        self.devices = self.devices.saturating_sub(other.devices);
        self.cpus -= other.cpus;
        self.memory = self.memory.saturating_sub(other.memory);
        for (name, amount) in &other.custom {
            if let Some(sum) = self.custom.get_mut(name) {
                *sum -= *amount;
            }
        }
        self.custom.retain(|_, sum| *sum > Quantity::ZERO);
    }
}

/// Whether a custom resource may be called so.
fn check_name(name: &str) -> Result<(), String> {
    let own = ["cpu", "cpus", "gpu", "gpus", "device", "devices", "memory"];
    if own.contains(&name.to_ascii_lowercase().as_str()) {
        return Err(format!("resource {name:?} has a field of its own: use devices, cpus or memory"));
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/' | b':');
    if name.is_empty() || name.len() > 128 || !name.bytes().all(plain) {
        return Err(format!(
            "resource {name:?} must be named by 1 to 128 letters, digits, '-', '_', '.', '/' or ':'"
        ));
    }
    Ok(())
}

/// "1 device, 0.5 CPUs, 2 GiB memory", for reasons.
impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.devices > 0 {
            parts.push(format!("{} {}", self.devices, if self.devices == 1 { "device" } else { "devices" }));
        }
        if self.cpus > Quantity::ZERO {
            parts.push(format!(
                "{} {}",
                self.cpus,
                if self.cpus == Quantity::whole(1) { "CPU" } else { "CPUs" }
            ));
        }
        if self.memory > 0 {
            parts.push(format!("{} memory", bytes(self.memory)));
        }
        parts.extend(self.custom.iter().map(|(name, amount)| format!("{amount} {name}")));
        if parts.is_empty() { f.write_str("nothing") } else { f.write_str(&parts.join(", ")) }
    }
}

/// Bytes as people say them.
pub(crate) fn bytes(bytes: u64) -> String {
    let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{} {name}", (bytes as f64 / *unit as f64 * 100.0).round() / 100.0),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_unit_add_up_exactly() {
        let tenth = Quantity::from_f64(0.1).unwrap();
        assert_eq!((0..10).map(|_| tenth).sum::<Quantity>(), Quantity::whole(1));
        assert_eq!(Quantity::from_f64(1.0 / 3.0).unwrap().to_string(), "0.3334", "never less than was asked");
        assert_eq!(Quantity::milli(500).to_string(), "0.5");
        assert!(Quantity::from_f64(-0.1).is_err() && Quantity::from_f64(f64::NAN).is_err());
        let json = serde_json::to_string(&[Quantity::whole(2), Quantity::milli(250)]).unwrap();
        assert_eq!(json, "[2,0.25]");
        assert_eq!(serde_json::from_str::<Quantity>("0.25").unwrap(), Quantity::milli(250));
    }

    #[test]
    fn resources_say_what_they_are() {
        let mut asked =
            Resources { memory: 3 << 29, ..Resources::device() }.with("tpu", Quantity::milli(500));
        asked.cpus = 1.into();
        assert_eq!(asked.to_string(), "1 device, 1 CPU, 1.5 GiB memory, 0.5 tpu");
        assert!(Resources::default().with("GPU", 1).validate().unwrap_err().contains("field of its own"));
        let mut sum = asked.clone();
        sum.remove(&asked);
        assert_eq!(sum, Resources::default());
    }
}
