//! `helio cert`: a certificate authority for one cluster, and the certificates that it makes for nodes and clients.
//!
//! Everything is a file in one directory; nothing is asked over the network. The CA's key never leaves it.

use super::print;
use crate::args;
use anyhow::{Context, Result, ensure};
use heliostat_runtime::system::TlsFiles;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use time::{Duration, OffsetDateTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

/// Clocks may be so far apart.
const CLOCKS_APART: Duration = Duration::hours(1);
/// What a node is always reached by from its own machine.
const OWN_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// With less than this left `helio check` speaks of it.
const SHORT: Duration = Duration::days(14);

/// Runs `helio cert`.
pub(crate) fn run(command: &args::Cert) -> Result<()> {
    match command {
        args::Cert::Ca(args) => make_ca(args),
        args::Cert::Node(args) => {
            let mut names = args.host.clone();
            names.push(args.made.name.clone());
            names.extend(OWN_NAMES.map(str::to_owned));
            let uses = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            make(&args.made, names, &uses)
        }
        args::Cert::Client(made) => make(made, Vec::new(), &[ExtendedKeyUsagePurpose::ClientAuth]),
        args::Cert::Show(args) => show(&args.path),
    }
}

/// Where a CA lies.
struct CaFiles {
    cert: PathBuf,
    key: PathBuf,
}

impl CaFiles {
    fn of(dir: &Path) -> Self {
        Self { cert: dir.join("ca.crt"), key: dir.join("ca.key") }
    }
}

fn make_ca(args: &args::CertCa) -> Result<()> {
    let files = CaFiles::of(&args.dir);
    // Whoever trusts the old one would not trust what a new one makes.
    ensure!(
        !files.key.exists() && !files.cert.exists(),
        "there is a CA in {} already; every certificate that it made would be worth nothing with a new one: keep it, \
         remove it, or name another --dir",
        args.dir.display()
    );
    let (mut params, key) = (CertificateParams::default(), KeyPair::generate()?);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, args.name.as_str());
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - CLOCKS_APART, now + Duration::days(args.days.into()));
    let ca = CertifiedIssuer::self_signed(params, key).context("cannot make the CA")?;
    make_dir(&args.dir)?;
    write(&files.key, &ca.key().serialize_pem(), 0o600)?;
    write(&files.cert, &ca.pem(), 0o644)?;
    let dir = args.dir.display();
    print(&format!(
        "{dir}/ca.crt  the certificate of the CA, for everybody\n\
         {dir}/ca.key  its key: keep it here, or better off the cluster\n\
         next: helio cert node NAME --host ADDRESS{}\n",
        dir_option(&args.dir)
    ))
}

/// Makes a certificate in `DIR/NAME`, or renews the one that is there.
fn make(args: &args::CertMade, names: Vec<String>, uses: &[ExtendedKeyUsagePurpose]) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    ensure!(
        args.name.chars().all(plain) && args.name.starts_with(|c: char| c.is_ascii_alphanumeric()),
        "the name {:?} is that of a directory, too: write letters, digits, `-` and `.`",
        args.name
    );
    let (issuer, ca_pem, ca_ends) = load_ca(&args.dir)?;
    let mut params = CertificateParams::new(unique(names)).context("a --host is no name or address")?;
    params.distinguished_name.push(DnType::CommonName, args.name.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = uses.to_vec();
    params.use_authority_key_identifier_extension = true;
    let now = OffsetDateTime::now_utc();
    let ends = (now + Duration::days(args.days.into())).min(ca_ends);
    ensure!(ends > now, "the CA in {} has expired; make a new one in another --dir", args.dir.display());
    (params.not_before, params.not_after) = (now - CLOCKS_APART, ends);
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer).context("cannot sign")?;
    let dir = args.dir.join(&args.name);
    make_dir(&dir)?;
    let files = TlsFiles::in_dir(&dir);
    write(&files.ca, &ca_pem, 0o644)?;
    write(&files.key, &key.serialize_pem(), 0o600)?;
    write(&files.cert, &certificate.pem(), 0o644)?;
    files.check().context("the new certificate cannot be used")?;
    let shown = dir.display();
    let next = match uses.contains(&ExtendedKeyUsagePurpose::ServerAuth) {
        true => {
            format!("helio node --join HEAD --tls {shown}, or [security] dir = \"{shown}\" in cluster.toml")
        }
        false => format!("helio status --address HEAD --tls {shown}"),
    };
    print(&format!(
        "{shown}/  ca.crt, tls.crt, tls.key; valid until {}\nnext: take the directory to its machine; {next}\n",
        ends.date()
    ))
}

