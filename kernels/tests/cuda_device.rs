//! The foundation of CUDA devices: compiling, launching, copying, recording.

mod cuda_support;

use cuda_support::{assert_compiles, device};
use heliostat_kernels::cuda::fault::break_device;
use heliostat_kernels::cuda::{CudaError, Launch, Params, Priority, Source};

const TEXT: &str = r#"
#include "common.cuh"
struct Params { u64 data; u32 len; u32 add; };
extern "C" __global__ void add(const __grid_constant__ Params p) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.len) ((u32*)p.data)[i] += p.add;
}
"#;

#[repr(C)]
#[derive(Clone, Copy)]
struct Add {
    data: u64,
    len: u32,
    add: u32,
}

// SAFETY: the same fields as `Params` above.
unsafe impl Params for Add {}

#[test]
fn compiles() {
    assert_compiles([Source::new("add", TEXT)]);
}

#[test]
fn kernels_run_in_order_and_from_a_recording() {
    let Some(device) = device() else { return };
    let stream = device.stream(Priority::High).unwrap();
    let kernel = device.module(&Source::new("add", TEXT)).unwrap().kernel("add").unwrap();
    let data = device.upload(&(0..1000).collect::<Vec<u32>>()).unwrap();
    let params = Add { data: data.address(), len: 1000, add: 7 };
    // SAFETY: the kernel takes `Add`, and `data` has 1000 elements.
    let add = |stream: &_| unsafe { kernel.launch(stream, &Launch::new(4, 256), &params) };
    add(&stream).unwrap();
    let graph = stream.capture(add).unwrap();
    for _ in 0..3 {
        graph.launch(&stream).unwrap();
    }
    let want: Vec<u32> = (28..1028).collect();
    assert_eq!(data.download(&stream).unwrap(), want);
    let pinned = device.pinned::<u32>(10).unwrap();
    data.slice(990..1000).copy_to_pinned(&stream, &pinned, 10).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(pinned.read(0..10), want[990..]);
}

#[test]
fn errors_name_what_is_wrong() {
    let Some(device) = device() else { return };
    let source = Source::new("broken", "extern \"C\" __global__ void k() { nonsense(); }");
    let Err(CudaError::Compile { source_name: "broken", log }) = device.module(&source) else {
        panic!("compiled")
    };
    assert!(log.contains("nonsense"), "{log}");
    let (free, total) = device.memory().unwrap();
    let Err(CudaError::OutOfMemory { asked, .. }) = device.alloc::<u8>(total as usize * 2) else {
        panic!("allocated more than there is")
    };
    assert!(asked > free);
    assert!(device.module(&Source::new("add", TEXT)).unwrap().kernel("subtract").is_err());
}

/// A kernel that writes where nothing is breaks its context for good, so it runs in a process of its own, as the next one.
#[test]
#[ignore = "started by the test below"]
fn a_wild_write() {
    let device = device().expect("the parent saw one");
    let stream = device.stream(Priority::High).unwrap();
    let kernel = device.module(&Source::new("add", TEXT)).unwrap().kernel("add").unwrap();
    let params = Add { data: 64, len: 1000, add: 7 };
    // SAFETY: none: this is the fault under test, and the process ends after it.
    unsafe { kernel.launch(&stream, &Launch::new(4, 256), &params) }.unwrap();
    let why = stream.synchronize().unwrap_err();
    assert!(why.is_fatal(), "{why}");
    assert!(device.alloc::<u32>(1).unwrap_err().is_fatal());
    println!("named: {why}");
}

#[test]
#[ignore = "started by the test below"]
fn a_trap() {
    let device = device().expect("the parent saw one");
    let (stream, idle) = (device.stream(Priority::High).unwrap(), device.stream(Priority::Low).unwrap());
    idle.check().unwrap();
    break_device(&stream).unwrap();
    let why = stream.synchronize().unwrap_err();
    assert!(why.is_fatal(), "{why}");
    let why = idle.check().unwrap_err();
    assert!(why.is_fatal(), "who looks at another stream hears of it, too: {why}");
    println!("named: {why}");
}

#[test]
fn a_broken_context_is_known_as_such() {
    if device().is_none() {
        return;
    }
    for (fault, words) in [("a_wild_write", "CUDA_ERROR_ILLEGAL_ADDRESS"), ("a_trap", "CUDA_ERROR_")] {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", fault, "--ignored", "--nocapture"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains(words), "{said}");
        println!("{fault}: {}", said.lines().find(|line| line.starts_with("named")).unwrap_or_default());
    }
}
