//! CUDA devices: Hopper GPUs through the driver API, with kernels compiled at run time by NVRTC.
//!
//! Nothing is linked: driver, NVRTC and NCCL are loaded when a device is opened, so one binary serves machines with
//! and without GPUs. A file here owns one family of kernels, with its source of the same stem under `cu/`.
//!
//! Device memory is owned by [`Buffer`]s and never borrowed: what kernels do to it is ordered by streams, which the
//! borrow checker cannot see. A kernel that reads what another stream still writes reads nonsense, but host memory is
//! out of its reach, so such a mistake is a wrong result and never undefined behaviour on the host.

pub mod activation;
pub mod attention;
pub mod checksum;
pub mod cublaslt;
pub mod fault;
pub mod norm;
pub mod rope;
pub mod router;
pub mod rows;
pub mod sample;
pub mod synthetic;

mod compile;
mod device;
mod error;
pub mod exchange;
pub mod gemm;
mod graph;
pub mod heap;
mod kernel;
mod library;
mod memory;
pub mod nccl;
mod stack;
mod stream;
mod tensor_map;

pub use compile::{Compiler, Source};
pub use device::{Device, DeviceOptions, Properties};
pub use error::CudaError;
pub use graph::Graph;
pub use kernel::{Kernel, Launch, Module, Params};
pub use memory::{Buffer, Element, Pinned};
pub use stack::{StoredAs, WeightStack};
pub use stream::{Event, KernelTime, Priority, Stream};
pub use tensor_map::{Swizzle, TensorMap, TiledLayout, TmaElement};
