//! Arguments of `helio cert`, and those by which other commands are given certificates.

use clap::{Args, Subcommand};
use heliostat_runtime::system::TlsFiles;
use std::path::PathBuf;

/// Where certificates are made without `--dir`.
pub(crate) const CERT_DIR: &str = "certs";

/// `helio cert`.
#[derive(Debug, Subcommand)]
#[command(after_help = "\
Examples:
  helio cert ca                              once per cluster: certs/ca.crt and certs/ca.key
  helio cert node head --host 10.0.0.1       for each machine: certs/head/{ca.crt,tls.crt,tls.key}
  helio cert client ada                      for people and programs that only talk to the cluster
  helio cert show certs/head

Then, in cluster.toml:   [security]
                         dir = \"certs/head\"
on the other machines:   helio node --join 10.0.0.1 --tls certs/node-1
on a laptop:             helio status --address 10.0.0.1 --tls certs/ada")]
pub(crate) enum Cert {
    /// Make a certificate authority.
    Ca(CertCa),
    /// Make or renew the certificate of a machine, for its head, node agent and workers.
    Node(CertNode),
    /// Make or renew the certificate of a client: it cannot pose as a node or a head.
    Client(CertMade),
    /// Show what a certificate says.
    Show(CertShow),
}

/// `helio cert ca`.
#[derive(Debug, Args)]
pub(crate) struct CertCa {
    /// Where to write it.
    #[arg(long, value_name = "DIR", default_value = CERT_DIR)]
    pub(crate) dir: PathBuf,
    /// Its name, for whoever reads certificates.
    #[arg(long, default_value = "Heliostat cluster CA")]
    pub(crate) name: String,
    /// How long it is valid.
    #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub(crate) days: u32,
}

/// `helio cert client`, and what it shares with `helio cert node`.
#[derive(Debug, Args)]
pub(crate) struct CertMade {
    /// Whose it is; also the directory in DIR that is written.
    pub(crate) name: String,
    /// Where the CA is.
    #[arg(long, value_name = "DIR", default_value = CERT_DIR)]
    pub(crate) dir: PathBuf,
    /// How long it is valid; never longer than the CA.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub(crate) days: u32,
}

/// `helio cert node`.
#[derive(Debug, Args)]
pub(crate) struct CertNode {
    /// Whose it is.
    #[command(flatten)]
    pub(crate) made: CertMade,
    /// Address or host name by which others reach the machine; may be repeated. NAME, localhost, 127.0.0.1 and ::1 are
    /// always added.
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Vec<String>,
}

/// `helio cert show`.
#[derive(Debug, Args)]
pub(crate) struct CertShow {
    /// A certificate, or a directory with one.
    pub(crate) path: PathBuf,
}

/// Certificates for a cluster that has `[security]`.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Tls {
    /// Directory with ca.crt, tls.crt and tls.key, as `helio cert` writes it, for a cluster with `[security]`.
    #[arg(long = "tls", value_name = "DIR", global = true)]
    dir: Option<PathBuf>,
    /// Certificates of the CA.
    #[arg(long = "tls-ca", value_name = "FILE", hide = true, global = true)]
    ca: Option<PathBuf>,
    /// Certificate.
    #[arg(long = "tls-cert", value_name = "FILE", hide = true, global = true)]
    cert: Option<PathBuf>,
    /// Private key.
    #[arg(long = "tls-key", value_name = "FILE", hide = true, global = true)]
    key: Option<PathBuf>,
    /// The name that the certificate of every node has, where it is checked instead of the address.
    #[arg(long = "tls-server-name", value_name = "NAME", global = true)]
    server_name: Option<String>,
}

impl Tls {
    /// The files, absolute; none where none are named.
    pub(crate) fn files(&self) -> std::io::Result<Option<TlsFiles>> {
        let whole = match (&self.dir, &self.ca, &self.cert, &self.key) {
            (Some(dir), ..) => TlsFiles::in_dir(dir),
            (None, Some(ca), Some(cert), Some(key)) => {
                TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone(), server_name: None }
            }
            (None, ..) => return Ok(None),
        };
        Ok(Some(TlsFiles {
            ca: std::path::absolute(whole.ca)?,
            cert: std::path::absolute(whole.cert)?,
            key: std::path::absolute(whole.key)?,
            server_name: self.server_name.clone(),
        }))
    }

    /// The arguments that say the same.
    pub(crate) fn to_args(files: &TlsFiles) -> Vec<String> {
        let path = |path: &PathBuf| path.display().to_string();
        let mut args = Vec::new();
        for (name, value) in [("--tls-ca", &files.ca), ("--tls-cert", &files.cert), ("--tls-key", &files.key)]
        {
            args.extend([name.to_owned(), path(value)]);
        }
        args.extend(files.server_name.iter().flat_map(|name| ["--tls-server-name".to_owned(), name.clone()]));
        args
    }
}
