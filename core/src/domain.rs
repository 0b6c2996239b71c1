// SPDX-License-Identifier: MIT OR Apache-2.0
//! libvirt: which domains run, what their XML says, and which process each is.
//!
//! The only module that calls libvirt, with those below it. libvirtd may restart at any time: a
//! broken connection is opened anew, and running guests are not touched by it.

mod events;
mod jobs;
mod metadata;
mod run_dir;
mod versions;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Once;

use log::{debug, info};
use virt::connect::Connect;
use virt::domain::{DomainRunningReason, DomainState, DomainStateReason};
use virt::enumutil::Enum;
use virt::error::ErrorNumber;
use virt::sys;

use crate::units::Bytes;
use crate::xml;

pub use events::watch;
pub use jobs::Jobs;
pub use metadata::{DefinedDomain, Description};
pub use versions::{Version, Versions, names, versions};

/// libvirt's system daemon, which runs the guests that are to be observed.
pub const DEFAULT_URI: &str = "qemu:///system";

/// Why libvirt could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// There is no connection.
    #[error("cannot connect to libvirt at {uri}: {message}. Is libvirtd or virtqemud running?")]
    Connect {
        /// The connection URI.
        uri: String,
        /// libvirt's own words.
        message: String,
    },
    /// No domain has this name, id or UUID.
    #[error("libvirt at {uri} has no domain \"{wanted}\", neither running nor defined")]
    NoDomain {
        /// The connection URI.
        uri: String,
        /// What was looked for.
        wanted: String,
    },
    /// A call failed on a good connection.
    #[error("libvirt at {uri} cannot {operation}: {message}")]
    Call {
        /// The connection URI.
        uri: String,
        /// What was tried.
        operation: &'static str,
        /// libvirt's own words.
        message: String,
    },
}

/// A running domain, as libvirt describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningDomain {
    /// Its identity.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// libvirt's number for it until it ends; none when it has just ended.
    pub id: Option<u32>,
    /// The live XML, metadata included; what was wrong when libvirt, though
    /// answering, could not tell it.
    pub xml: Result<String, String>,
    /// What its CPUs do.
    pub activity: Activity,
    /// What the guest has now: less than its memory slots while a balloon or memory of
    /// virtio-mem keeps some from it. None: libvirt did not say.
    pub current_memory: Option<Bytes>,
    /// Where its libvirt daemon keeps pid files.
    pub run_dir: PathBuf,
}

/// What the CPUs of a running domain do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// They run, as far as is known.
    #[default]
    Runs,
    /// They stand still: suspended by someone, by the guest itself, by an error of
    /// its disks, or for a while by libvirt.
    Suspended,
    /// They run while memory still comes from the host that the guest was on.
    Arrives,
}

impl RunningDomain {
    /// The `type` of the `<domain>` element: "kvm", "qemu"...
    pub fn kind(&self) -> Option<String> {
        let document = xml::read(self.xml.as_deref().ok()?).ok()?;
        document.root_element().attribute("type").map(str::to_owned)
    }

    /// Reads the pid of the domain's QEMU.
    ///
    /// libvirt's API does not tell the pid. Its pid file does, from before the
    /// `started` hook until the guest has ended, in libvirtd and virtqemud
    /// alike. The file can be stale: check the process against the UUID.
    pub fn read_pid(&self) -> io::Result<i32> {
        let text = fs::read_to_string(self.pid_file())?;
        let pid = text.trim().parse();
        pid.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is not a pid")))
    }

    /// The file that [`RunningDomain::read_pid`] reads.
    pub fn pid_file(&self) -> PathBuf {
        // libvirt allows no slash in a name, so this stays in the directory; and
        // renames no domain that runs, so the file has the name of its start.
        self.run_dir.join(format!("{}.pid", self.name))
    }
}

/// A connection to libvirt that mends itself.
pub struct Libvirt {
    uri: String,
    connection: Option<Connect>,
}

impl Libvirt {
    /// Names the connection; the first call opens it.
    pub fn new(uri: impl Into<String>) -> Self {
        silence();
        Self { uri: uri.into(), connection: None }
    }

    /// The connection URI.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The running domains. A connection that broke since the last call, as when
    /// libvirtd was restarted, is opened once again.
    pub fn running(&mut self) -> Result<Vec<RunningDomain>, LibvirtError> {
        if self.connection.is_some() {
            match self.try_running() {
                Ok(domains) => return Ok(domains),
                Err(error) => {
                    debug!("{error}; connecting again");
                    self.connection = None;
                }
            }
        }
        self.try_running().inspect_err(|_| self.connection = None)
    }

    fn try_running(&mut self) -> Result<Vec<RunningDomain>, LibvirtError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let connection = self.connection.insert(connection);
        let listed = connection.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE);
        let listed = listed.map_err(|error| call_error(&self.uri, "list the running domains", &error))?;
        let mut domains = Vec::with_capacity(listed.len());
        for domain in &listed {
            match describe(domain, &self.uri) {
                Ok(domain) => domains.push(domain),
                // It ended between the two calls.
                Err(error) if error.code() == ErrorNumber::NoDomain.into() => {}
                Err(error) => return Err(call_error(&self.uri, "describe a domain", &error)),
            }
        }
        Ok(domains)
    }

    fn connect(&self) -> Result<Connect, LibvirtError> {
        // The daemon changes nothing in libvirt, so it does not ask for the right.
        let connection = open(&self.uri, true)?;
        info!("connected to libvirt at {}", self.uri);
        Ok(connection)
    }
}

