//! The shape of a mesh: named dimensions, and the strided parts of it that a caller may speak to.
//!
//! Pure. Ranks are numbered row by row: the last dimension varies fastest. It knows no actor and no address.

use std::fmt;
use std::ops::Range;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::spec::is_name;

/// Ranks that a mesh may have at most.
pub const RANKS_MAX: u32 = 65_536;
/// Dimensions that a mesh may have at most.
const DIMS_MAX: usize = 8;

/// Why a shape or a part of it makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum ShapeError {
    /// Nothing to spawn.
    #[error("a mesh needs 1 to {DIMS_MAX} dimensions, {0} are given")]
    Count(usize),
    /// A dimension's name cannot be used.
    #[error("dimension name {0:?}: 1 to 128 letters, digits, '-', '_' or '.' are needed")]
    Name(String),
    /// Two dimensions have one name.
    #[error("dimension {0:?} is given twice")]
    Twice(String),
    /// A dimension has no place.
    #[error("dimension {0:?} has size 0; a mesh has at least one rank")]
    Empty(String),
    /// Too many ranks.
    #[error("the dimensions have more than {RANKS_MAX} ranks in all")]
    TooLarge,
    /// No such dimension here.
    #[error("there is no dimension {name:?} here; there are: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// An index or a range is outside, or empty.
    #[error("{start}..{end} is not a part of dimension {name:?}, which has size {size}")]
    Range {
        /// The dimension.
        name: String,
        /// First index.
        start: u32,
        /// Index after the last one.
        end: u32,
        /// Its size.
        size: u32,
    },
    /// Each 0th index.
    #[error("a step of 0 through dimension {0:?}")]
    Step(String),
    /// A point names too many or too few dimensions.
    #[error("a point of this mesh has {wanted} coordinates ({known}), {given} are given")]
    Point {
        /// Dimensions there are.
        wanted: usize,
        /// Their names.
        known: String,
        /// Coordinates given.
        given: usize,
    },
}

/// Names and sizes of a mesh's dimensions, outermost first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode, Serialize, Deserialize)]
pub struct Dims(Vec<(String, u32)>);

impl Dims {
    /// For example `Dims::new([("nodes", 2), ("gpus", 8)])`.
    pub fn new<N: Into<String>>(dims: impl IntoIterator<Item = (N, u32)>) -> Result<Self, ShapeError> {
        let dims = Self(dims.into_iter().map(|(name, size)| (name.into(), size)).collect());
        dims.validate()?;
        Ok(dims)
    }

    /// Says what is wrong with a shape that came from elsewhere.
    pub fn validate(&self) -> Result<(), ShapeError> {
        if self.0.is_empty() || self.0.len() > DIMS_MAX {
            return Err(ShapeError::Count(self.0.len()));
        }
        let mut ranks: u32 = 1;
        for (i, (name, size)) in self.0.iter().enumerate() {
            if !is_name(name) {
                return Err(ShapeError::Name(name.clone()));
            }
            if self.0[..i].iter().any(|(other, _)| other == name) {
                return Err(ShapeError::Twice(name.clone()));
            }
            if *size == 0 {
                return Err(ShapeError::Empty(name.clone()));
            }
            ranks = ranks.checked_mul(*size).filter(|n| *n <= RANKS_MAX).ok_or(ShapeError::TooLarge)?;
        }
        Ok(())
    }

    /// Number of ranks.
    pub fn ranks(&self) -> u32 {
        self.0.iter().map(|(_, size)| size).product()
    }

    /// Names and sizes, outermost first.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.0.iter().map(|(name, size)| (name.as_str(), *size))
    }

    /// The whole mesh as a slice.
    pub fn all(&self) -> Slice {
        let mut stride = self.ranks();
        let axis = |(name, size): &(String, u32)| {
            stride /= size;
            Axis { name: name.clone(), size: *size, stride }
        };
        Slice { axes: self.0.iter().map(axis).collect(), offset: 0 }
    }

    /// The rank at a point; every dimension must be named, in any order.
    pub fn rank_of(&self, point: &[(&str, u32)]) -> Result<u32, ShapeError> {
        let mut slice = self.all();
        for (name, index) in point {
            slice = slice.at(name, *index)?;
        }
        match slice.axes.is_empty() {
            true => Ok(slice.offset),
            false => {
                Err(ShapeError::Point { wanted: self.0.len(), known: self.all().names(), given: point.len() })
            }
        }
    }

    /// Where a rank is.
    pub fn point_of(&self, rank: u32) -> Option<Point> {
        self.all().point(rank)
    }
}

impl fmt::Display for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.iter().map(|(name, size)| format!("{name}={size}")).collect();
        f.write_str(&dims.join(" x "))
    }
}

/// Coordinates of a rank, outermost dimension first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Point(Vec<(String, u32)>);

impl Point {
    /// The index along a dimension.
    pub fn get(&self, name: &str) -> Option<u32> {
        self.0.iter().find(|(own, _)| own == name).map(|(_, index)| *index)
    }

