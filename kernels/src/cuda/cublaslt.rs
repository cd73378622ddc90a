//! Matrix products by cuBLASLt: what our own are measured against, and nothing that serves.
//!
//! The library is loaded when the first [`CublasLt`] is made. Both kinds that it has for our layouts: BF16, also one
//! matrix per head, and FP8 with a scale per 128 of a row of x and per 128 x 128 of w.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

use libloading::os::unix::Library;

use super::gemm::{Kind, Operand, Output};
use super::library::{function, preload};
use super::{Buffer, CudaError, Device, StoredAs, Stream, WeightStack};

/// As for NVIDIA's own frameworks on this chip.
const WORKSPACE_BYTES: usize = 32 << 20;

// Values of enumerations in cublasLt.h, library_types.h and cublas_api.h. Plain numbers: a newer library may know more.
const SUCCESS: c_int = 0;
const COMPUTE_F32: c_int = 68;
const TYPE_F32: c_int = 0;
const TYPE_BF16: c_int = 14;
const TYPE_E4M3: c_int = 28;
const TRANSPOSED: i32 = 1;
const DESC_TRANSPOSE_A: c_int = 3;
const DESC_SCALE_POINTERS: [c_int; 2] = [17, 18];
const DESC_SCALE_MODES: [c_int; 2] = [31, 32];
const SCALE_PER_128: i32 = 4;
const SCALE_PER_128_X_128: i32 = 5;
const LAYOUT_BATCH_COUNT: c_int = 5;
const LAYOUT_BATCH_OFFSET: c_int = 6;
const PREFERENCE_WORKSPACE: c_int = 1;

type Raw = *mut c_void;
type SetAttribute = unsafe extern "C" fn(Raw, c_int, *const c_void, usize) -> c_int;
type Destroy = unsafe extern "C" fn(Raw) -> c_int;

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

type Heuristics =
    unsafe extern "C" fn(Raw, Raw, Raw, Raw, Raw, Raw, Raw, c_int, *mut Heuristic, *mut c_int) -> c_int;
type Matmul = unsafe extern "C" fn(
    Raw,
    Raw,
    *const c_void,
    *const c_void,
    Raw,
    *const c_void,
    Raw,
    *const c_void,
    *const c_void,
    Raw,
    Raw,
    Raw,
    *const [u64; 8],
    Raw,
    usize,
    Raw,
) -> c_int;

/// The functions of the library.
#[derive(Debug)]
struct Api {
    create: unsafe extern "C" fn(*mut Raw) -> c_int,
    destroy: Destroy,
    desc_create: unsafe extern "C" fn(*mut Raw, c_int, c_int) -> c_int,
    desc_set: SetAttribute,
    desc_destroy: Destroy,
    layout_create: unsafe extern "C" fn(*mut Raw, c_int, u64, u64, i64) -> c_int,
    layout_set: SetAttribute,
    layout_destroy: Destroy,
    preference_create: unsafe extern "C" fn(*mut Raw) -> c_int,
    preference_set: SetAttribute,
    preference_destroy: Destroy,
    heuristics: Heuristics,
    matmul: Matmul,
    _library: Library,
}

impl Api {
    /// The library, loaded once for the process.
    fn load(dirs: &[PathBuf]) -> Result<&'static Self, CudaError> {
        static LOADED: OnceLock<Api> = OnceLock::new();
        if let Some(api) = LOADED.get() {
            return Ok(api);
        }
        let api = Self::open(preload("libcublasLt.so.13", "nvidia-cublas", dirs)?)?;
        Ok(LOADED.get_or_init(|| api))
    }

    fn open(library: Library) -> Result<Self, CudaError> {
        // The types of the fields are those of the functions in cublasLt.h.
        Ok(Self {
            create: function!(library, "libcublasLt.so.13", "cublasLtCreate"),
            destroy: function!(library, "libcublasLt.so.13", "cublasLtDestroy"),
            desc_create: function!(library, "libcublasLt.so.13", "cublasLtMatmulDescCreate"),
            desc_set: function!(library, "libcublasLt.so.13", "cublasLtMatmulDescSetAttribute"),
            desc_destroy: function!(library, "libcublasLt.so.13", "cublasLtMatmulDescDestroy"),
            layout_create: function!(library, "libcublasLt.so.13", "cublasLtMatrixLayoutCreate"),
            layout_set: function!(library, "libcublasLt.so.13", "cublasLtMatrixLayoutSetAttribute"),
            layout_destroy: function!(library, "libcublasLt.so.13", "cublasLtMatrixLayoutDestroy"),
            preference_create: function!(library, "libcublasLt.so.13", "cublasLtMatmulPreferenceCreate"),
            preference_set: function!(library, "libcublasLt.so.13", "cublasLtMatmulPreferenceSetAttribute"),
            preference_destroy: function!(library, "libcublasLt.so.13", "cublasLtMatmulPreferenceDestroy"),
            heuristics: function!(library, "libcublasLt.so.13", "cublasLtMatmulAlgoGetHeuristic"),
            matmul: function!(library, "libcublasLt.so.13", "cublasLtMatmul"),
            _library: library,
        })
    }
}

