//! The models that tests run, and the ways in which their prompts attend.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use heliostat_engine::batch::PrefillAttention;
use heliostat_engine::config::ModelConfig;

/// The root of the repository, also where tests run elsewhere than they were built.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    if here.exists() { here } else { PathBuf::from(".") }
}

/// The bundled model and the small ones of both families.
pub(crate) fn models() -> Vec<PathBuf> {
    let small =
        std::fs::read_dir(root().join("tests/data/models")).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> = small.chain([root().join("models/sundial-20m")]).collect();
    all.sort();
    all
}

/// Every model, with every way for its prompts to attend.
pub(crate) fn cases() -> Vec<(PathBuf, PrefillAttention)> {
    let ways = |dir: PathBuf| {
        let config = ModelConfig::from_dir(&dir).unwrap();
        let possible = move |way: &PrefillAttention| way.check(&config).is_ok();
        [PrefillAttention::Absorbed, PrefillAttention::Expanded]
            .into_iter()
            .filter(possible)
            .map(move |way| (dir.clone(), way))
            .collect::<Vec<_>>()
    };
    models().into_iter().flat_map(ways).collect()
}