    /// All coordinates.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.0.iter().map(|(name, index)| (name.as_str(), *index))
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let point: Vec<String> = self.iter().map(|(name, index)| format!("{name} {index}")).collect();
        f.write_str(&point.join(", "))
    }
}

/// One dimension of a slice.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
struct Axis {
    name: String,
    size: u32,
    /// How far apart in rank two neighbours along it are.
    stride: u32,
}

/// A box in a mesh, with a step along each dimension. Its members have *positions* 0, 1, ... in rank order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Slice {
    axes: Vec<Axis>,
    /// Rank of the first member.
    offset: u32,
}

impl Slice {
    /// The part whose index along `name` is in `range`.
    pub fn range(&self, name: &str, range: Range<u32>) -> Result<Self, ShapeError> {
        let i = self.axis(name)?;
        let (Range { start, end }, size) = (range, self.axes[i].size);
        if start >= end || end > size {
            return Err(ShapeError::Range { name: name.to_owned(), start, end, size });
        }
        let mut part = self.clone();
        part.offset += start * part.axes[i].stride;
        part.axes[i].size = end - start;
        Ok(part)
    }

    /// The part at one index along `name`; that dimension is gone from it.
    pub fn at(&self, name: &str, index: u32) -> Result<Self, ShapeError> {
        let mut part = self.range(name, index..index.saturating_add(1))?;
        let i = part.axis(name)?;
        part.axes.remove(i);
        Ok(part)
    }

    /// Each `step`th index along `name`, from the first on.
    pub fn every(&self, name: &str, step: u32) -> Result<Self, ShapeError> {
        let i = self.axis(name)?;
        if step == 0 {
            return Err(ShapeError::Step(name.to_owned()));
        }
        let mut part = self.clone();
        let axis = &mut part.axes[i];
        axis.size = axis.size.div_ceil(step);
        // With one index left the stride is of no consequence, and must not grow out of bounds.
        axis.stride = if axis.size == 1 { axis.stride } else { axis.stride * step };
        Ok(part)
    }

    /// One slice for each index along `name`, without that dimension: the rows of a matrix, say.
    pub fn each(&self, name: &str) -> Result<Vec<Self>, ShapeError> {
        let size = self.axes[self.axis(name)?].size;
        (0..size).map(|index| self.at(name, index)).collect()
    }

    /// Number of members.
    #[allow(clippy::len_without_is_empty, reason = "a slice is never empty")]
    pub fn len(&self) -> u32 {
        self.axes.iter().map(|axis| axis.size).product()
    }

    /// Names and sizes of the dimensions that are left, outermost first.
    pub fn dims(&self) -> impl Iterator<Item = (&str, u32)> {
        self.axes.iter().map(|axis| (axis.name.as_str(), axis.size))
    }