fn check(call: &'static str, status: c_int) -> Result<(), CudaError> {
    match status {
        SUCCESS => Ok(()),
        status => Err(CudaError::Other(format!("{call} failed: cuBLAS status {status}"))),
    }
}

/// Something of the library's, destroyed with its owner.
#[derive(Debug)]
struct Owned {
    raw: Raw,
    destroy: Destroy,
}

impl Owned {
    fn new(
        call: &'static str,
        destroy: Destroy,
        create: impl FnOnce(*mut Raw) -> c_int,
    ) -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        check(call, create(&mut raw))?;
        Ok(Self { raw, destroy })
    }

    /// Sets an attribute whose type in cublasLt.h is `T`.
    fn set<T: Copy>(&self, set: SetAttribute, attribute: c_int, value: T) -> Result<(), CudaError> {
        // SAFETY: the object is alive; the library copies so many bytes and refuses a size that it does not expect.
        let status = unsafe { set(self.raw, attribute, (&raw const value).cast(), size_of::<T>()) };
        check("cublasLt...SetAttribute", status)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once, by the function of its kind.
        unsafe { (self.destroy)(self.raw) };
    }
}

/// The library on one device.
#[derive(Debug)]
pub struct CublasLt {
    api: &'static Api,
    handle: Owned,
    device: Device,
    workspace: Buffer<u8>,
}

/// A product of one shape, ready to be run again and again. Keeps what it reads and writes alive.
#[derive(Debug)]
pub struct Product<'a> {
    library: &'a CublasLt,
    desc: Owned,
    w: Owned,
    x: Owned,
    y: Owned,
    algorithm: [u64; 8],
    workspace_bytes: usize,
    addresses: [u64; 3],
    _buffers: [Buffer<u8>; 5],
}

/// One of the three matrices, in the library's words: column-major.
#[derive(Clone, Copy)]
struct Layout {
    element: c_int,
    rows: usize,
    columns: usize,
    stride: usize,
    batch_offset: usize,
}

impl CublasLt {
    /// Loads the library from `dirs`, the loader's path or where toolkits lie.
    ///
    /// # Errors
    /// It is not there.
    pub fn new(device: &Device, dirs: &[PathBuf]) -> Result<Self, CudaError> {
        let api = Api::load(dirs)?;
        let workspace = device.alloc(WORKSPACE_BYTES)?;
        // SAFETY: the allocation bound the context; the place is valid.
        let handle = Owned::new("cublasLtCreate", api.destroy, |place| unsafe { (api.create)(place) })?;
        Ok(Self { api, handle, device: device.clone(), workspace })
    }

