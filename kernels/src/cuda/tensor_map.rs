//! Descriptions of tensors for the bulk copy engine (TMA).

use cudarc::driver::sys;

use super::CudaError;
use super::error::check;

/// Element of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TmaElement {
    /// 2 bytes.
    Bf16,
    /// 1 byte; FP8 codes too.
    U8,
    /// 4 bytes.
    F32,
}

/// How 16-byte units are permuted in shared memory so that banks do not clash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// Within rows of 64 bytes.
    B64,
    /// Within rows of 128 bytes.
    B128,
}

/// A tensor in device memory and the tile that is copied at once. Innermost dimension first.
#[derive(Clone, Copy, Debug)]
pub struct TiledLayout<'a> {
    /// Element.
    pub element: TmaElement,
    /// Where it begins; a multiple of 16.
    pub address: u64,
    /// Elements along each dimension. Beyond them copies read zeros.
    pub dims: &'a [u64],
    /// Bytes from one index to the next, of all dimensions but the innermost; multiples of 16.
    pub strides_bytes: &'a [u64],
    /// Elements of a tile along each dimension.
    pub tile: &'a [u32],
    /// Permutation in shared memory.
    pub swizzle: Swizzle,
}

/// A description as kernels take it, by value.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// Encodes a description.
    ///
    /// # Errors
    /// The layout breaks a rule of the copy engine.
    ///
    /// # Panics
    /// If the slices do not fit each other.
    pub fn tiled(layout: TiledLayout<'_>) -> Result<Self, CudaError> {
        let rank = layout.dims.len();
        assert!(
            rank == layout.tile.len() && rank == layout.strides_bytes.len() + 1,
            "tensor map of rank {rank}"
        );
        let element = match layout.element {
            TmaElement::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            TmaElement::U8 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            TmaElement::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match layout.swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let steps = vec![1u32; rank];
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: all arrays have `rank` entries (strides one fewer), `map` is a valid, aligned place.
        check("cuTensorMapEncodeTiled", unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                element,
                rank as u32,
                layout.address as *mut _,
                layout.dims.as_ptr(),
                layout.strides_bytes.as_ptr(),
                layout.tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        })?;
        Ok(Self(map.opaque))
    }
}
