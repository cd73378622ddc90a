//! What a submission may ask for: Ray's request, checked, with everything that cannot be given refused by name.
//!
//! Pure: JSON in, [`Submission`] out.

use std::collections::BTreeMap;
use std::fmt::Display;

use heliostat_runtime::spec::{LabelRule, LabelSelector, NODE_LABEL, Quantity, Resources};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

/// Longest entrypoint, bytes.
const ENTRYPOINT_BYTES_MAX: usize = 64 << 10;
/// Entries of `env_vars` and of `metadata`.
const ENTRIES_MAX: usize = 1000;
/// More devices than any node has.
const DEVICES_MAX: f64 = 1024.0;
/// Longest id of a job: the name of what is set aside for it, `job.ID`, has at most 128.
const ID_BYTES_MAX: usize = 124;

/// What of a request is kept: all that a job needs to run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Submission {
    /// A shell command.
    pub entrypoint: String,
    /// As the user sent it, for whoever asks.
    pub runtime_env: Map<String, Json>,
    /// Arbitrary words of the user.
    pub metadata: BTreeMap<String, String>,
    /// Added to the environment of the entrypoint.
    pub env_vars: BTreeMap<String, String>,
    /// Name of the uploaded package that is the working directory.
    pub package: Option<String>,
    /// What is set aside for it among the resources of its node.
    #[serde(default)]
    pub resources: Resources,
    /// What the labels of its node must be.
    #[serde(default)]
    pub selector: LabelSelector,
}

impl Submission {
    /// A command that asks for nothing.
    pub fn of(entrypoint: &str) -> Self {
        Self { entrypoint: entrypoint.to_owned(), ..Self::default() }
    }

    /// Whether it asks for anything of its node.
    pub fn reserves(&self) -> bool {
        self.resources != Resources::default() || !self.selector.is_empty()
    }
}

/// Ray's `JobSubmitRequest`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Request {
    entrypoint: Option<String>,
    submission_id: Option<String>,
    job_id: Option<String>,
    runtime_env: Option<Map<String, Json>>,
    metadata: Option<BTreeMap<String, String>>,
    entrypoint_num_cpus: Option<f64>,
    entrypoint_num_gpus: Option<f64>,
    entrypoint_memory: Option<f64>,
    entrypoint_resources: Option<BTreeMap<String, f64>>,
    entrypoint_label_selector: Option<BTreeMap<String, String>>,
}

/// A request that cannot be done; the text names the field and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadRequest(pub String);

/// Reads the body of a submission: the id that it wants, and what it asks for.
///
/// # Errors
/// Names the field that is wrong or asks for what cannot be given.
pub fn parse(body: &[u8]) -> Result<(Option<String>, Submission), BadRequest> {
    let mut request: Request = serde_json::from_slice(body)
        .map_err(|why| BadRequest(format!("the request is not understood: {why}")))?;
    let bad = |why: String| Err(BadRequest(why));
    let entrypoint = request.entrypoint.take().filter(|entrypoint| !entrypoint.trim().is_empty());
    let Some(entrypoint) = entrypoint else {
        return bad("entrypoint: a shell command is needed".into());
    };
    if entrypoint.len() > ENTRYPOINT_BYTES_MAX || entrypoint.contains('\0') {
        return bad(format!(
            "entrypoint: at most {ENTRYPOINT_BYTES_MAX} bytes and no NUL; put more into a script"
        ));
    }
    let id = request.submission_id.take().or(request.job_id.take());
    if let Some(id) = id.as_deref().filter(|id| !is_id(id)) {
        return bad(format!(
            "submission_id: {id:?} must be 1 to {ID_BYTES_MAX} letters, digits, '-', '_' or '.', not starting with '.'"
        ));
    }
    let (resources, selector) = needs(&request)?;
    let metadata = request.metadata.unwrap_or_default();
    if metadata.len() > ENTRIES_MAX {
        return bad(format!("metadata: at most {ENTRIES_MAX} entries"));
    }
    let runtime_env = request.runtime_env.unwrap_or_default();
    let (package, env_vars) = environment(&runtime_env)?;
    Ok((id, Submission { entrypoint, runtime_env, metadata, env_vars, package, resources, selector }))
}

