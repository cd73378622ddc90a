//! `[telemetry]` and OpenTelemetry's own environment variables: where traces go, if anywhere.
//!
//! The file wins where both say something, so that a machine's environment changes no cluster that says what it wants.

use super::{Check, Facts, Raw};
use heliostat_actors::telemetry::TelemetryArgs;
use percent_encoding::percent_decode_str;
use std::collections::BTreeMap;
use std::time::Duration;

/// What a collector's address lacks, by OTLP's own rule.
const PATH: &str = "/v1/traces";
/// OpenTelemetry's default for one message.
const TIMEOUT_S: f64 = 10.0;

/// `OTEL_EXPORTER_OTLP_TRACES_` and the name, else without `TRACES_`: its whole name and its value.
fn exporter<'a>(environment: &'a BTreeMap<String, String>, name: &str) -> Option<(&'a str, &'a str)> {
    let names = ["OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"].map(|start| format!("{start}{name}"));
    names.iter().find_map(|name| environment.get_key_value(name)).map(|(k, v)| (k.as_str(), v.as_str()))
}

impl Check<'_> {
    /// Where traces go; None where nobody asked for any.
    pub(super) fn telemetry(&mut self, raw: &Raw, facts: &Facts) -> Option<TelemetryArgs> {
        let (section, environment) = (&raw.telemetry, &facts.telemetry_environment);
        let problems = self.problems.len();
        let endpoint = self.endpoint(section.otlp_endpoint.as_deref(), environment)?;
        self.unsupported(environment);
        let timeout_s = section.timeout_s.or_else(|| {
            let (name, value) = exporter(environment, "TIMEOUT")?;
            let ms = value.parse::<f64>().ok();
            self.require(
                ms.is_some(),
                "telemetry.timeout_s",
                format!("{name} = {value} is no number of milliseconds"),
                "write `timeout_s` in [telemetry], or correct the variable",
            );
            Some(ms? / 1e3)
        });
        let timeout_s = timeout_s.unwrap_or(TIMEOUT_S);
        self.positive("telemetry.timeout_s", timeout_s);
        self.positive("telemetry.interval_s", section.interval_s);
        self.positive("telemetry.max_queued_spans", f64::from(section.max_queued_spans));
        self.require(
            (0.0..=1.0).contains(&section.sample_ratio),
            "telemetry.sample_ratio",
            "`sample_ratio` is a share of the requests",
            "write a number from 0 to 1",
        );
        let headers = self.headers(facts);
        let listed = environment.get("OTEL_RESOURCE_ATTRIBUTES").map(String::as_str).unwrap_or_default();
        let mut resource: BTreeMap<String, String> = pairs(listed).collect();
        resource.extend(section.resource_attributes.clone());
        let named = resource.remove("service.name");
        let service_name = section.service_name.clone();
        let service_name = service_name.or_else(|| environment.get("OTEL_SERVICE_NAME").cloned()).or(named);
        (self.problems.len() == problems).then(|| TelemetryArgs {
            endpoint,
            headers,
            sample_ratio: section.sample_ratio,
            service_name: service_name.unwrap_or_else(|| "heliostat".to_owned()),
            resource: resource.into_iter().collect(),
            timeout: Duration::from_secs_f64(timeout_s),
            interval: Duration::from_secs_f64(section.interval_s),
            queue_max: section.max_queued_spans,
        })
    }

    /// The address for traces, path included.
    fn endpoint(&mut self, written: Option<&str>, environment: &BTreeMap<String, String>) -> Option<String> {
        const TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        let off = environment.get("OTEL_SDK_DISABLED").is_some_and(|off| off.eq_ignore_ascii_case("true"));
        let none = environment.get("OTEL_TRACES_EXPORTER").is_some_and(|exporter| exporter == "none");
        let (whose, endpoint, whole) = match (written, exporter(environment, "ENDPOINT")) {
            (Some(endpoint), _) => ("`otlp_endpoint`", endpoint, endpoint.ends_with(PATH)),
            (None, Some((name, endpoint))) if !off && !none => (name, endpoint, name == TRACES),
            (None, _) => return None,
        };
        let is_url = ["http://", "https://"].iter().any(|scheme| {
            endpoint.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'))
        });
        self.require(
            is_url,
            "telemetry.otlp_endpoint",
            format!("{whose} = {endpoint:?} is no address of a collector"),
            "otlp_endpoint = \"http://127.0.0.1:4318\"",
        );
        let endpoint = endpoint.trim_end_matches('/');
        is_url.then(|| if whole { endpoint.to_owned() } else { format!("{endpoint}{PATH}") })
    }

    /// Headers of the file and of the environment.
    fn headers(&mut self, facts: &Facts) -> Vec<(String, String)> {
        let listed = exporter(&facts.telemetry_environment, "HEADERS").map_or("", |(_, value)| value);
        let mut headers: BTreeMap<String, String> = pairs(listed).collect();
        match &facts.telemetry_headers_file {
            None => {}
            Some(Err(why)) => self.require(
                false,
                "telemetry.headers_file",
                format!("cannot read the file: {why}"),
                "one `name: value` per line",
            ),
            Some(Ok(text)) => {
                let lines = text.lines().map(str::trim);
                for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
                    match line.split_once(':').filter(|(name, _)| !name.trim().is_empty()) {
                        Some((name, value)) => {
                            headers.insert(name.trim().to_lowercase(), value.trim().to_owned());
                        }
                        None => self.require(
                            false,
                            "telemetry.headers_file",
                            "the file has a line without a header",
                            "one `name: value` per line",
                        ),
                    }
                }
            }
        }
        headers.into_iter().collect()
    }

    /// Variables that ask for what the exporter does not do.
    fn unsupported(&mut self, environment: &BTreeMap<String, String>) {
        for (name, taken) in [
            ("PROTOCOL", "http/protobuf"),
            ("COMPRESSION", "none"),
            ("CERTIFICATE", ""),
            ("CLIENT_CERTIFICATE", ""),
            ("CLIENT_KEY", ""),
        ] {
            let Some((name, value)) = exporter(environment, name).filter(|(_, value)| *value != taken) else {
                continue;
            };
            let fix = match taken {
                "" => format!("unset {name}: collectors are trusted by the machine's certificates"),
                taken => format!("set {name}={taken}, or unset it"),
            };
            self.require(
                false,
                "telemetry.otlp_endpoint",
                format!("{name} = {value} is not supported: traces go as protobuf over HTTP"),
                fix,
            );
        }
    }
}

/// `key=value,key=value`, where values may be percent-encoded.
fn pairs(list: &str) -> impl Iterator<Item = (String, String)> {
    list.split(',').filter_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        let key = key.trim();
        // What is no text when it is decoded stays as it is.
        let value = percent_decode_str(value.trim()).decode_utf8().unwrap_or(value.trim().into());
        (!key.is_empty()).then(|| (key.to_owned(), value.into_owned()))
    })
}
