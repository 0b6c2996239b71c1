// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a host can do what a policy asks for.

use crate::text::word;
use crate::topology::{NodeSet, Tiers};

use super::{Config, Effective, Layer, Mode, Policy, Value, parse};

impl Policy {
    /// The tiers that the policy means on this host, and what is in the way of
    /// moving anything between them.
    pub fn tiers(&self, host: &Tiers) -> (Tiers, Option<String>) {
        let tiers = host.with_policy(self.fast_nodes.as_ref(), self.slow_nodes.as_ref());
        let unknown = tiers.unknown_nodes(host);
        let both = tiers.fast.intersection(&tiers.slow);
        let words = |nodes: &NodeSet| word(&nodes.to_string());
        let obstacle = if self.mode != Mode::Place {
            None
        } else if !unknown.is_empty() {
            Some(format!("the policy's NUMA nodes {} have no memory on this host", words(&unknown)))
        } else if !both.is_empty() {
            Some(format!("NUMA nodes {} are in both tiers of the policy", words(&both)))
        } else if tiers.slow.is_empty() || tiers.fast.is_empty() {
            Some(tiers.from.clone())
        } else {
            None
        };
        (tiers, obstacle)
    }
}

/// What a host is asked before a domain starts. Each answer is only asked for
/// when it counts.
pub trait Host {
    /// The configuration, or why it can not be read.
    fn config(&self) -> Result<Config, String>;
    /// The tiers of its memory, or why they are not known.
    fn tiers(&self) -> Result<Tiers, String>;
    /// Nothing when daemon and kernel module are there, or what is missing.
    fn ready(&self) -> Result<(), String>;
}

/// Why the domain with this XML must not start; `None` for all that may. Only
/// a policy that says `required` keeps a domain from starting: one that is
/// invalid, or that this host can not serve.
pub fn refusal(xml: &str, host: &dyn Host) -> Option<String> {
    let said = Layer::from_domain_xml(xml);
    // Without a policy in sight there is nothing to ask the host for, unless it
    // requires one of all domains.
    let config = host.config();
    let effective = match (&said, &config) {
        (Err(error), _) => return parse::says_required(xml).then(|| error.to_string()),
        (Ok(said), Err(problem)) => {
            let required = said.as_ref().is_some_and(required);
            return required.then(|| problem.clone());
        }
        (Ok(said), Ok(config)) => Effective::new(config, said.as_ref()),
    };
    let policy = match effective {
        Ok(effective) => effective.policy,
        Err(problem) => {
            let required =
                said.iter().flatten().chain(config.iter().map(|config| &config.defaults)).any(required);
            return required.then_some(problem);
        }
    };
    if !policy.required || policy.mode == Mode::Off {
        return None;
    }
    if let Err(missing) = host.ready() {
        return Some(missing);
    }
    match (policy.mode, host.tiers()) {
        (Mode::Place, Ok(tiers)) => policy.tiers(&tiers).1,
        (Mode::Place, Err(problem)) => Some(problem),
        _ => None,
    }
}

fn required(layer: &Layer) -> bool {
    layer.get("required") == Some(&Value::Flag(true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::NAMESPACE;

    struct Fake {
        config: Result<Config, String>,
        slow: Vec<u32>,
        ready: Result<(), String>,
    }

    impl Host for Fake {
        fn config(&self) -> Result<Config, String> {
            self.config.clone()
        }

        fn tiers(&self) -> Result<Tiers, String> {
            let slow = NodeSet::from_iter(self.slow.clone());
            Ok(Tiers { fast: NodeSet::from_iter([0]), slow, from: "there is one tier only".into() })
        }

        fn ready(&self) -> Result<(), String> {
            self.ready.clone()
        }
    }

    fn good() -> Fake {
        Fake { config: Ok(Config::default()), slow: vec![1], ready: Ok(()) }
    }

    fn domain(attributes: &str, inside: &str) -> String {
        format!(
            "<domain type='kvm'><name>a</name><metadata>\
             <p:placement xmlns:p='{NAMESPACE}' {attributes}>{inside}</p:placement></metadata></domain>"
        )
    }

    #[test]
    fn a_domain_that_requires_nothing_always_starts() {
        let broken = Fake {
            config: Err("the configuration is broken".into()),
            slow: vec![],
            ready: Err("no daemon".into()),
        };
        for xml in [
            domain("mode='place'", ""),
            domain("mode='plase'", ""),
            domain("mode='place' profile='gold'", ""),
            domain("mode='place' required='no'", "<p:tiers slow='9'/>"),
            "<domain/>".into(),
            "<domain".into(),
            String::new(),
            "<!DOCTYPE d><domain/>".into(),
        ] {
            assert_eq!(refusal(&xml, &good()), None, "{xml}");
            assert_eq!(refusal(&xml, &broken), None, "{xml}");
        }
    }

    #[test]
    fn what_is_required_and_not_servable_does_not_start() {
        let required =
            |attributes: &str, inside: &str| domain(&format!("required='yes' {attributes}"), inside);
        let place = required("mode='place'", "");
        assert_eq!(refusal(&place, &good()), None);
        let refused = |xml: &str, host: &Fake| refusal(xml, host).unwrap();
        assert_eq!(refused(&place, &Fake { ready: Err("no daemon".into()), ..good() }), "no daemon");
        assert_eq!(refused(&place, &Fake { slow: vec![], ..good() }), "there is one tier only");
        let misspelt = refused(&required("mode='plase'", ""), &good());
        assert!(misspelt.contains("did you mean \"place\"?"), "{misspelt}");
        let nodes = refused(&required("mode='place'", "<p:tiers slow='9'/>"), &good());
        assert!(nodes.contains("nodes 9 have no memory"), "{nodes}");
        assert!(refused(&required("profile='gold'", ""), &good()).contains("no profile \"gold\""));
        assert_eq!(refused(&place, &Fake { config: Err("broken".into()), ..good() }), "broken");
        let excluded = required("mode='place'", "<p:exclude><p:memory alias='dimm0'/></p:exclude>");
        assert_eq!(refusal(&excluded, &good()), None);
        // Who only observes needs no second tier, and who does nothing needs nothing.
        let observe = required("", "");
        assert_eq!(refusal(&observe, &Fake { slow: vec![], ..good() }), None);
        assert_eq!(refused(&observe, &Fake { ready: Err("no module".into()), ..good() }), "no module");
        assert_eq!(refusal(&required("mode='off'", ""), &Fake { ready: Err("x".into()), ..good() }), None);
    }

    #[test]
    fn a_host_can_require_for_all_domains() {
        let config = Config::parse("[defaults]\nmode = \"place\"\nrequired = true").unwrap();
        let host = Fake { config: Ok(config), slow: vec![], ready: Ok(()) };
        assert_eq!(refusal("<domain/>", &host).unwrap(), "there is one tier only");
        assert_eq!(refusal(&domain("required='no'", ""), &host), None);
    }
}
