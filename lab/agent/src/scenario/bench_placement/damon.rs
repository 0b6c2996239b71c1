// SPDX-License-Identifier: MIT OR Apache-2.0
//! DAMON as a tiering system: one context for each node, hot pages of the slow one
//! go up and cold pages of the fast one down.
//!
//! The figures are those of the tool that the authors of migrate_hot and migrate_cold
//! publish for it (HMSDK 4, tools/gen_migpol.py, with `--global`), written as damo
//! writes them to Linux 6.12's sysfs (Documentation/admin-guide/mm/damon/usage.rst).
//! damo's own script for tiering, scripts/mem_tier.sh, needs Linux 6.16 for its goals.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::guest_memory::read;
use super::host_memory::Span;

const ADMIN: &str = "/sys/kernel/mm/damon/admin/kdamonds";

/// `--monitoring_intervals 100ms 2s 20s --monitoring_nr_regions_range 100 10000`
const ATTRS: [(&str, &str); 5] = [
    ("intervals/sample_us", "100000"),
    ("intervals/aggr_us", "2000000"),
    ("intervals/update_us", "20000000"),
    ("nr_regions/min", "100"),
    ("nr_regions/max", "10000"),
];

/// What differs between promotion and demotion.
struct Scheme {
    node: u8,
    action: &'static str,
    target: &'static str,
    /// In samples of 20 to an aggregation: `--damos_access_rate`.
    accesses: [&'static str; 2],
    /// In aggregations: `--damos_age 30s max` and `0 max`.
    age_min: &'static str,
    /// `--damos_quotas 1s 50G 20s 0 0 1%` and `2s ...`
    quota_ms: &'static str,
    /// `--damos_filter young matching` leaves young pages out, `nomatching` all others.
    young_matching: &'static str,
}

const SCHEMES: [Scheme; 2] = [
    Scheme {
        node: 0,
        action: "migrate_cold",
        target: "1",
        accesses: ["0", "0"],
        age_min: "15",
        quota_ms: "1000",
        young_matching: "Y",
    },
    Scheme {
        node: 1,
        action: "migrate_hot",
        target: "0",
        accesses: ["1", "20"],
        age_min: "0",
        quota_ms: "2000",
        young_matching: "N",
    },
];

/// The largest that sysfs takes.
const MAX: &str = "4294967295";
const MAX_BYTES: &str = "18446744073709551615";

/// Running kdamonds; they end when this is dropped.
pub struct Damon {
    settings: Vec<String>,
}

impl Damon {
    /// Sets both contexts up and turns them on.
    pub fn start() -> Result<Self> {
        let spans = Span::all()?;
        let mut damon = Self { settings: Vec::new() };
        set("nr_kdamonds", &SCHEMES.len().to_string())?;
        for (number, scheme) in SCHEMES.iter().enumerate() {
            set(&format!("{number}/contexts/nr_contexts"), "1")?;
            let context = format!("{number}/contexts/0");
            set(&format!("{context}/targets/nr_targets"), "1")?;
            set(&format!("{context}/targets/0/regions/nr_regions"), "1")?;
            set(&format!("{context}/schemes/nr_schemes"), "1")?;
            set(&format!("{context}/schemes/0/filters/nr_filters"), "1")?;
            for (name, value) in scheme.values(&spans)? {
                let path = format!("{context}/{name}");
                set(&path, &value).with_context(|| format!("of {}", scheme.action))?;
                damon.settings.push(format!("{path} = {value}"));
            }
        }
        for number in 0..SCHEMES.len() {
            set(&format!("{number}/state"), "on")?;
        }
        Ok(damon)
    }

    /// What was written.
    pub fn settings(&self) -> &[String] {
        &self.settings
    }

    /// Ends them; what each scheme tried and did.
    pub fn stop(self) -> Result<Vec<String>> {
        let mut said = Vec::new();
        for (number, scheme) in SCHEMES.iter().enumerate() {
            let state = read(&format!("{ADMIN}/{number}/state"))?;
            ensure!(state.trim() == "on", "kdamond {number} has ended by itself");
            set(&format!("{number}/state"), "update_schemes_stats")?;
            let stats = format!("{ADMIN}/{number}/contexts/0/schemes/0/stats");
            let stat =
                |name: &str| -> Result<String> { Ok(read(&format!("{stats}/{name}"))?.trim().to_owned()) };
            said.push(format!(
                "{}: tried {} regions of {} bytes, applied {} of {} bytes, {} times at its quota",
                scheme.action,
                stat("nr_tried")?,
                stat("sz_tried")?,
                stat("nr_applied")?,
                stat("sz_applied")?,
                stat("qt_exceeds")?
            ));
        }
        Ok(said)
    }
}

impl Drop for Damon {
    fn drop(&mut self) {
        for number in 0..SCHEMES.len() {
            let _ = set(&format!("{number}/state"), "off");
        }
        let _ = set("nr_kdamonds", "0");
    }
}

impl Scheme {
    /// Files of a context and what goes into them.
    fn values(&self, spans: &[Span]) -> Result<Vec<(String, String)>> {
        let (start, end) = Span::bytes_of(spans, self.node)?;
        let mut values = vec![("operations".to_owned(), "paddr".to_owned())];
        values.extend(ATTRS.map(|(name, value)| (format!("monitoring_attrs/{name}"), value.to_owned())));
        values.push(("targets/0/regions/0/start".into(), start.to_string()));
        values.push(("targets/0/regions/0/end".into(), end.to_string()));
        let scheme = [
            ("action", self.action),
            ("target_nid", self.target),
            ("access_pattern/sz/min", "4096"),
            ("access_pattern/sz/max", MAX_BYTES),
            ("access_pattern/nr_accesses/min", self.accesses[0]),
            ("access_pattern/nr_accesses/max", self.accesses[1]),
            ("access_pattern/age/min", self.age_min),
            ("access_pattern/age/max", MAX),
            ("quotas/ms", self.quota_ms),
            ("quotas/bytes", "53687091200"),
            ("quotas/reset_interval_ms", "20000"),
            ("quotas/weights/sz_permil", "0"),
            ("quotas/weights/nr_accesses_permil", "0"),
            ("quotas/weights/age_permil", "10"),
            ("watermarks/metric", "none"),
            ("filters/0/type", "young"),
            ("filters/0/matching", self.young_matching),
        ];
        values.extend(scheme.map(|(name, value)| (format!("schemes/0/{name}"), value.to_owned())));
        Ok(values)
    }
}

fn set(name: &str, value: &str) -> Result<()> {
    let path = PathBuf::from(ADMIN).join(name);
    fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))
}
