//! The invariants of the architecture that a compiler does not check; each test names the one that is broken.

use std::fs;
use std::path::{Path, PathBuf};

/// A file of the project.
struct Source {
    /// Relative to the root.
    path: String,
    text: String,
}

impl Source {
    /// Lines with their numbers, comments and strings left as they are.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(i, line)| (i + 1, line))
    }

    /// The code of a line: without what follows `//`, and without the insides of strings.
    fn code(line: &str) -> String {
        let code = line.split("//").next().unwrap_or_default();
        code.split('"').step_by(2).collect::<Vec<_>>().join("\"\"")
    }

    fn is_in(&self, rooms: &[&str]) -> bool {
        rooms.iter().any(|room| self.path.starts_with(room))
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file with one of the extensions ("" for none), outside of build outputs and model data.
fn files(extensions: &[&str]) -> Vec<Source> {
    fn walk(dir: &Path, extensions: &[&str], found: &mut Vec<Source>) {
        for entry in fs::read_dir(dir).expect("a directory").flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            if entry.file_type().expect("a type").is_dir() {
                let skipped = ["target", ".git", "models", "run", "node_modules", "__pycache__"];
                if !skipped.contains(&&*name) {
                    walk(&path, extensions, found);
                }
                continue;
            }
            let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
            // In a git worktree `.git` is a file.
            if extensions.contains(&&*extension)
                && name != ".git"
                && let Ok(text) = fs::read_to_string(&path)
            {
                let path = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
                found.push(Source { path, text });
            }
        }
    }
    let mut found = Vec::new();
    walk(root(), extensions, &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty());
    found
}

/// Fails with all complaints at once.
#[track_caller]
fn none(rule: &str, complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{rule}:\n  {}\n", complaints.join("\n  "));
}

fn grep(sources: &[Source], wrong: impl Fn(&Source, &str) -> bool) -> Vec<String> {
    let mut hits = Vec::new();
    for source in sources {
        let lines = source.lines().filter(|(_, line)| wrong(source, line));
        hits.extend(lines.map(|(n, line)| format!("{}:{n}: {}", source.path, line.trim())));
    }
    hits
}

/// Whether `word` stands in `text` as a whole word.
fn has_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(i, _)| !text[..i].ends_with(part) && !text[i + word.len()..].starts_with(part))
}

#[test]
fn unsafe_code_lives_in_kernels_and_two_files_and_says_why_it_is_sound() {
    let word = concat!("un", "safe");
    let sources = files(&["rs"]);
    // Two files of the runtime map shared memory, and give back pages of the program.
    let brave = ["kernels/", "runtime/src/objects/map.rs", "runtime/src/worker/code.rs"];
    let outside = grep(&sources, |s, line| !s.is_in(&brave) && has_word(&Source::code(line), word));
    none("only kernels, and two files that map memory, may be that brave", outside);
    let mut undocumented = Vec::new();
    for source in sources.iter().filter(|s| s.is_in(&brave)) {
        let lines: Vec<&str> = source.text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let opens = format!("{word} {{");
            let implements = format!("{word} impl");
            let code = Source::code(line);
            let said = lines[i.saturating_sub(8)..=i].iter().any(|l| l.contains("SAFETY:"));
            if (code.contains(&opens) || code.contains(&implements)) && !said {
                undocumented.push(format!("{}:{}: {}", source.path, i + 1, line.trim()));
            }
        }
    }
    none("each such block needs its // SAFETY: line", undocumented);
}

