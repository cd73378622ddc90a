//! Certificates for tests: CAs, and what they make for nodes and clients, good and bad.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use heliostat_runtime::system::TlsFiles;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose as Use, IsCa, KeyPair,
};

/// A certificate authority.
pub(crate) struct Ca(CertifiedIssuer<'static, KeyPair>);

/// What a certificate says.
pub(crate) struct Bears {
    pub(crate) hosts: &'static [&'static str],
    pub(crate) uses: &'static [Use],
    /// Days from now on which it ends.
    pub(crate) ends_in_days: i64,
}

pub(crate) const NODE: Bears =
    Bears { hosts: &["127.0.0.1"], uses: &[Use::ServerAuth, Use::ClientAuth], ends_in_days: 30 };

impl Ca {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes a certificate into a directory and returns its files.
    pub(crate) fn make(&self, dir: &Path, bears: &Bears) -> TlsFiles {
        let hosts: Vec<String> = bears.hosts.iter().map(|&host| host.to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.extended_key_usages = bears.uses.to_vec();
        let day = Duration::from_secs(86_400);
        let days = |days: i64| match u32::try_from(days) {
            Ok(days) => SystemTime::now() + day * days,
            Err(_) => SystemTime::now() - day * u32::try_from(-days).unwrap(),
        };
        (params.not_before, params.not_after) = (days(-60).into(), days(bears.ends_in_days).into());
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::create_dir_all(dir).unwrap();
        let files = TlsFiles::in_dir(dir);
        fs::write(&files.ca, self.0.pem()).unwrap();
        fs::write(&files.key, key.serialize_pem()).unwrap();
        fs::write(&files.cert, certificate.pem()).unwrap();
        files
    }
}
