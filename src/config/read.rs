//! Text of cluster.toml -> `Raw`: syntax, unknown keys with suggestions, types of values.

use super::error::Problem;
use super::raw::{Raw, SECTIONS};
use super::section::SectionInfo;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Reads the text, or says everything that is wrong with its form.
pub(crate) fn read(text: &str) -> Result<Raw, Vec<Problem>> {
    let document = match DeTable::parse(text) {
        Ok(document) => document,
        Err(e) => return Err(vec![Problem::at(e.span(), e.message().replace('\n', ", "))]),
    };
    let unknown = unknown_keys(document.get_ref());
    if !unknown.is_empty() {
        return Err(unknown);
    }
    toml::from_str::<Raw>(text).map_err(|e| vec![type_problem(&e)])
}

/// The span of the value at a dotted path, e.g. `parallel.ep` or `nodes.1.kind`; where it is not written, of the nearest
/// table that holds it; None where nothing of it is in the file.
pub(crate) fn locate(text: &str, path: &str) -> Option<Range<usize>> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut found = None;
    let mut segments = path.split('.').peekable();
    while let Some(segment) = segments.next() {
        let Some((key, value)) = table.get_key_value(segment) else { return found };
        let mut value = value;
        found = Some(if segments.peek().is_some() { key.span() } else { value.span() });
        if let DeValue::Array(array) = value.get_ref()
            && let Some(index) = segments.next_if(|s| s.parse::<usize>().is_ok())
        {
            value = array.get(index.parse::<usize>().ok()?)?;
            found = Some(value.span());
        }
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => return found,
        }
    }
    found
}

/// Keys that no section declares, in the order of the file.
fn unknown_keys(document: &DeTable<'_>) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (name, value) in document {
        let Some(section) = SECTIONS.iter().find(|s| s.title == name.get_ref()) else {
            problems.push(unknown_section(name));
            continue;
        };
        let tables: Vec<&DeTable<'_>> = match (value.get_ref(), section.repeated) {
            (DeValue::Table(table), false) => vec![table],
            (DeValue::Array(array), true) => {
                array.iter().filter_map(|item| item.get_ref().as_table()).collect()
            }
            (_, repeated) => {
                let form =
                    if repeated { format!("[[{}]]", section.title) } else { format!("[{}]", section.title) };
                problems.push(
                    Problem::at(Some(name.span()), format!("`{}` is a section", section.title))
                        .help(format!("write it as {form}")),
                );
                continue;
            }
        };
        for (key, _) in tables.into_iter().flatten() {
            if !section.keys.iter().any(|k| k.name == key.get_ref()) {
                problems.push(unknown_key(section, key));
            }
        }
    }
    problems.sort_by_key(|p| p.span.as_ref().map(|s| s.start));
    problems
}

fn unknown_section(name: &Spanned<std::borrow::Cow<'_, str>>) -> Problem {
    let written = name.get_ref();
    let problem = Problem::at(Some(name.span()), format!("unknown section [{written}]"));
    if let Some(near) = nearest(written, SECTIONS.iter().map(|s| s.title)) {
        return problem.help(format!("did you mean `{near}`?"));
    }
    match SECTIONS.iter().find(|s| s.keys.iter().any(|k| k.name == written)) {
        Some(home) => problem.help(format!("`{written}` is a key of [{}]", home.title)),
        None => problem.help(format!("sections are {}", SECTIONS.map(|s| s.title).join(", "))),
    }
}

fn unknown_key(section: &SectionInfo, key: &Spanned<std::borrow::Cow<'_, str>>) -> Problem {
    let written = key.get_ref();
    let problem = Problem::at(Some(key.span()), format!("unknown key `{written}` in [{}]", section.title));
    let elsewhere = SECTIONS.iter().find(|s| s.keys.iter().any(|k| k.name == written));
    if let Some(home) = elsewhere {
        return problem.help(format!("`{written}` is a key of [{}]", home.title));
    }
    match nearest(written, section.keys.iter().map(|k| k.name)) {
        Some(near) => problem.help(format!("did you mean `{near}`?")),
        None => {
            let names: Vec<&str> = section.keys.iter().map(|k| k.name).collect();
            problem.help(format!("keys of [{}] are {}", section.title, names.join(", ")))
        }
    }
}

/// What to write instead of a backend of vLLM.
const VLLM_ALL2ALL_HELP: &str =
    "vLLM's backends are not here: write \"peer\" (NVLink, our own kernels) or \"nccl\"";

/// Whether vLLM takes this as `all2all_backend`.
fn is_vllm_all2all(word: &str) -> bool {
    let families = ["naive", "pplx", "deepep", "allgather_reducescatter", "flashinfer", "mori", "nixl"];
    families.iter().any(|family| word.starts_with(family))
}

/// serde's complaint about a value, with a suggestion where it lists what it expected.
fn type_problem(e: &toml::de::Error) -> Problem {
    let message = e.message().trim().replace('\n', ", ");
    let words: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let near = words
        .split_first()
        .filter(|_| message.starts_with("unknown variant"))
        .and_then(|(written, expected)| nearest(written, expected.iter().copied()));
    let near = near.map(|near| format!("did you mean \"{near}\"?"));
    let vllms =
        words.first().filter(|written| message.starts_with("unknown variant") && is_vllm_all2all(written));
    let near = near.or_else(|| vllms.map(|_| VLLM_ALL2ALL_HELP.into()));
    let problem = Problem::at(e.span(), message.replace("unknown variant", "unknown value"));
    match near {
        Some(near) => problem.help(near),
        None => problem,
    }
}

/// The candidate that the user most likely meant, if any is near.
fn nearest<'c>(written: &str, candidates: impl Iterator<Item = &'c str>) -> Option<&'c str> {
    let score = |c: &str| {
        let contained = written.len() >= 3 && (c.contains(written) || written.contains(c));
        strsim::normalized_damerau_levenshtein(written, c).max(if contained { 0.7 } else { 0.0 })
    };
    candidates
        .map(|c| (score(c), c))
        .filter(|(s, _)| *s >= 0.55)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, c)| c)
}