fn load_ca(dir: &Path) -> Result<(Issuer<'static, KeyPair>, String, OffsetDateTime)> {
    let files = CaFiles::of(dir);
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| {
            format!("cannot read {}; make a CA with `helio cert ca{}`", path.display(), dir_option(dir))
        })
    };
    let (cert, key) = (read(&files.cert)?, read(&files.key)?);
    let key = KeyPair::from_pem(&key).with_context(|| format!("{} is no key", files.key.display()))?;
    let ends = *Facts::read(&files.cert)?.iter().map(|facts| &facts.ends).min().context("no certificate")?;
    let issuer = Issuer::from_ca_cert_pem(&cert, key)
        .with_context(|| format!("{} is no certificate of a CA", files.cert.display()))?;
    Ok((issuer, cert, ends))
}

fn dir_option(dir: &Path) -> String {
    let default = Path::new(args::CERT_DIR);
    if dir == default { String::new() } else { format!(" --dir {}", dir.display()) }
}

fn unique(names: Vec<String>) -> Vec<String> {
    let mut kept: Vec<String> = Vec::new();
    for name in names {
        if !kept.contains(&name) {
            kept.push(name);
        }
    }
    kept
}

fn make_dir(dir: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("cannot create {}", dir.display()))
}

/// Writes a file that is the old one or the new one, whole.
fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let fresh = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let _ = fs::remove_file(&fresh);
        let mut file = OpenOptions::new().create_new(true).write(true).mode(mode).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// What a certificate says.
#[derive(Debug)]
struct Facts {
    subject: String,
    issuer: String,
    names: Vec<String>,
    role: &'static str,
    ends: OffsetDateTime,
}

impl Facts {
    /// All certificates of a PEM file.
    fn read(path: &Path) -> Result<Vec<Self>> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let not = || format!("{} holds no certificate in PEM", path.display());
        let pems: Vec<Pem> = Pem::iter_from_buffer(&bytes).collect::<Result<_, _>>().with_context(not)?;
        let facts: Vec<Self> = pems
            .iter()
            .map(|pem| Ok(Self::of(&pem.parse_x509()?)))
            .collect::<Result<_>>()
            .with_context(not)?;
        ensure!(!facts.is_empty(), not());
        Ok(facts)
    }

    fn of(certificate: &X509Certificate<'_>) -> Self {
        let uses = certificate.extended_key_usage().ok().flatten();
        let role = match uses.map(|uses| (uses.value.server_auth, uses.value.client_auth)) {
            _ if certificate.is_ca() => "CA",
            Some((true, true)) | None => "node",
            Some((true, false)) => "server",
            Some((false, true)) => "client",
            Some((false, false)) => "for nothing here",
        };
        let names = certificate.subject_alternative_name().ok().flatten();
        Self {
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            names: names
                .map_or_else(Vec::new, |san| san.value.general_names.iter().filter_map(name).collect()),
            role,
            ends: certificate.validity().not_after.to_datetime(),
        }
    }

    fn left(&self) -> Duration {
        self.ends - OffsetDateTime::now_utc()
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match **bytes {
            [a, b, c, d] => Some(std::net::Ipv4Addr::new(a, b, c, d).to_string()),
            ref bytes => <[u8; 16]>::try_from(bytes).ok().map(|v6| std::net::Ipv6Addr::from(v6).to_string()),
        },
        _ => None,
    }
}

