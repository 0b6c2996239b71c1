// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt version`: of all parts that have to fit together. A part that is
//! away is no failure: people ask for versions when something does not work.

use std::path::Path;
use std::time::Duration;

use ept_virt_core::domain::{Versions, versions};
use ept_virt_core::sampler::{KernelSampler, Sampler};
use ept_virt_core::uapi;
use ept_virt_core::wire::{PROTOCOL_VERSION, Status};
use serde::Serialize;

use crate::style::{Style, harmless};
use crate::{bounded, client};

/// How long daemon and libvirt may take, each.
const PATIENCE: Duration = Duration::from_secs(3);

/// The versions, as `--json` prints them. Of daemon, module and libvirt there is
/// a version or the reason why there is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// Of this program.
    pub version: String,
    /// Of the socket's protocol, as this program speaks it.
    pub protocol: u32,
    /// Of the module's interface, as this program speaks it.
    pub abi: String,
    /// Of the daemon that runs.
    pub daemon: Part,
    /// Of the interface of the module that is loaded.
    pub module: Part,
    /// Of libvirt.
    pub libvirt: Part,
    /// Of what libvirt drives, as "QEMU 10.0.2".
    pub hypervisor: Part,
}

/// A part that may be away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Null when it is not known.
    pub version: Option<String>,
    /// Why it is not known; null when it is.
    pub error: Option<String>,
}

impl From<Result<String, String>> for Part {
    fn from(found: Result<String, String>) -> Self {
        let (version, error) = match found {
            Ok(version) => (Some(version), None),
            Err(error) => (None, Some(error)),
        };
        Self { version, error }
    }
}

impl Parts {
    /// Asks all of them.
    pub fn ask(uri: &str, socket: &Path) -> Self {
        let status = client::status_within(socket, None, PATIENCE).map_err(|error| error.to_string());
        let asked = uri.to_owned();
        let libvirt = bounded::within(PATIENCE, move || versions(&asked).map_err(|error| error.to_string()));
        let silent = || Err(format!("libvirt at {uri} does not answer within {} s", PATIENCE.as_secs()));
        Self::of(status, own_look(), libvirt.unwrap_or_else(silent))
    }

    /// `module` is what this process found, which the daemon may know better.
    fn of(
        status: Result<Status, String>,
        module: Result<String, String>,
        libvirt: Result<Versions, String>,
    ) -> Self {
        let told = status.as_ref().ok().and_then(|status| status.daemon.module.as_ref());
        let told = told.map(|module| abi_of(&module.abi, &module.format));
        let hypervisor = match &libvirt {
            Ok(Versions { hypervisor: Some((kind, version)), .. }) => Ok(format!("{kind} {version}")),
            Ok(_) => Err("libvirt does not tell".to_owned()),
            Err(_) => Err("not known without libvirt".to_owned()),
        };
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: PROTOCOL_VERSION,
            abi: format!("{}.{}", uapi::ABI_VERSION >> 16, uapi::ABI_VERSION & 0xffff),
            daemon: status.map(|status| status.daemon.version).into(),
            module: module.or_else(|error| told.ok_or(error)).into(),
            libvirt: libvirt.map(|versions| versions.daemon.unwrap_or(versions.library).to_string()).into(),
            hypervisor: hypervisor.into(),
        }
    }
}

/// What the module's file tells us, which takes root.
fn own_look() -> Result<String, String> {
    let info = KernelSampler::open().map_err(|error| error.to_string())?.info();
    Ok(abi_of(&format!("{}.{}", info.abi.0, info.abi.1), &info.format.to_string()))
}

fn abi_of(abi: &str, format: &str) -> String {
    format!("ABI {abi}, {format}")
}

/// A line for each part.
pub fn render(parts: &Parts, style: &Style) -> String {
    let mut text = style.paint("1", &format!("ept-virt {}", parts.version));
    text += &format!("\nprotocol    {}\nmodule ABI  {}\n", parts.protocol, parts.abi);
    for (name, part) in [
        ("daemon", &parts.daemon),
        ("module", &parts.module),
        ("libvirt", &parts.libvirt),
        ("hypervisor", &parts.hypervisor),
    ] {
        let said = match (&part.version, &part.error) {
            (Some(version), _) => harmless(version),
            (None, error) => style.paint("33", &harmless(error.as_deref().unwrap_or("not known"))),
        };
        text += &format!("{name:<10}  {said}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use ept_virt_core::domain::Version;

    use super::*;

    fn busy() -> Status {
        serde_json::from_str(include_str!("../tests/fixtures/busy.json")).unwrap()
    }

    fn libvirt() -> Versions {
        let qemu = Some(("QEMU".into(), Version::from_number(10_000_002)));
        Versions { library: Version::from_number(11_003_000), daemon: None, hypervisor: qemu }
    }

    #[test]
    fn the_daemon_tells_of_the_module_to_those_who_may_not_look() {
        let parts = Parts::of(Ok(busy()), Err("not permitted".into()), Ok(libvirt()));
        assert_eq!(parts.module.version.as_deref(), Some("ABI 1.0, NPT"));
        assert_eq!(parts.daemon.version.as_deref(), Some("0.1.0"));
        assert_eq!(parts.libvirt.version.as_deref(), Some("11.3.0"));
        assert_eq!(parts.hypervisor.version.as_deref(), Some("QEMU 10.0.2"));
        let own = Parts::of(Ok(busy()), Ok("ABI 1.2, NPT".into()), Ok(libvirt()));
        assert_eq!(own.module.version.as_deref(), Some("ABI 1.2, NPT"));
    }

    #[test]
    fn what_is_away_is_said_and_no_failure() {
        let parts = Parts::of(Err("no daemon".into()), Err("no module".into()), Err("no libvirt".into()));
        let text = render(&parts, &Style::PLAIN);
        let end = "daemon      no daemon\nmodule      no module\nlibvirt     no libvirt\n\
                   hypervisor  not known without libvirt\n";
        assert!(text.starts_with("ept-virt ") && text.ends_with(end), "{text}");
    }
}
