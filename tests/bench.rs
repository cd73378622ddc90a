//! `helio bench` where there is nothing to measure.

use std::process::Command;

#[test]
fn without_a_gpu_it_says_so_and_fails() {
    for what in ["ops", "slice"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_helio"));
        // Hides GPUs where there are any.
        let output = command.args(["bench", what]).env("CUDA_VISIBLE_DEVICES", "").output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("error: helio bench measures an NVIDIA GPU, and "), "{said}");
        assert!(said.contains("driver"), "{said}");
        assert!(output.stdout.is_empty(), "{what} printed something");
    }
}