fn show(path: &Path) -> Result<()> {
    let path = match path.is_dir() {
        true => ["tls.crt", "ca.crt"].iter().map(|name| path.join(name)).find(|path| path.exists()),
        false => Some(path.to_owned()),
    };
    let path = path.context("there is no tls.crt and no ca.crt in the directory")?;
    for facts in Facts::read(&path)? {
        let left = facts.left();
        let when = match left.is_positive() {
            true => format!("{} days left", left.whole_days()),
            false => "EXPIRED".into(),
        };
        let names = if facts.names.is_empty() { "none".into() } else { facts.names.join(", ") };
        print(&format!(
            "subject  {}\nmade by  {}\nrole     {}\nnames    {names}\nuntil    {} ({when})\n",
            facts.subject,
            facts.issuer,
            facts.role,
            facts.ends.date()
        ))?;
    }
    Ok(())
}

/// What is to be said of a certificate that ends soon or has ended.
pub(crate) fn ends_soon(path: &Path) -> Option<String> {
    let first = Facts::read(path).ok()?.into_iter().next()?;
    let (left, path) = (first.left(), path.display());
    match left {
        left if left >= SHORT => None,
        left if left.is_positive() => Some(format!(
            "the certificate {path} expires in {} days: renew it with `helio cert`, running processes will take the \
             new one",
            left.whole_days()
        )),
        _ => Some(format!("the certificate {path} has expired: renew it with `helio cert`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn made(dir: &Path, name: &str) -> args::CertMade {
        args::CertMade { name: name.into(), dir: dir.into(), days: 30 }
    }

    fn ca(dir: &Path) -> Result<()> {
        make_ca(&args::CertCa { dir: dir.into(), name: "test".into(), days: 60 })
    }

    #[test]
    fn a_ca_is_made_once_and_its_certificates_say_what_they_are_for() {
        let dir = tempfile::tempdir().expect("temp dir");
        let dir = dir.path().join("certs");
        let error = make(&made(&dir, "n"), Vec::new(), &[]).expect_err("no CA").to_string();
        assert!(error.contains("helio cert ca --dir"), "{error}");
        ca(&dir).expect("a CA");
        assert!(ca(&dir).expect_err("it is there").to_string().contains("already"));
        let node =
            args::cert::CertNode { made: made(&dir, "n1"), host: vec!["10.0.0.7".into(), "fe80::1".into()] };
        run(&args::Cert::Node(node)).expect("a node's");
        run(&args::Cert::Client(made(&dir, "ada"))).expect("a client's");
        let facts = |name: &str| Facts::read(&dir.join(name)).expect("facts").remove(0);
        let node = facts("n1/tls.crt");
        assert_eq!((node.role, node.subject.as_str(), node.issuer.as_str()), ("node", "CN=n1", "CN=test"));
        assert_eq!(node.names, ["10.0.0.7", "fe80::1", "n1", "localhost", "127.0.0.1", "::1"]);
        assert_eq!(node.left().whole_days(), 29);
        let client = facts("ada/tls.crt");
        assert_eq!((client.role, client.names.len()), ("client", 0));
        assert_eq!(facts("ca.crt").role, "CA");
        for secret in ["ca.key", "n1/tls.key"] {
            assert_eq!(fs::metadata(dir.join(secret)).expect("a key").permissions().mode() & 0o077, 0);
        }
    }

    #[test]
    fn no_certificate_outlives_its_ca_and_short_ones_are_spoken_of() {
        let dir = tempfile::tempdir().expect("temp dir");
        ca(dir.path()).expect("a CA");
        let ends = |days| {
            let args = args::CertMade { days, ..made(dir.path(), "n") };
            run(&args::Cert::Client(args)).expect("made");
            Facts::read(&dir.path().join("n/tls.crt")).expect("facts").remove(0).ends
        };
        assert_eq!(ends(365), Facts::read(&dir.path().join("ca.crt")).expect("facts").remove(0).ends);
        assert!(ends_soon(&dir.path().join("n/tls.crt")).is_none());
        ends(5);
        let said = ends_soon(&dir.path().join("n/tls.crt")).expect("short");
        assert!(said.contains("expires in 4 days"), "{said}");
    }

    #[test]
    fn a_name_is_no_path() {
        for name in ["../x", "a/b", ".", "", "a b"] {
            assert!(make(&made(Path::new("/nowhere"), name), Vec::new(), &[]).is_err(), "{name}");
        }
    }
}
