//! What `deploy/` and the documentation tell people and supervisors to run is what `helio` takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// What variables of the files stand for.
const VARIABLES: &[(&str, &str)] = &[
    ("\"${here[@]}\"", "--address host-1:6379 --token-file token"),
    ("${here[*]}", "--address host-1:6379 --token-file token"),
    ("$(LWS_LEADER_ADDRESS)", "heliostat-0.heliostat.default"),
    ("$LWS_LEADER_ADDRESS", "heliostat-0.heliostat.default"),
    ("$(POD_NAME)", "heliostat-0-1"),
    ("$POD_NAME", "heliostat-0-1"),
    ("\"$(hostname -f)\"", "host-1"),
    ("$HELIO_NODE_ARGS", ""),
    ("${HELIO_HEAD}", "host-1:6379"),
    ("${HELIO_DEVICES}", "auto"),
    ("$devices", "auto"),
    ("$first", "host-1"),
    ("$port", "6379"),
    ("$config", "cluster.toml"),
    ("$token", "token"),
    ("$run", "run"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|why| panic!("{path}: {why}"))
}

/// Files of a folder with this ending.
fn files(folder: &str, ending: &str) -> Vec<String> {
    let entries = fs::read_dir(root().join(folder)).expect(folder);
    let names = entries.map(|entry| entry.expect(folder).file_name().to_string_lossy().into_owned());
    let mut found: Vec<String> =
        names.filter(|name| name.ends_with(ending)).map(|name| format!("{folder}/{name}")).collect();
    found.sort();
    assert!(!found.is_empty(), "nothing in {folder} ends with {ending}");
    found
}

fn helio(args: &[String], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_helio")).args(args).current_dir(dir).output().expect("it runs")
}

/// Has `helio` read a command line up to its end, and show the help instead of doing it.
#[track_caller]
fn taken(file: &str, args: &[String]) {
    let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
    let mut asked = args.to_vec();
    asked.insert(end, "--help".into());
    let output = helio(&asked, root());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !args.is_empty(), "{file}: helio {}\n{said}", args.join(" "));
}

/// The arguments of each `helio` in a script or a line of one.
fn commands(script: &str) -> Vec<Vec<String>> {
    let mut text = script.replace("\\\n", " ");
    for (variable, value) in VARIABLES {
        text = text.replace(variable, value);
    }
    let mut all = Vec::new();
    for line in text.lines() {
        let line = line.split(" #").next().unwrap_or_default();
        for part in line.split(['|', ';', '>', '(', ')']).flat_map(|part| part.split("&&")) {
            let words = part.trim_end_matches("2").split_whitespace().map(|word| word.trim_matches('"'));
            let words: Vec<String> = words.filter(|word| *word != "&").map(str::to_owned).collect();
            let program =
                |word: &String| ["helio", "$helio", "/usr/local/bin/helio"].contains(&word.as_str());
            if let Some(at) = words.iter().position(program) {
                all.push(words[at + 1..].to_vec());
            }
        }
    }
    all
}

