//! Ray Serve's document (`ServeDeploySchema` as JSON) -> applications to serve.
//!
//! Pure: what lies outside of the document comes in as facts. Everything that is not supported is refused by its path in
//! the document; nothing is ignored in silence.

mod actor;
mod fields;
mod llm;
mod settings;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::Path;

use heliostat_engine::config::ModelConfig;
use heliostat_runtime::package::PackageStatus;
use serde_json::{Map, Value as Json};

use self::actor::{ActorApp, ActorPath};
use self::fields::{Fields, Problems, Refused, no};
pub use self::llm::default_redundancy;
use super::core::ProxyLocation;
use super::target::{AppTarget, DeploymentTarget, Source};
use crate::deployment::{Duty, ModelDeployment};

/// Applications of a document at most.
const APPS_MAX: usize = 64;

/// What lies outside of a document.
pub struct Facts<'a> {
    /// What cluster.toml says of a model; a document says what differs.
    pub base: &'a ModelDeployment,
    /// Where relative paths start.
    pub dir: &'a Path,
    /// Where HTTP is served.
    pub http: SocketAddr,
    /// Nodes of the cluster.
    pub num_nodes: usize,
    /// Programs of users that the cluster has.
    pub packages: &'a [PackageStatus],
    /// Reads the shape of the model in a directory.
    pub look: &'a dyn Fn(&Path) -> Result<ModelConfig, String>,
}

/// What an import path names.
enum Import {
    /// Who makes deployments of models of the application's arguments.
    Builder(Builder),
    /// An actor of a user.
    Actor(ActorPath),
}

/// Who makes deployments of an application's arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Builder {
    /// Ray's, of one or several models.
    OpenAi,
    /// Ray's, of one model with data-parallel ranks.
    DataParallel,
    /// Ray's, of one model with prefill and decode apart.
    PrefillDecode,
    /// Ours: as Ray's, with the ranks of cluster.toml where none are written.
    Own,
}

/// Import paths, by the part behind the module.
const IMPORT_PATHS: &str = "ray.serve.llm:build_openai_app, ray.serve.llm:build_dp_openai_app, ray.serve.llm:build_pd_openai_app and heliostat:build_openai_app";

impl Import {
    fn parse(import_path: &str, packages: &[PackageStatus]) -> Result<Self, String> {
        if let Some(builder) = Builder::parse(import_path)? {
            return Ok(Self::Builder(builder));
        }
        let path = ActorPath::parse(import_path, packages);
        let refused = |why| format!("{import_path:?} cannot be imported: {why}; builders are {IMPORT_PATHS}");
        path.map(Self::Actor).map_err(refused)
    }
}

impl Builder {
    /// The builder of that name; none: it is none of a builder's module.
    fn parse(import_path: &str) -> Result<Option<Self>, String> {
        match import_path {
            "ray.serve.llm:build_openai_app" => Ok(Some(Self::OpenAi)),
            "ray.serve.llm:build_dp_openai_app" => Ok(Some(Self::DataParallel)),
            "heliostat:build_openai_app" => Ok(Some(Self::Own)),
            "ray.serve.llm:build_pd_openai_app" => Ok(Some(Self::PrefillDecode)),
            other if other.starts_with("ray.") || other.starts_with("heliostat:") => {
                Err(format!("{other:?} cannot be imported; there are {IMPORT_PATHS}"))
            }
            _ => Ok(None),
        }
    }

    /// The name of a deployment that is not named, as Ray makes it.
    fn deployment_name(self, duty: Duty, model_id: &str) -> String {
        let server = match (self, duty) {
            (_, Duty::Prefill) => "PDPrefillServer",
            (_, Duty::Decode) => "PDDecodeServer",
            (Self::DataParallel, Duty::Whole) => "DPServer",
            (Self::OpenAi | Self::Own | Self::PrefillDecode, Duty::Whole) => "LLMServer",
        };
        format!("{server}:{}", model_id.replace('/', "--").replace('.', "_"))
    }
}

