//! Errors of `[security]` and of what goes with it.

use super::*;
use heliostat_runtime::system::TlsFiles;

#[test]
fn certificates_are_all_there_or_none() {
    refused(
        "[security]\nserver_name = \"helio.internal\"\n",
        "
c.toml:2:15: no TLS without certificate, key and CA
  |
2 | server_name = \"helio.internal\"
  |               ^^^^^^^^^^^^^^^^ set `dir`, or all of `ca`, `cert` and `key`; `helio cert` makes them",
    );
    refused(
        "[security]\nca = \"ca.pem\"\nkey = \"key.pem\"\n",
        "
c.toml:2:6: no TLS without certificate, key and CA
  |
2 | ca = \"ca.pem\"
  |      ^^^^^^^^ set `dir`, or all of `ca`, `cert` and `key`; `helio cert` makes them",
    );
    refused(
        "[security]\ndir = \"certs/head\"\n",
        "
c.toml:2:7: CA certificate DIR/certs/head/ca.crt: No such file or directory (os error 2)
  |
2 | dir = \"certs/head\"
  |       ^^^^^^^^^^^^ make them: helio cert ca; helio cert node NAME --host ADDRESS",
    );
}

#[test]
fn certificates_are_found_from_anywhere() {
    let dir = model_dir();
    let certs = dir.path().join("certs");
    let cert = |args: &[&str]| {
        use clap::Parser;
        let dir = certs.display().to_string();
        let args = ["helio", "cert"].iter().chain(args).copied().chain(["--dir", &dir]);
        match crate::args::Cli::parse_from(args).command {
            crate::args::Command::Cert(command) => crate::commands::cert::run(&command).expect("made"),
            _ => unreachable!(),
        }
    };
    cert(&["ca"]);
    cert(&["node", "head", "--host", "10.0.0.1"]);
    let text = "[security]\ndir = \"certs/head\"\nserver_name = \"helio.internal\"\n";
    let config = Config::parse(text, "c.toml", dir.path(), |_| None).expect("valid");
    let own =
        TlsFiles { server_name: Some("helio.internal".into()), ..TlsFiles::in_dir(&certs.join("head")) };
    assert_eq!(config.security, Some(own));
    let again =
        Config::parse(&config.effective, "e.toml", Path::new("/nowhere"), |_| None).expect(&config.effective);
    assert_eq!(again.security, config.security);
}

#[test]
fn what_is_not_encrypted_is_said() {
    let token = "[cluster]\ntoken_file = \"token\"\n[head]\nbind = \"10.0.0.1:6379\"\n";
    let said = |text: &str| parse(text).expect(text).in_clear().join("\n");
    assert_eq!(said(""), "");
    assert!(said(token).contains("10.0.0.1:6379) are not encrypted; set [security]"));
}
