//! Checksums.

use heliostat_kernels::cuda::checksum::{Checksum, plain};

use crate::Gpu;

/// Bytes without a pattern.
fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let byte = |at: u64| ((at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    (0..len as u64).map(byte).collect()
}

#[test]
fn the_plain_checksum_is_what_it_was_and_sees_every_change() {
    assert_eq!(plain(&[]), 0);
    // SplitMix64's first number after seed 0.
    assert_eq!(plain(&[&[0; 4]]), 0xe220_a839_7b1d_cdaf);
    let data = bytes(64, 3);
    let whole = plain(&[&data]);
    assert_eq!(plain(&[&data[..20], &[], &data[20..]]), whole, "how it is cut does not matter");
    for at in 0..data.len() {
        let mut changed = data.clone();
        changed[at] ^= 0x10;
        assert_ne!(plain(&[&changed]), whole, "byte {at}");
    }
    let mut swapped = data.clone();
    swapped.swap(0, 8);
    assert_ne!(plain(&[&swapped]), whole, "order matters");
}

#[test]
fn checksums_are_those_of_the_plain_version() {
    let Some(gpu) = Gpu::open() else { return };
    let checksum = Checksum::new(&gpu.device).unwrap();
    let sum = gpu.up(&[7u64, 7]);
    for lens in [vec![0], vec![4], vec![4 * 1000, 0, 12], vec![1 << 20, 4 * 77, 4 * 300_001, 256], vec![]] {
        let parts: Vec<Vec<u8>> = (1u64..).zip(&lens).map(|(seed, &len)| bytes(len, seed)).collect();
        let on_device: Vec<_> = parts.iter().map(|part| gpu.up(part)).collect();
        checksum.queue(&gpu.stream, &on_device, &sum).unwrap();
        let want = plain(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
        assert_eq!(gpu.down(&sum), [want, 7], "{lens:?}");
    }
}