#[test]
fn rooms_do_not_know_what_they_must_not_know() {
    let forbidden: [(&str, &[&str]); 3] = [
        (
            "kernels",
            &["tokio", "actix", "actix-web", "heliostat-engine", "heliostat-runtime", "heliostat-actors"],
        ),
        ("engine", &["tokio", "actix", "actix-web", "socket2", "heliostat-runtime", "heliostat-actors"]),
        (
            "runtime",
            &[
                "actix-web",
                "half",
                "memmap2",
                "minijinja",
                "safetensors",
                "tokenizers",
                "heliostat-engine",
                "heliostat-kernels",
                "heliostat-actors",
            ],
        ),
    ];
    let mut complaints = Vec::new();
    for (room, crates) in forbidden {
        let manifest = fs::read_to_string(root().join(room).join("Cargo.toml")).expect("a manifest");
        let dependencies = manifest.split_once("[dependencies]").expect("dependencies").1;
        for line in dependencies.lines() {
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if crates.contains(&name) {
                complaints.push(format!("{room}/Cargo.toml: {name}"));
            }
        }
    }
    none("a room depends on a crate that it must not know", complaints);
}

#[test]
fn pure_parts_read_no_clock_and_open_no_socket() {
    let sources = files(&["rs"]);
    let pure = [
        "engine/src/",
        "actors/src/jobs/core",
        "actors/src/jobs/request",
        "actors/src/monitor/exposition",
        "actors/src/monitor/history",
        "actors/src/monitor/together",
        "actors/src/monitor/trace",
        "actors/src/serve/core",
        "actors/src/serve/details",
        "actors/src/serve/document",
        "actors/src/serve/ingresses",
        "actors/src/state/query",
        "actors/src/state/ray",
        "runtime/src/head/core",
        "runtime/src/head/placement",
        "runtime/src/head/supervise",
        "runtime/src/objects/counts",
        "runtime/src/objects/store/core",
        "runtime/src/objects/store/stored",
        "src/config/validate",
    ];
    let words =
        ["Instant::now", "SystemTime::now", "TcpStream", "TcpListener", "UnixStream", "thread::sleep"];
    let hits = grep(&sources, |s, line| {
        s.is_in(&pure)
            && words.iter().any(|w| Source::code(line).contains(w))
            && !s.path.ends_with("tests.rs")
    });
    none("pure parts take the time as an argument and do no I/O", hits);
}

#[test]
fn only_the_binary_reads_the_environment() {
    let rooms = ["runtime/src/", "engine/src/", "kernels/src/", "actors/src/"];
    let sources = files(&["rs"]);
    // A simulation takes its number of seeds from whoever runs the tests.
    let is_test = |s: &Source| s.path.ends_with("simulation.rs") || s.path.ends_with("tests.rs");
    let hits =
        grep(&sources, |s, line| s.is_in(&rooms) && !is_test(s) && Source::code(line).contains("env::var"));
    none("configuration comes in as values", hits);
}

#[test]
fn every_file_says_what_it_is_and_is_short_enough_to_read() {
    let mut complaints = Vec::new();
    for source in files(&["rs"]) {
        if !source.text.starts_with("//!") {
            complaints.push(format!("{}: does not open with //!", source.path));
        }
        let lines = source.text.lines().count();
        if lines > 600 {
            complaints.push(format!("{}: {lines} lines", source.path));
        }
    }
    none("a file opens with //! and has at most 600 lines", complaints);
}

#[test]
fn links_of_the_documentation_lead_somewhere() {
    let mut broken = Vec::new();
    for page in files(&["md"]) {
        let dir = root().join(&page.path).parent().map(PathBuf::from).expect("a parent");
        for (n, line) in page.lines() {
            for link in line.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                let target = link.split(['#', ' ']).next().unwrap_or_default();
                let outside = target.contains("://") || target.starts_with("mailto:") || target.is_empty();
                if !outside && !dir.join(target).exists() {
                    broken.push(format!("{}:{n}: {link}", page.path));
                }
            }
        }
    }
    none("broken links", broken);
}

#[test]
fn nothing_names_a_private_path() {
    let private =
        [concat!("/wo", "rk/"), concat!("../sha", "red"), concat!("/ro", "ot/"), concat!("/ho", "me/")];
    let sources = files(&["rs", "md", "toml", "py", "sh", "json", "yml", "yaml", ""]);
    let hits = grep(&sources, |_, line| private.iter().any(|p| line.contains(p)));
    none("paths of somebody's machine", hits);
}