/// Every list below one of these keys of a document.
fn lists(value: &Value, keys: &[&str], found: &mut Vec<(String, Vec<String>)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let words = value.as_array().filter(|_| keys.contains(&key.as_str()));
                let words = words.map(|words| words.iter().filter_map(Value::as_str).map(str::to_owned));
                found.extend(words.map(|words| (key.clone(), words.collect())));
                lists(value, keys, found);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| lists(item, keys, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn units_start_what_helio_takes() {
    for file in files("deploy/systemd", ".service") {
        let text = read(&file);
        let starts: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("ExecStart=")).collect();
        let found = commands(&starts.join("\n"));
        assert_eq!(found.len(), 1, "{file}");
        found.iter().for_each(|args| taken(&file, args));
        // A wrong configuration is not tried again for ever.
        assert!(text.contains("RestartPreventExitStatus=2"), "{file}");
        let wrong =
            helio(&["head".into(), "/no/such/file".into(), "--bind".into(), "nonsense".into()], root());
        assert_eq!(wrong.status.code(), Some(2));
    }
}

#[test]
fn the_image_starts_what_helio_takes() {
    let file = "deploy/container/Dockerfile";
    let lists =
        read(file).lines().filter_map(|line| Some(line.split_once("CMD ")?.1.to_owned())).collect::<Vec<_>>();
    assert_eq!(lists.len(), 2, "the command and the health check");
    for list in lists {
        let words: Vec<String> = serde_json::from_str(&list).expect("a list");
        taken(file, words.strip_prefix(&["helio".to_owned()]).unwrap_or(&words));
    }
}

#[test]
fn pods_start_what_helio_takes() {
    let file = "deploy/kubernetes/leaderworkerset.yaml";
    let set: Value = serde_saphyr::from_str(&read(file)).expect(file);
    let mut found = Vec::new();
    lists(&set, &["args", "command"], &mut found);
    let (args, commands_): (Vec<_>, Vec<_>) = found.into_iter().partition(|(key, _)| key == "args");
    assert_eq!((args.len(), commands_.len()), (3, 4), "{file}");
    let filled = |words: &[String]| commands(&format!("helio {}", words.join(" "))).remove(0);
    args.iter().for_each(|(_, words)| taken(file, &filled(words)));
    for (_, words) in commands_ {
        match words.split_first() {
            Some((first, rest)) if first == "helio" => taken(file, &filled(rest)),
            Some((first, rest)) if first == "sh" => {
                let found = commands(&rest[1]);
                assert_eq!(found.len(), 1, "{file}: {rest:?}");
                taken(file, &found[0]);
            }
            other => panic!("{file}: {other:?}"),
        }
    }
}

#[test]
fn the_batch_script_starts_what_helio_takes() {
    let file = "deploy/slurm/heliostat.sbatch";
    let code: Vec<String> =
        read(file).lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    let found: Vec<_> = commands(&code.join("\n"))
        .into_iter()
        .filter(|args| args.first().is_some_and(|arg| !arg.is_empty()))
        .collect();
    let names: Vec<&str> = found.iter().map(|args| args[0].as_str()).collect();
    assert_eq!(names, ["head", "node", "down", "list", "status"], "{found:?}");
    found.iter().for_each(|args| taken(file, args));
    assert!(Command::new("bash").arg("-n").arg(root().join(file)).status().expect("bash").success());
}

/// Blocks of commands in the documentation.
#[test]
fn the_documentation_says_what_helio_takes() {
    let pages =
        ["README.md", "deploy/README.md", "docs/quickstart.md", "docs/operations.md", "docs/tuning.md"];
    for page in pages {
        let text = read(page);
        let blocks = text.split("```").skip(1).step_by(2).flat_map(str::lines);
        let found: Vec<_> = blocks.flat_map(commands).filter(|args| !args.is_empty()).collect();
        assert!(!found.is_empty(), "{page}");
        found.iter().for_each(|args| taken(page, args));
    }
}

/// Each cluster.toml is fine on a machine that has the files that it names.
#[test]
fn every_cluster_toml_loads() {
    for folder in ["systemd", "container", "kubernetes", "slurm"] {
        let file = format!("deploy/{folder}/cluster.toml");
        let dir = tempfile::tempdir().expect("temp dir");
        for name in ["token", "api-keys"] {
            fs::write(dir.path().join(name), "0123456789abcdef0123456789abcdef\n").expect("write");
        }
        let models = |from: &str| format!("{from}/sundial-20m");
        let model: PathBuf = root().join("models/sundial-20m");
        let mut text = read(&file).replace("/etc/heliostat-secrets/", "");
        for from in ["/usr/share/heliostat/models", "/srv/models", "/models"] {
            text = text.replace(&format!("\"{}\"", models(from)), &format!("{model:?}"));
        }
        fs::write(dir.path().join("cluster.toml"), text).expect("write");
        let output = helio(&["check".into(), "cluster.toml".into()], dir.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{file}: {said}");
    }
}