/// Whether this may name a job; it names a directory, too.
pub fn is_id(id: &str) -> bool {
    (1..=ID_BYTES_MAX).contains(&id.len())
        && !id.starts_with('.')
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// What the fields `entrypoint_*` ask of a node.
fn needs(request: &Request) -> Result<(Resources, LabelSelector), BadRequest> {
    let bad = |field: &str, why: &dyn Display| BadRequest(format!("entrypoint_{field}: {why}"));
    let gpus = request.entrypoint_num_gpus.unwrap_or_default();
    if gpus.fract() != 0.0 || !(0.0..=DEVICES_MAX).contains(&gpus) {
        return Err(bad(
            "num_gpus",
            &format_args!("{gpus} is no number of whole GPUs, which are not shared"),
        ));
    }
    let memory = request.entrypoint_memory.unwrap_or_default();
    if !(0.0..=u64::MAX as f64).contains(&memory) {
        return Err(bad("memory", &format_args!("{memory} is no number of bytes")));
    }
    let cpus = Quantity::from_f64(request.entrypoint_num_cpus.unwrap_or_default());
    let mut resources = Resources {
        devices: gpus as u32,
        cpus: cpus.map_err(|why| bad("num_cpus", &why))?,
        memory: memory.ceil() as u64,
        ..Resources::default()
    };
    for (name, &amount) in request.entrypoint_resources.iter().flatten() {
        let amount =
            Quantity::from_f64(amount).map_err(|why| bad("resources", &format_args!("{name}: {why}")))?;
        if amount > Quantity::ZERO {
            resources = resources.with(name, amount);
        }
    }
    resources.validate().map_err(|why| bad("resources", &why))?;
    let mut selector = LabelSelector::default();
    for (key, rule) in request.entrypoint_label_selector.iter().flatten() {
        if key == NODE_LABEL {
            return Err(bad("label_selector", &"`node` in [dashboard] says which node runs jobs"));
        }
        let rule: Result<LabelRule, _> = rule.parse();
        let rule = rule.map_err(|why| bad("label_selector", &format_args!("{key}: {why}")))?;
        selector = selector.and(key, rule);
    }
    selector.validate().map_err(|why| bad("label_selector", &why))?;
    Ok((resources, selector))
}

/// Package and variables of a runtime_env; all else is refused by name.
fn environment(
    runtime_env: &Map<String, Json>,
) -> Result<(Option<String>, BTreeMap<String, String>), BadRequest> {
    let (mut package, mut env_vars) = (None, BTreeMap::new());
    for (field, value) in runtime_env.iter().filter(|(_, value)| !value.is_null()) {
        match field.as_str() {
            "working_dir" => package = Some(package_of(value)?),
            "env_vars" => env_vars = variables(value)?,
            // The client has applied `excludes`; `config` says how patient Ray's own set-up is to be.
            "excludes" | "config" => {}
            internal if internal.starts_with("_ray") => {}
            other => {
                return Err(BadRequest(format!(
                    "runtime_env.{other}: not supported; a job can have `working_dir` and `env_vars`, and finds what \
                     else it needs installed on the machine"
                )));
            }
        }
    }
    Ok((package, env_vars))
}

fn package_of(value: &Json) -> Result<String, BadRequest> {
    let name = value.as_str().and_then(|uri| uri.strip_prefix("gcs://")).filter(|name| is_id(name));
    let name = name.ok_or_else(|| {
        BadRequest(format!(
            "runtime_env.working_dir: {value} is not an uploaded package (gcs://NAME.zip); other URIs are not supported"
        ))
    })?;
    Ok(name.to_owned())
}

fn variables(value: &Json) -> Result<BTreeMap<String, String>, BadRequest> {
    let wrong = || BadRequest("runtime_env.env_vars: must be an object of strings".into());
    let object = value.as_object().ok_or_else(wrong)?;
    if object.len() > ENTRIES_MAX {
        return Err(BadRequest(format!("runtime_env.env_vars: at most {ENTRIES_MAX} entries")));
    }
    let mut variables = BTreeMap::new();
    for (name, value) in object {
        let value = value.as_str().ok_or_else(wrong)?;
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(BadRequest(format!(
                "runtime_env.env_vars: {name:?} cannot be an environment variable"
            )));
        }
        variables.insert(name.clone(), value.to_owned());
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(request: Json) -> Result<(Option<String>, Submission), String> {
        parse(request.to_string().as_bytes()).map_err(|why| why.to_string())
    }

    #[test]
    fn what_the_client_of_ray_sends_is_understood() {
        let (id, job) = read(json!({
            "entrypoint": "python main.py", "submission_id": "s-1", "metadata": {"a": "b"},
            "entrypoint_num_cpus": 0.5, "entrypoint_num_gpus": 1, "entrypoint_memory": 1024,
            "entrypoint_resources": {"licence": 2, "none": 0}, "entrypoint_label_selector": {"zone": "!in(a,b)"},
            "runtime_env": {
                "working_dir": "gcs://_ray_pkg_00ff.zip", "env_vars": {"X": "1"}, "pip": null,
                "config": {"setup_timeout_seconds": 600, "eager_install": true}, "_ray_commit": "x",
            },
        }))
        .expect("understood");
        assert_eq!(id.as_deref(), Some("s-1"));
        assert_eq!(job.package.as_deref(), Some("_ray_pkg_00ff.zip"));
        assert_eq!(job.resources.to_string(), "1 device, 0.5 CPUs, 1 KiB memory, 2 licence");
        assert_eq!(json!(job.selector), json!({"zone": "!in(a,b)"}));
        assert_eq!((job.env_vars["X"].as_str(), job.metadata["a"].as_str()), ("1", "b"));
    }

    #[test]
    fn what_cannot_be_given_is_refused_by_name() {
        let with = |field: &str, value: Json| {
            let mut request = json!({ "entrypoint": "true" });
            request[field] = value;
            read(request).expect_err(field)
        };
        for (field, value) in [
            ("entrypoint_num_gpus", json!(0.5)),
            ("entrypoint_memory", json!(-1)),
            ("entrypoint_resources", json!({"GPU": 1})),
            ("entrypoint_label_selector", json!({"zone": "in("})),
            ("entrypoint_num_cpus", json!(-1)),
            ("entrypoint", json!("  ")),
            ("submission_id", json!("../x")),
            ("future_field", json!(1)),
        ] {
            let why = with(field, value);
            assert!(why.contains(field), "{field}: {why}");
        }
        for field in ["pip", "conda", "container", "image_uri", "py_modules", "uv", "java_jars", "nsight"] {
            let why = with("runtime_env", json!({ field: ["x"] }));
            assert!(why.contains(&format!("runtime_env.{field}")), "{why}");
        }
        for working_dir in ["s3://b/x.zip", "gcs://../x.zip", "."] {
            let why = with("runtime_env", json!({ "working_dir": working_dir }));
            assert!(why.contains("working_dir"), "{why}");
        }
    }
}
