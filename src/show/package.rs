//! Packages as a table.

use super::{render, table};
use heliostat_runtime::package::PackageStatus;

/// All packages.
pub(crate) fn list(packages: &[PackageStatus]) -> String {
    let mut rows = table(["package", "version", "sha256", "mib", "actors", "nodes", "state"]);
    for package in packages {
        let mib = package.bytes as f64 / f64::from(1 << 20);
        rows.add_row([
            package.id.name.clone(),
            package.id.version.clone(),
            package.id.sha256.short(),
            format!("{mib:.1}"),
            package.actors.len().to_string(),
            package.nodes.len().to_string(),
            if package.replaced { "replaced" } else { "current" }.to_owned(),
        ]);
    }
    render(&rows)
}
