// SPDX-License-Identifier: MIT OR Apache-2.0
//! The life of the Debian packages in a host's tree, on the build machine's own CPU: a
//! compiler takes minutes where it is emulated. What DKMS built goes on to a host, as an
//! archive that DKMS takes in place of compiling; and the tree itself, as it was with a
//! second kernel in it, is what another host boots.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::amd::Payload;
use crate::cache::Key;
use crate::deb::{self, Tested};
use crate::debian::{self, Bind, Suite};
use crate::flavour::Flavour;
use crate::proc;

/// What is run in the tree.
const SCRIPT: &str = include_str!("../amd/package-life");

/// What is kept of it: the module as DKMS built it, and the tree with a second kernel.
const PREBUILT: &str = "prebuilt.tar.gz";
const UPGRADED: &str = "upgraded";

/// The module is compiled four times, and a kernel fetched.
const TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// What an emulated host is given to install.
pub struct Packages {
    tested: Tested,
    /// The module as DKMS built it for the host's kernel.
    prebuilt: PathBuf,
}

impl Packages {
    /// Adds them to what a host is given.
    pub fn add_to(&self, payload: Payload) -> Result<Payload> {
        self.files().iter().try_fold(payload, |payload, (name, path)| payload.file(name, path))
    }

    fn files(&self) -> [(&'static str, &Path); 5] {
        let [first, first_dkms, next, next_dkms] = debs(&self.tested);
        [first, first_dkms, next, next_dkms, ("prebuilt.tar.gz", &self.prebuilt)]
    }
}

/// The packages with the names that the host knows them by.
fn debs(tested: &Tested) -> [(&'static str, &Path); 4] {
    let Tested { first, next } = tested;
    [
        ("first.deb", &first.program),
        ("first-dkms.deb", &first.dkms),
        ("next.deb", &next.program),
        ("next-dkms.deb", &next.dkms),
    ]
}

/// Has the packages installed, upgraded, removed and purged in the tree of such a host,
/// unless that was done before; an error if anything is not as it should be.
pub fn native(lab: &Lab, suite: Suite) -> Result<Packages> {
    let tested = deb::tested(lab)?;
    let prebuilt = live(lab, suite, &tested)?.join(PREBUILT);
    Ok(Packages { tested, prebuilt })
}

/// The tree of such a host in which the packages met a second kernel.
pub fn upgraded(lab: &Lab, suite: Suite) -> Result<PathBuf> {
    Ok(live(lab, suite, &deb::tested(lab)?)?.join(UPGRADED))
}

/// The folder with what is kept.
fn live(lab: &Lab, suite: Suite, tested: &Tested) -> Result<PathBuf> {
    let flavour = Flavour::systemd(suite);
    let tree = debian::host_tree(lab, flavour)?;
    let key = debs(tested)
        .iter()
        .try_fold(Key::new("package life 3").item(&tree).text(SCRIPT), |key, (_, path)| key.file(path))?;
    let name = suite.item("package-life");
    lab.cache.get_or_build(&name, &key, |kept| {
        if !nix::unistd::geteuid().is_root() {
            bail!("packages are installed in a tree by root alone: run this command as root once");
        }
        let step = lab
            .progress
            .step(format!("packages: install, upgrade, remove, purge, a second kernel ({flavour})"));
        fs::create_dir(kept).with_context(|| format!("creating {}", kept.display()))?;
        fs::write(kept.join("life"), SCRIPT).context("writing what is run in the tree")?;
        for (name, path) in debs(tested) {
            fs::copy(path, kept.join(name)).with_context(|| format!("copying {}", path.display()))?;
        }
        let mut command = debian::enter(&tree, &[Bind::write(kept, "/packages")], "sh /packages/life");
        proc::run(&mut command, &lab.log(&name), TIMEOUT)?;
        step.done("");
        Ok(())
    })
}