    /// Ranks of the members, in order of position, which is ascending.
    pub fn ranks(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.len()).filter_map(|position| self.rank(position))
    }

    /// Rank in the mesh of the member at a position.
    pub fn rank(&self, position: u32) -> Option<u32> {
        let mut left = position;
        let mut rank = self.offset;
        for axis in self.axes.iter().rev() {
            rank += (left % axis.size) * axis.stride;
            left /= axis.size;
        }
        (left == 0).then_some(rank)
    }

    /// Coordinates within the slice of the member at a position.
    pub fn point(&self, position: u32) -> Option<Point> {
        let mut left = position;
        let mut point = Vec::with_capacity(self.axes.len());
        for axis in self.axes.iter().rev() {
            point.push((axis.name.clone(), left % axis.size));
            left /= axis.size;
        }
        point.reverse();
        (left == 0).then_some(Point(point))
    }

    /// Whether all members of a slice that came over the wire are ranks below `ranks`. Until this was asked its
    /// numbers may be anything.
    pub(crate) fn fits(&self, ranks: u32) -> bool {
        let mut members: u32 = 1;
        let mut last = Some(self.offset);
        for axis in &self.axes {
            let Some(steps) = axis.size.checked_sub(1) else { return false };
            let Some(all) = members.checked_mul(axis.size).filter(|all| *all <= ranks) else { return false };
            members = all;
            last = last.and_then(|last| last.checked_add(steps.checked_mul(axis.stride)?));
        }
        self.axes.len() <= DIMS_MAX && last.is_some_and(|last| last < ranks)
    }

    fn axis(&self, name: &str) -> Result<usize, ShapeError> {
        let found = self.axes.iter().position(|axis| axis.name == name);
        found.ok_or_else(|| ShapeError::Unknown { name: name.to_owned(), known: self.names() })
    }

    fn names(&self) -> String {
        let names: Vec<&str> = self.axes.iter().map(|axis| axis.name.as_str()).collect();
        if names.is_empty() { "none, it is one rank".to_owned() } else { names.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dims() -> Dims {
        Dims::new([("nodes", 2), ("gpus", 4)]).unwrap()
    }

    fn ranks(slice: &Slice) -> Vec<u32> {
        slice.ranks().collect()
    }

    #[test]
    fn ranks_run_through_the_last_dimension_first() {
        let dims = dims();
        assert_eq!(dims.ranks(), 8);
        assert_eq!(dims.rank_of(&[("nodes", 1), ("gpus", 2)]), Ok(6));
        assert_eq!(dims.rank_of(&[("gpus", 2), ("nodes", 1)]), Ok(6));
        assert_eq!(dims.point_of(6).unwrap().to_string(), "nodes 1, gpus 2");
        assert_eq!((dims.point_of(6).unwrap().get("gpus"), dims.point_of(8)), (Some(2), None));
        assert_eq!(dims.to_string(), "nodes=2 x gpus=4");
    }

    #[test]
    fn slices_of_slices() {
        let all = dims().all();
        assert_eq!(ranks(&all.range("gpus", 1..3).unwrap()), [1, 2, 5, 6]);
        assert_eq!(ranks(&all.at("nodes", 1).unwrap()), [4, 5, 6, 7]);
        assert_eq!(ranks(&all.at("gpus", 1).unwrap()), [1, 5]);
        assert_eq!(ranks(&all.every("gpus", 2).unwrap()), [0, 2, 4, 6]);
        let odd = all.range("gpus", 1..4).unwrap().every("gpus", 2).unwrap();
        assert_eq!(ranks(&odd), [1, 3, 5, 7]);
        assert_eq!(ranks(&odd.at("gpus", 1).unwrap().at("nodes", 1).unwrap()), [7]);
        let columns = all.each("gpus").unwrap();
        assert_eq!(columns.iter().map(ranks).collect::<Vec<_>>(), [[0, 4], [1, 5], [2, 6], [3, 7]]);
        assert_eq!(odd.point(3).unwrap().to_string(), "nodes 1, gpus 1");
        assert_eq!((odd.rank(4), odd.len()), (None, 4));
    }

    #[test]
    fn a_mistake_is_named() {
        let why = |result: Result<Slice, ShapeError>| result.unwrap_err().to_string();
        let all = dims().all();
        assert_eq!(why(all.at("gpu", 0)), "there is no dimension \"gpu\" here; there are: nodes, gpus");
        assert_eq!(why(all.at("gpus", 4)), "4..5 is not a part of dimension \"gpus\", which has size 4");
        assert!(why(all.range("gpus", 2..2)).contains("2..2"));
        assert!(why(all.every("gpus", 0)).contains("step of 0"));
        let gone = all.at("gpus", 0).unwrap().at("nodes", 0).unwrap();
        assert!(why(gone.at("gpus", 0)).contains("none, it is one rank"));
        let why = |dims: &[(&str, u32)]| Dims::new(dims.iter().copied()).unwrap_err().to_string();
        assert!(why(&[]).contains("1 to 8 dimensions"));
        assert!(why(&[("a", 2), ("a", 2)]).contains("twice"));
        assert!(why(&[("a", 0)]).contains("size 0"));
        assert!(why(&[("a b", 1)]).contains("letters"));
        assert!(why(&[("a", u32::MAX), ("b", u32::MAX)]).contains("more than 65536 ranks"));
        assert!(
            dims().rank_of(&[("gpus", 0)]).unwrap_err().to_string().contains("(nodes, gpus), 1 are given")
        );
    }

    #[test]
    fn a_slice_from_the_wire_is_checked_before_it_is_used() {
        let axis = |size, stride| Axis { name: "a".into(), size, stride };
        let fits = |axes: Vec<Axis>, offset| Slice { axes, offset }.fits(8);
        assert!(fits(vec![axis(2, 4), axis(4, 1)], 0) && fits(vec![], 7));
        assert!(!fits(vec![axis(2, 4), axis(4, 1)], 1), "its last rank would be 8");
        assert!(!fits(vec![axis(0, 1)], 0) && !fits(vec![], 8));
        assert!(!fits(vec![axis(u32::MAX, u32::MAX)], 0) && !fits(vec![axis(3, u32::MAX)], 0));
        assert!(!fits(vec![axis(8, 0); 9], 0));
    }

    proptest! {
        /// A slice holds the ranks whose coordinates are in it, ascending, and each position is found again.
        #[test]
        fn a_slice_is_what_its_ranges_say(
            sizes in prop::collection::vec(1u32..5, 1..4),
            cuts in prop::collection::vec((0u32..5, 1u32..5, 1u32..4), 3),
        ) {
            let names = ["a", "b", "c"];
            let dims = Dims::new(names.into_iter().zip(sizes.iter().copied())).unwrap();
            let mut slice = dims.all();
            let mut wanted: Vec<u32> = (0..dims.ranks()).collect();
            for ((name, size), (start, len, step)) in dims.iter().zip(cuts) {
                let start = start.min(size - 1);
                let end = (start + len).min(size);
                slice = slice.range(name, start..end).unwrap().every(name, step).unwrap();
                wanted.retain(|rank| {
                    let index = dims.point_of(*rank).unwrap().get(name).unwrap();
                    (start..end).contains(&index) && (index - start).is_multiple_of(step)
                });
            }
            prop_assert_eq!(slice.ranks().collect::<Vec<_>>(), wanted);
            prop_assert!(slice.fits(dims.ranks()));
        }
    }
}