/// libvirt prints each error on stderr by itself; ours say more.
fn silence() {
    static SILENCE: Once = Once::new();
    SILENCE.call_once(virt::error::clear_error_callback);
}

fn open(uri: &str, read_only: bool) -> Result<Connect, LibvirtError> {
    // The crate would panic on a NUL.
    if uri.contains('\0') {
        let message = "the URI holds a NUL character".to_owned();
        return Err(LibvirtError::Connect { uri: uri.to_owned(), message });
    }
    let opened = if read_only { Connect::open_read_only(Some(uri)) } else { Connect::open(Some(uri)) };
    opened.map_err(|error| LibvirtError::Connect { uri: uri.to_owned(), message: error.message().to_owned() })
}

fn describe(domain: &virt::domain::Domain, uri: &str) -> Result<RunningDomain, virt::error::Error> {
    let (uuid, name) = (domain.uuid_string()?, domain.name()?);
    let xml = match domain.xml_desc(0) {
        Err(error) if error.code() == ErrorNumber::NoDomain.into() => return Err(error),
        // One domain's trouble is not the others'. A broken connection shows at
        // the next call that is not about one domain.
        xml => xml.map_err(|error| error.message().to_owned()),
    };
    Ok(RunningDomain {
        uuid,
        name,
        id: domain.id(),
        xml,
        activity: activity(domain),
        // libvirt's own account; QEMU is not asked.
        current_memory: domain.info().ok().map(|info| Bytes(info.memory.saturating_mul(1024))),
        run_dir: run_dir::of(uri),
    })
}

fn activity(domain: &virt::domain::Domain) -> Activity {
    use DomainRunningReason::{PostCopy, PostCopyFailed};
    let Ok((state, reason)) = domain.state() else { return Activity::Runs };
    match (state, reason) {
        (Enum::Known(DomainState::Paused | DomainState::PMSuspended), _) => Activity::Suspended,
        (
            Enum::Known(DomainState::Running),
            Enum::Known(DomainStateReason::Running(Enum::Known(PostCopy | PostCopyFailed))),
        ) => Activity::Arrives,
        _ => Activity::Runs,
    }
}

fn call_error(uri: &str, operation: &'static str, error: &virt::error::Error) -> LibvirtError {
    LibvirtError::Call { uri: uri.to_owned(), operation, message: error.message().to_owned() }
}

/// Tests of the domain of libvirt's test driver run one by one: all
/// connections of a process share it.
#[cfg(test)]
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static WRITER: std::sync::Mutex<()> = std::sync::Mutex::new(());
    WRITER.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// libvirt's own test driver: it needs no daemon, and has one running domain.
    #[test]
    fn lists_the_running_domains() {
        let _alone = alone();
        let mut libvirt = Libvirt::new("test:///default");
        let domains = libvirt.running().unwrap();
        let [domain] = domains.as_slice() else { panic!("{domains:?}") };
        assert_eq!(domain.name, "test");
        assert_eq!(domain.uuid, "6695eb01-f6a4-8304-79aa-97f2502e193f");
        assert_eq!(domain.id, Some(1));
        assert_eq!(domain.kind().as_deref(), Some("test"));
        assert_eq!(domain.pid_file().to_str(), Some("/run/libvirt/qemu/test.pid"));
        assert_eq!(domain.read_pid().unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(domain.activity, Activity::Runs);
        // 2 GiB of 8.
        assert_eq!(domain.current_memory, Some(Bytes(2 << 30)));
        // A second call uses the same connection.
        assert_eq!(libvirt.running().unwrap(), domains);
    }

    #[test]
    fn tells_whether_a_domain_is_suspended() {
        let _alone = alone();
        let mut libvirt = Libvirt::new("test:///default");
        let other = Connect::open(Some("test:///default")).unwrap();
        let domain = other.lookup_domain_by_name("test").unwrap();
        domain.suspend().unwrap();
        assert_eq!(libvirt.running().unwrap()[0].activity, Activity::Suspended);
        domain.resume().unwrap();
        assert_eq!(libvirt.running().unwrap()[0].activity, Activity::Runs);
    }

    #[test]
    fn says_what_is_wrong_with_a_connection() {
        let missing = "qemu+unix:///system?socket=/nonexistent/libvirt-sock";
        for uri in [missing, "nonsense:///", "bad\0uri"] {
            let error = Libvirt::new(uri).running().unwrap_err();
            assert!(matches!(error, LibvirtError::Connect { .. }), "{error}");
            assert!(error.to_string().contains("Is libvirtd or virtqemud running?"), "{error}");
        }
    }

    #[test]
    fn kind_of_broken_xml_is_unknown() {
        let domain = |xml: &str| RunningDomain {
            uuid: String::new(),
            name: "a".into(),
            id: None,
            xml: Ok(xml.into()),
            activity: Activity::Runs,
            current_memory: None,
            run_dir: PathBuf::new(),
        };
        assert_eq!(domain("<domain type='qemu'><name>a</name></domain>").kind().as_deref(), Some("qemu"));
        assert_eq!(domain("<domain").kind(), None);
        assert_eq!(domain("<domain/>").kind(), None);
        // What would take the reader minutes is not begun.
        let crowd: String = (0..2000).map(|n| format!(" a{n}=''")).collect();
        assert_eq!(domain(&format!("<domain type='kvm'><metadata{crowd}/></domain>")).kind(), None);
        let crowd: String = (0..2000).map(|n| format!(" xmlns:a{n}='b{n}'")).collect();
        assert_eq!(domain(&format!("<domain type='kvm'><metadata{crowd}/></domain>")).kind(), None);
    }
}
