//! `[telemetry]`, and what OpenTelemetry's own variables say beside it.

use super::*;

/// Reads the text with these variables and this text of `headers_file`.
fn telemetry(
    text: &str,
    variables: &[(&str, &str)],
    headers: Option<&str>,
) -> Result<Option<TelemetryArgs>, Vec<String>> {
    let raw = read::read(text).expect("it reads");
    let facts = Facts {
        dir: PathBuf::from("/"),
        cores: 4,
        gpus: None,
        user_cache: None,
        token_file: None,
        tls: None,
        api_key_file: None,
        dashboard_key_file: None,
        telemetry_headers_file: headers.map(|text| Ok(text.to_owned())),
        telemetry_environment: variables.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        model: None,
    };
    let said = |problem: Problem| problem.message;
    validate::validate(raw, text, &facts)
        .map(|config| config.telemetry)
        .map_err(|problems| problems.into_iter().map(said).collect())
}

fn on(text: &str, variables: &[(&str, &str)]) -> TelemetryArgs {
    telemetry(text, variables, None).expect("it is right").expect("it is on")
}

#[test]
fn traces_are_off_until_somebody_names_a_collector() {
    assert_eq!(telemetry("", &[], None), Ok(None));
    assert_eq!(telemetry("[telemetry]\nsample_ratio = 0.5", &[], None), Ok(None));
    let on_by_file = on("[telemetry]\notlp_endpoint = \"http://c:4318/\"", &[]);
    assert_eq!(on_by_file.endpoint, "http://c:4318/v1/traces");
    assert_eq!((on_by_file.service_name.as_str(), on_by_file.sample_ratio), ("heliostat", 1.0));
    assert_eq!(
        on("", &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://e:4318")]).endpoint,
        "http://e:4318/v1/traces"
    );
    // The address of one signal is whole.
    let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t/in");
    assert_eq!(on("", &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://e"), traces]).endpoint, "https://t/in");
    for off in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")] {
        assert_eq!(telemetry("", &[traces, off], None), Ok(None), "{off:?}");
    }
}

#[test]
fn the_file_wins_and_variables_fill_in() {
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://e:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20a,x-team=b"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
        ("OTEL_SERVICE_NAME", "from-environment"),
        ("OTEL_RESOURCE_ATTRIBUTES", "zone=a,rack=1"),
    ];
    let filled = telemetry("", &variables, Some("X-Team: c\n# no header\n")).unwrap().unwrap();
    let pair = |(k, v): (&str, &str)| (k.to_owned(), v.to_owned());
    assert_eq!(filled.headers, [("authorization", "Bearer a"), ("x-team", "c")].map(pair));
    assert_eq!(filled.timeout.as_millis(), 2500);
    assert_eq!((filled.service_name.as_str(), filled.resource.len()), ("from-environment", 2));
    let text = "[telemetry]\notlp_endpoint = \"http://f\"\nservice_name = \"f\"\ntimeout_s = 1.0\n\
                resource_attributes = { zone = \"f\" }";
    let written = on(text, &variables);
    assert_eq!((written.endpoint.as_str(), written.service_name.as_str()), ("http://f/v1/traces", "f"));
    assert_eq!(written.timeout.as_millis(), 1000);
    assert_eq!(written.resource, [("rack", "1"), ("zone", "f")].map(pair));
    assert!(!format!("{filled:?}").contains("Bearer"), "no log shows a header's value");
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://e:4318");
    for (text, variables, says) in [
        ("[telemetry]\notlp_endpoint = \"c:4318\"", vec![], "is no address of a collector"),
        ("", vec![("OTEL_EXPORTER_OTLP_ENDPOINT", "c:4317")], "OTEL_EXPORTER_OTLP_ENDPOINT = \"c:4317\""),
        ("", vec![endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")], "PROTOCOL = grpc is not supported"),
        (
            "",
            vec![endpoint, ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")],
            "COMPRESSION = gzip is not supported",
        ),
        ("", vec![endpoint, ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")], "is no number of milliseconds"),
        (
            "[telemetry]\notlp_endpoint = \"http://c\"\nsample_ratio = 1.5",
            vec![],
            "`sample_ratio` is a share",
        ),
        ("[telemetry]\notlp_endpoint = \"http://c\"\nmax_queued_spans = 0", vec![], "must be above 0"),
    ] {
        let problems = telemetry(text, &variables, None).expect_err(text);
        assert!(problems.iter().any(|problem| problem.contains(says)), "{says} is not in {problems:?}");
    }
    let bad = telemetry("[telemetry]\notlp_endpoint = \"http://c\"", &[], Some("no header\n"));
    assert!(bad.expect_err("a line without a colon")[0].contains("a line without a header"));
}