    /// The product of `rows` rows of x with `w`, as [`super::gemm::Gemm`] takes them: [`Kind::Dense`], or [`Kind::Heads`]
    /// with heads side by side in the rows of x and y. `None` where the library has no kernel for it, or no such kind.
    ///
    /// # Errors
    /// The library refuses the description.
    ///
    /// # Panics
    /// If buffers are too short, or x is not stored as `w` is.
    pub fn product<'a>(
        &'a self,
        (w, kind): (&WeightStack, Kind),
        x: Operand<'_>,
        rows: usize,
        y: Output<'_>,
    ) -> Result<Option<Product<'a>>, CudaError> {
        let (all, k) = w.shape();
        let heads = match kind {
            Kind::Dense => 1,
            Kind::Heads(heads) => heads,
            Kind::Pool => return Ok(None),
        };
        let n = all / heads;
        let (x_data, x_scales, x_stride, element) = match x {
            Operand::Bf16 { data, stride } => (data.cast(), None, stride, TYPE_BF16),
            Operand::Fp8 { codes, scales, rows_stride } => {
                // The library knows no such stride, and wants its columns of scales of w in fours.
                if rows_stride != rows || !k.div_ceil(128).is_multiple_of(4) {
                    return Ok(None);
                }
                (codes.clone(), Some(scales), k, TYPE_E4M3)
            }
        };
        let (y_data, y_stride, y_element) = match y {
            Output::Bf16 { data, stride } => (data.cast::<u8>(), stride, TYPE_BF16),
            Output::F32 { data, stride } => (data.cast(), stride, TYPE_F32),
            Output::Scattered { .. } => return Ok(None),
        };
        let element_bytes = if element == TYPE_E4M3 { 1 } else { 2 };
        let y_bytes = if y_element == TYPE_F32 { 4 } else { 2 };
        assert_eq!(w.stored() == StoredAs::Fp8, x_scales.is_some(), "how x is stored");
        assert!(rows > 0 && x_stride >= heads * k && y_stride >= heads * n, "cublasLt: strides");
        assert!(x_data.len() >= ((rows - 1) * x_stride + heads * k) * element_bytes, "cublasLt: length of x");
        assert!(y_data.len() >= ((rows - 1) * y_stride + heads * n) * y_bytes, "cublasLt: length of y");
        assert!(
            x_scales.is_none_or(|scales| scales.len() >= k.div_ceil(128) * rows),
            "cublasLt: scales of x"
        );
        let [w_scales, x_scales] = [w.scales(), x_scales].map(|scales| scales.map(Buffer::cast::<u8>));
        let desc = self.describe([&w_scales, &x_scales])?;
        let batched = |layout: Layout| self.layout(&layout, heads);
        let w_layout = batched(Layout { element, rows: k, columns: n, stride: k, batch_offset: n * k })?;
        let x_layout =
            batched(Layout { element, rows: k, columns: rows, stride: x_stride, batch_offset: k })?;
        let y_layout = batched(Layout {
            element: y_element,
            rows: n,
            columns: rows,
            stride: y_stride,
            batch_offset: n,
        })?;
        let Some(best) = self.best(&desc, [&w_layout, &x_layout, &y_layout])? else { return Ok(None) };
        let none = || self.workspace.clone();
        Ok(Some(Product {
            library: self,
            desc,
            w: w_layout,
            x: x_layout,
            y: y_layout,
            algorithm: best.algorithm,
            workspace_bytes: best.workspace_bytes,
            addresses: [w.data().address(), x_data.address(), y_data.address()],
            _buffers: [
                w.data().clone(),
                x_data,
                y_data,
                w_scales.unwrap_or_else(none),
                x_scales.unwrap_or_else(none),
            ],
        }))
    }

    /// `y = w^T x` in columns, which is `x w^T` in rows.
    fn describe(&self, scales: [&Option<Buffer<u8>>; 2]) -> Result<Owned, CudaError> {
        let api = self.api;
        let desc = Owned::new("cublasLtMatmulDescCreate", api.desc_destroy, |place| {
            // SAFETY: the place is valid.
            unsafe { (api.desc_create)(place, COMPUTE_F32, TYPE_F32) }
        })?;
        desc.set(api.desc_set, DESC_TRANSPOSE_A, TRANSPOSED)?;
        for (index, mode) in [SCALE_PER_128_X_128, SCALE_PER_128].into_iter().enumerate() {
            if let Some(scales) = scales[index] {
                desc.set(api.desc_set, DESC_SCALE_MODES[index], mode)?;
                desc.set(api.desc_set, DESC_SCALE_POINTERS[index], scales.address())?;
            }
        }
        Ok(desc)
    }

    fn layout(&self, layout: &Layout, heads: usize) -> Result<Owned, CudaError> {
        let (api, Layout { element, rows, columns, stride, batch_offset }) = (self.api, *layout);
        let made = Owned::new("cublasLtMatrixLayoutCreate", api.layout_destroy, |place| {
            // SAFETY: the place is valid.
            unsafe { (api.layout_create)(place, element, rows as u64, columns as u64, stride as i64) }
        })?;
        if heads > 1 {
            made.set(api.layout_set, LAYOUT_BATCH_COUNT, heads as i32)?;
            made.set(api.layout_set, LAYOUT_BATCH_OFFSET, batch_offset as i64)?;
        }
        Ok(made)
    }

    /// What the library itself would take.
    fn best(&self, desc: &Owned, [w, x, y]: [&Owned; 3]) -> Result<Option<Heuristic>, CudaError> {
        let api = self.api;
        let preference = Owned::new("cublasLtMatmulPreferenceCreate", api.preference_destroy, |place| {
            // SAFETY: the place is valid.
            unsafe { (api.preference_create)(place) }
        })?;
        preference.set(api.preference_set, PREFERENCE_WORKSPACE, WORKSPACE_BYTES as u64)?;
        let mut best =
            Heuristic { algorithm: [0; 8], workspace_bytes: 0, state: 0, waves: 0.0, reserved: [0; 4] };
        let mut found = 0;
        self.device.bind()?;
        // SAFETY: all objects are alive, and there is a place for the one result that is asked for.
        let status = unsafe {
            (api.heuristics)(
                self.handle.raw,
                desc.raw,
                w.raw,
                x.raw,
                y.raw,
                y.raw,
                preference.raw,
                1,
                &mut best,
                &mut found,
            )
        };
        // What it cannot do it says by an error.
        Ok((status == SUCCESS && found > 0 && best.state == SUCCESS).then_some(best))
    }
}

impl Product<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// The device is lost.
    pub fn run(&self, stream: &Stream) -> Result<(), CudaError> {
        let [w, x, y] = self.addresses.map(|address| address as Raw);
        let (one, zero) = (1f32, 0f32);
        let library = self.library;
        library.device.bind()?;
        // SAFETY: layouts and addresses are those that were checked when it was made, and the buffers are kept alive; the
        // factors are f32 on the host, which the call reads; with a factor of 0, y is not read.
        let status = unsafe {
            (library.api.matmul)(
                library.handle.raw,
                self.desc.raw,
                (&raw const one).cast(),
                w,
                self.w.raw,
                x,
                self.x.raw,
                (&raw const zero).cast(),
                y,
                self.y.raw,
                y,
                self.y.raw,
                &self.algorithm,
                library.workspace.address() as Raw,
                self.workspace_bytes,
                stream.raw().cast(),
            )
        };
        check("cublasLtMatmul", status)
    }
}
