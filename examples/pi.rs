//! Stateless functions on a pool of workers: map, then reduce.
//!
//! `helio submit target/debug/examples/pi -- 8`

#![allow(clippy::print_stdout, reason = "a driver prints its result")]

use heliostat::prelude::*;

heliostat::functions! {
    /// How many of the cells of a grid have their middle in the quarter circle: rows `from..to` of `size`.
    fn inside(from: u64, to: u64, size: u64) -> u64 {
        let middle = |n: u64| (2 * n + 1) * (2 * n + 1);
        let row = |y: u64| (0..size).take_while(|x| middle(*x) + middle(y) < 4 * size * size).count() as u64;
        (from..to).map(row).sum()
    }
}

/// Cells of a side of the grid.
const SIZE: u64 = 2048;

fn main() -> std::process::ExitCode {
    Program::new("pi", env!("CARGO_PKG_VERSION")).function::<inside>().run(driver)
}

async fn driver(driver: Driver) -> Result<(), BoxError> {
    let parts: u64 = driver.args().first().map_or(Ok(8), |text| text.parse())?;
    let pool = driver.functions(PoolOptions { workers: 3, ..PoolOptions::default() }).await?;
    let rows = |part| (SIZE * part / parts, SIZE * (part + 1) / parts, SIZE);
    let counts = pool.map::<inside>((0..parts).map(rows)).await?;
    let pi = 4.0 * counts.iter().sum::<u64>() as f64 / (SIZE * SIZE) as f64;
    println!("pi is about {pi:.3}");
    pool.close().await?;
    Ok(())
}