const TOP_REFUSED: &[Refused] = &[
    no("grpc_options", &["{}", "{\"port\":9000,\"grpc_servicer_functions\":[]}"], "there is no gRPC proxy"),
    no("controller_options", &["{}"], ""),
    no("tracing_config", &["{}"], ""),
    no("target_capacity", &[], "say num_replicas of each deployment"),
];

const APP_REFUSED: &[Refused] = &[
    no("runtime_env", &["{}"], "models and programs of one binary need none"),
    no("autoscaling_policy", &[], "use autoscaling_config of the deployments"),
    no("external_scaler_enabled", &["false"], ""),
];

/// What a document asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// Where HTTP is served; none: as cluster.toml says.
    pub location: Option<ProxyLocation>,
    /// What is served.
    pub apps: Vec<AppTarget>,
}

/// Reads a document.
///
/// # Errors
/// Everything that is wrong, one line each.
pub fn read(json: &str, facts: &Facts<'_>) -> Result<Document, Vec<String>> {
    let value: Json = serde_json::from_str(json).map_err(|why| vec![format!("it is not JSON: {why}")])?;
    if !value.is_object() {
        return Err(vec!["the document must be an object with `applications`".to_owned()]);
    }
    let problems = Problems::default();
    let mut top = Fields::open("", value, &problems);
    http_options(&mut top, facts.http);
    logging(&mut top);
    let location = top.take("proxy_location");
    top.refuse(TOP_REFUSED);
    let written = top.list("applications");
    top.finish();
    if written.len() > APPS_MAX {
        problems.add("applications", format!("there are {}, and {APPS_MAX} are the limit", written.len()));
    }
    let mut apps: Vec<AppTarget> = Vec::new();
    for (path, value) in written.into_iter().take(APPS_MAX) {
        let app = app(&path, value, facts, &problems);
        if apps.iter().any(|other| other.name == app.name) {
            problems
                .add(&format!("{path}.name"), format!("{:?} is the name of another application", app.name));
        }
        apps.push(app);
    }
    problems.into_result(Document { location, apps })
}

/// Where HTTP is served is cluster.toml's.
fn http_options(top: &mut Fields<'_>, http: SocketAddr) {
    let Some(mut options) = top.object("http_options") else { return };
    let fix = "it is set in [serve] of cluster.toml";
    if let Some(host) = options.take::<String>("host")
        && host != http.ip().to_string()
    {
        options.wrong("host", format!("HTTP is served at {}, not at {host}; {fix}", http.ip()));
    }
    if let Some(port) = options.take::<u16>("port")
        && port != http.port()
    {
        options.wrong("port", format!("HTTP is served at port {}, not at {port}; {fix}", http.port()));
    }
    options.refuse(&[
        no("root_path", &["\"\""], "use route_prefix"),
        no("request_timeout_s", &[], "clients end what takes too long for them"),
        no("keep_alive_timeout_s", &["75", "90"], ""),
        no("ssl_keyfile", &[], "set tls_key in [serve] of cluster.toml"),
        no("ssl_certfile", &[], "set tls_cert in [serve] of cluster.toml"),
        no("ssl_keyfile_password", &[], ""),
        no("ssl_ca_certs", &[], ""),
    ]);
    options.finish();
}

fn logging(fields: &mut Fields<'_>) {
    let Some(mut config) = fields.object("logging_config") else { return };
    config.refuse(&[
        no("encoding", &["\"TEXT\""], ""),
        no("log_level", &["\"INFO\"", "20"], "HELIO_LOG changes the level"),
        no("logs_dir", &[], "logs lie in the run directory"),
        no("enable_access_log", &["true", "false"], ""),
        no("additional_log_standard_attrs", &["[]"], ""),
    ]);
    config.finish();
}

