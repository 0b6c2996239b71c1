// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reading and writing the policy in a domain's metadata.

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use crate::policy::NAMESPACE;

use super::{LibvirtError, RunningDomain, call_error, describe, open, silence};

/// The prefix that libvirt gives the element.
const PREFIX: &str = "ev";

/// One of the two descriptions that libvirt has of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Description {
    /// Of the running domain.
    Live,
    /// For its next start.
    Config,
}

impl Description {
    fn impact(self) -> u32 {
        match self {
            Description::Live => sys::VIR_DOMAIN_AFFECT_LIVE,
            Description::Config => sys::VIR_DOMAIN_AFFECT_CONFIG,
        }
    }
}

/// A domain that is defined, running or both.
pub struct DefinedDomain {
    uri: String,
    domain: Domain,
    /// Its name.
    pub name: String,
    /// It runs.
    pub is_active: bool,
    /// It has a description for its next start.
    pub is_persistent: bool,
}

impl DefinedDomain {
    /// Finds a domain by name, id or UUID, in this order, as virsh does by id,
    /// UUID and name; a domain whose name is a number is the one that is meant.
    pub fn find(uri: &str, wanted: &str, read_only: bool) -> Result<Self, LibvirtError> {
        silence();
        let connection = open(uri, read_only)?;
        let describe = |domain: Domain| -> Result<Self, Error> {
            let (name, is_active, is_persistent) =
                (domain.name()?, domain.is_active()?, domain.is_persistent()?);
            Ok(Self { uri: uri.to_owned(), domain, name, is_active, is_persistent })
        };
        let found = lookup(&connection, wanted).and_then(describe);
        found.map_err(|error| match error.code() == ErrorNumber::NoDomain.into() {
            true => LibvirtError::NoDomain { uri: uri.to_owned(), wanted: wanted.to_owned() },
            false => call_error(uri, "find the domain", &error),
        })
    }

    /// The domain as one that runs; `None` when it does not.
    pub fn running(&self) -> Result<Option<RunningDomain>, LibvirtError> {
        let described = self.is_active.then(|| describe(&self.domain, &self.uri)).transpose();
        described.map_err(|error| call_error(&self.uri, "describe the domain", &error))
    }

    /// The whole XML of one description.
    pub fn xml(&self, description: Description) -> Result<String, LibvirtError> {
        let flags = match description {
            Description::Live => 0,
            Description::Config => sys::VIR_DOMAIN_XML_INACTIVE,
        };
        self.domain.xml_desc(flags).map_err(|error| call_error(&self.uri, "describe the domain", &error))
    }

    /// Replaces the policy in one description; `None` takes it away. The
    /// element carries no namespace: libvirt adds it.
    pub fn set_policy(&self, element: Option<&str>, description: Description) -> Result<(), LibvirtError> {
        // The crate would panic on a NUL.
        if element.is_some_and(|element| element.contains('\0')) {
            let message = "the policy holds a NUL character".to_owned();
            return Err(LibvirtError::Call { uri: self.uri.clone(), operation: "write the policy", message });
        }
        let key = element.map(|_| PREFIX);
        let kind = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;
        let done = self.domain.set_metadata(kind, element, key, Some(NAMESPACE), description.impact());
        done.map_err(|error| call_error(&self.uri, "write the policy into the domain's metadata", &error))
    }
}

fn lookup(connection: &Connect, wanted: &str) -> Result<Domain, Error> {
    let by_name = connection.lookup_domain_by_name(wanted);
    match &by_name {
        Err(error) if error.code() == ErrorNumber::NoDomain.into() => {}
        _ => return by_name,
    }
    if let Some(id) = crate::units::digits(wanted).filter(|_| !wanted.is_empty()) {
        return connection.lookup_domain_by_id(id).or(by_name);
    }
    match wanted.len() >= 32 {
        true => connection.lookup_domain_by_uuid_string(wanted).or(by_name),
        false => by_name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Layer;

    /// libvirt's own test driver.
    const URI: &str = "test:///default";

    #[test]
    fn finds_by_name_id_and_uuid() {
        for wanted in ["test", "1", "6695eb01-f6a4-8304-79aa-97f2502e193f"] {
            let domain = DefinedDomain::find(URI, wanted, true).unwrap();
            assert_eq!((domain.name.as_str(), domain.is_active, domain.is_persistent), ("test", true, true));
        }
        for wanted in ["tset", "7", "", "6695eb01-f6a4-8304-79aa-97f2502e1930"] {
            let error = DefinedDomain::find(URI, wanted, true).err().unwrap();
            assert!(matches!(error, LibvirtError::NoDomain { .. }), "{error}");
        }
    }

    #[test]
    fn writes_what_it_reads() {
        let _alone = crate::domain::alone();
        let domain = DefinedDomain::find(URI, "test", false).unwrap();
        let mut layer = Layer::default();
        layer.assign("mode", "place").unwrap();
        layer.assign("dram.min", "512 MiB").unwrap();
        for description in [Description::Live, Description::Config] {
            let read = || Layer::from_domain_xml(&domain.xml(description).unwrap()).unwrap();
            assert_eq!(read(), None);
            domain.set_policy(Some(&layer.to_metadata()), description).unwrap();
            assert_eq!(read().as_ref(), Some(&layer));
        }
        domain.set_policy(None, Description::Live).unwrap();
        assert_eq!(Layer::from_domain_xml(&domain.xml(Description::Live).unwrap()).unwrap(), None);
        let config = Layer::from_domain_xml(&domain.xml(Description::Config).unwrap()).unwrap();
        assert_eq!(config, Some(layer));
        domain.set_policy(None, Description::Config).unwrap();
    }
}
