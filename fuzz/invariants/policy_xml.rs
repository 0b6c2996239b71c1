// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for every XML, of a domain or of a policy alone.

use std::sync::LazyLock;

use ept_virt_core::policy::{Config, Effective, Layer, NAMESPACE, PolicyError, refusal};

use super::{hosts, message};

/// Configurations that a domain's policy may meet.
static CONFIGS: LazyLock<[Config; 2]> = LazyLock::new(|| {
    let full = "[defaults]\nmode = \"place\"\nrequired = true\nprofile = \"gold\"\ntiers.slow = \"1-3\"\n\
                [profiles.gold]\ndram = { share = \"60%\", min = \"1 GiB\" }\n\
                [profiles.a]\ndram.max = \"1 MiB\"\ntiers.fast = \"0-2\"";
    [Config::default(), Config::parse(full).expect("the configuration of this test is right")]
});

/// Reads `input` as both kinds of XML.
pub fn check(input: &[u8]) {
    let xml = String::from_utf8_lossy(input);
    match Layer::from_element_xml(&xml) {
        Ok(layer) => check_layer(&layer),
        Err(error) => check_error(&error),
    }
    match Layer::from_domain_xml(&xml) {
        Ok(layer) => {
            layer.iter().for_each(check_layer);
            check_effective(layer.as_ref());
        }
        Err(error) => check_error(&error),
    }
    for host in [hosts::good(), hosts::bare(), hosts::broken()] {
        refusal(&xml, &host).iter().for_each(|reason| message::check(reason));
    }
}

fn check_error(error: &PolicyError) {
    assert!(error.line >= 1);
    message::check(&error.to_string());
}

/// What is written is read again: alone, in a domain, and value by value.
fn check_layer(layer: &Layer) {
    assert_eq!(Layer::from_element_xml(&layer.to_xml()).as_ref(), Ok(layer), "{}", layer.to_xml());
    // As libvirt does it.
    let named = layer.to_metadata().replacen("<placement", &format!("<placement xmlns='{NAMESPACE}'"), 1);
    let domain = format!("<domain><metadata>{named}</metadata></domain>");
    assert_eq!(Layer::from_domain_xml(&domain).as_ref(), Ok(&Some(layer.clone())), "{domain}");
    for (setting, value) in layer.values() {
        assert_eq!(setting.parse_plain(&value.to_string()).as_ref(), Ok(value), "{}", setting.path());
    }
    check_effective(Some(layer));
}

/// A policy with all that lies below it.
fn check_effective(layer: Option<&Layer>) {
    for config in CONFIGS.iter() {
        match Effective::new(config, layer) {
            Ok(effective) => {
                assert!(!effective.policy.describe().contains(char::is_control));
                effective.layer.values().for_each(|(setting, _)| {
                    let _ = effective.origin(&setting.path());
                });
            }
            Err(problem) => message::check(&problem),
        }
    }
}