fn app(path: &str, value: Json, facts: &Facts<'_>, problems: &Problems) -> AppTarget {
    let config = value.to_string();
    let mut app = Fields::open(path, value.clone(), problems);
    let name: String = app.take("name").unwrap_or_else(|| "default".to_owned());
    if name.is_empty() || name.len() > 128 || name.chars().any(char::is_control) {
        app.wrong("name", "it must have 1 to 128 letters");
    }
    // A prefix that is null is one that was written so; one that is missing is the root.
    let written = value.as_object().and_then(|object| object.get("route_prefix"));
    let prefix: Option<String> = app.take("route_prefix");
    let route_prefix = match (written, prefix) {
        (Some(Json::Null), _) => None,
        (_, prefix) => Some(prefix.unwrap_or_else(|| "/".to_owned())),
    };
    if let Some(prefix) = &route_prefix {
        check_prefix(&app, prefix);
    }
    let import = match app.take::<String>("import_path") {
        None => {
            app.wrong(
                "import_path",
                format!("it is missing; there are {IMPORT_PATHS}, and PACKAGE:ACTOR_TYPE"),
            );
            None
        }
        Some(import_path) => {
            Import::parse(&import_path, facts.packages).map_err(|why| app.wrong("import_path", why)).ok()
        }
    };
    for (key, own) in [("host", facts.http.ip().to_string()), ("port", facts.http.port().to_string())] {
        let neutral = |value: &Json| value.as_str().map_or_else(|| value.to_string(), str::to_owned) == own;
        if app.raw(key).is_some_and(|value| !neutral(&value)) {
            app.wrong(key, "HTTP is set in [serve] of cluster.toml");
        }
    }
    logging(&mut app);
    app.refuse(APP_REFUSED);
    let args = app.raw("args");
    let overrides = app.list("deployments");
    app.finish();
    let deployments = match (import, args) {
        (Some(Import::Builder(builder)), Some(args)) => {
            let args = Fields::open(format!("{path}.args"), args, problems);
            deployments(builder, args, overrides, (path, facts, problems))
        }
        (Some(Import::Builder(_)), None) => {
            problems.add(&format!("{path}.args"), "it is missing: the builder needs the model");
            Vec::new()
        }
        (Some(Import::Actor(of)), args) => {
            let args = args.unwrap_or_else(|| Json::Object(Map::new()));
            if !args.is_object() {
                problems.add(&format!("{path}.args"), format!("it must be an object, not {args}"));
            }
            let app = ActorApp { ingress: &of, name: &name, args: args.to_string(), facts, problems };
            app.deployments(path, overrides)
        }
        (None, _) => Vec::new(),
    };
    AppTarget { name, route_prefix, source: Source::Document, config, deployments }
}

fn check_prefix(app: &Fields<'_>, prefix: &str) {
    let odd = |c: char| !c.is_ascii_graphic() || matches!(c, '{' | '}' | '?' | '#' | '%');
    if !prefix.starts_with('/') || (prefix.len() > 1 && prefix.ends_with('/')) || prefix.contains(odd) {
        app.wrong(
            "route_prefix",
            format!("{prefix:?} must begin with / and not end with one, without {{}} ? # %"),
        );
    }
    for own in ["/-", "/api", "/health", "/metrics"] {
        if prefix == own || prefix.strip_prefix(own).is_some_and(|rest| rest.starts_with('/')) {
            app.wrong("route_prefix", format!("paths below {own} are the server's own; choose another"));
        }
    }
}

/// The LLMConfigs that a builder takes, each with its path and what it is for.
fn configs(builder: Builder, args: &mut Fields<'_>) -> Vec<(String, Json, Duty)> {
    let keys: &[(&str, Duty)] = match builder {
        Builder::OpenAi | Builder::Own => &[("llm_configs", Duty::Whole)],
        Builder::DataParallel => &[("llm_config", Duty::Whole)],
        Builder::PrefillDecode => &[("prefill_config", Duty::Prefill), ("decode_config", Duty::Decode)],
    };
    let mut configs = Vec::new();
    for &(key, duty) in keys {
        let found = match key {
            "llm_configs" => args.list(key),
            key => args.raw(key).map(|config| (args.at(key), config)).into_iter().collect(),
        };
        if found.is_empty() {
            args.wrong(key, "it is missing: the builder needs a model");
        }
        configs.extend(found.into_iter().map(|(path, config)| (path, config, duty)));
    }
    configs
}

/// What goes on elsewhere must be the same there.
fn check_pair([prefill, decode]: [&DeploymentTarget; 2], (path, problems): (&str, &Problems)) {
    let (Some(prefill), Some(decode)) = (prefill.workload.model(), decode.workload.model()) else { return };
    let at = |key: &str| format!("{path}.args.decode_config.{key}");
    let differs = |key: &str, prefill: &dyn std::fmt::Display, decode: &dyn std::fmt::Display| {
        problems
            .add(&at(key), format!("it is {decode}, and {prefill} in prefill_config: both must be the same"));
    };
    if prefill.model_name != decode.model_name {
        differs("model_loading_config.model_id", &prefill.model_name, &decode.model_name);
    }
    if prefill.model != decode.model {
        differs("model_loading_config.model_source", &prefill.model.display(), &decode.model.display());
    }
    let (one, other) = (&prefill.engine, &decode.engine);
    if one.max_model_len != other.max_model_len {
        differs("engine_kwargs.max_model_len", &one.max_model_len, &other.max_model_len);
    }
    if one.block_size != other.block_size {
        differs("engine_kwargs.block_size", &one.block_size, &other.block_size);
    }
    for (key, engine) in [("prefill_config", one), ("decode_config", other)] {
        if !engine.enable_prefix_caching {
            let path = format!("{path}.args.{key}.engine_kwargs.enable_prefix_caching");
            problems.add(&path, "prompts go from prefill to decode through the prefix caches: leave it on");
        }
    }
}

fn deployments(
    builder: Builder,
    mut args: Fields<'_>,
    overrides: Vec<(String, Json)>,
    (path, facts, problems): (&str, &Facts<'_>, &Problems),
) -> Vec<DeploymentTarget> {
    let mut configs = configs(builder, &mut args);
    configs.retain(|(path, config, _)| {
        let is_path = config.is_string();
        if is_path {
            problems.add(path, "a file is not supported; write the LLMConfig itself");
        }
        !is_path
    });
    let why = "one ingress serves the cluster: see [serve] in cluster.toml";
    args.refuse(&[
        no("ingress_cls_config", &["{}"], why),
        no("ingress_deployment_config", &["{}"], why),
        no("proxy_cls_config", &["{}"], why),
        no("proxy_deployment_config", &["{}"], why),
    ]);
    args.finish();
    let mut made: Vec<DeploymentTarget> = Vec::new();
    let mut used = vec![false; overrides.len()];
    for (config_path, config, duty) in configs {
        let of = (config_path.as_str(), builder, duty);
        let (name, mut model, mut under) = llm::deployment(config, of, facts, problems);
        let twice = |other: &DeploymentTarget| {
            let same = |it: &ModelDeployment| it.model_name == model.model_name && it.duty == model.duty;
            other.name == name || other.workload.model().is_some_and(same)
        };
        if made.iter().any(twice) {
            problems.add(&config_path, format!("model {:?} is listed twice", model.model_name));
        }
        let over = overrides
            .iter()
            .position(|(_, value)| value.get("name").and_then(Json::as_str) == Some(name.as_str()));
        if let Some(at) = over {
            used[at] = true;
        }
        let mut over = over.map(|at| overrides[at].1.clone());
        let options_path = format!("{config_path}.deployment_config");
        for (options, path) in [(Some(&mut under), options_path.as_str()), (over.as_mut(), path)] {
            let config = options.and_then(Json::as_object_mut).and_then(|it| it.shift_remove("user_config"));
            if let Some(config) = config {
                let shape = (facts.look)(&model.model).ok();
                let fields = Fields::open(format!("{path}.user_config"), config, problems);
                llm::user_config(fields, &mut model, shape.as_ref());
            }
        }
        let settings = llm::options(under, over, &options_path, problems);
        made.push(DeploymentTarget { name, workload: model.into(), settings });
    }
    if let [prefill, decode] = made.as_slice()
        && builder == Builder::PrefillDecode
    {
        check_pair([prefill, decode], (path, problems));
    }
    let names: Vec<&str> = made.iter().map(|target| target.name.as_str()).collect();
    for ((path, value), _) in overrides.iter().zip(used).filter(|(_, used)| !used) {
        let name = value.get("name").cloned().unwrap_or_default();
        problems.add(
            &format!("{path}.name"),
            format!("no deployment is named {name}; there are {}", names.join(", ")),
        );
    }
    made
}
