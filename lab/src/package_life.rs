// SPDX-License-Identifier: MIT OR Apache-2.0
//! The Debian packages in a host's tree, on the build machine's own CPU: a compiler takes
//! minutes where it is emulated. What DKMS built goes on to a host, as an archive that DKMS
//! takes in place of compiling; and the tree itself, as it was with a second kernel in it,
//! is what another host boots.

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

/// What is run in a tree.
struct Script {
    /// As it is called in the cache.
    name: &'static str,
    /// For people.
    does: &'static str,
    text: &'static str,
}

/// From installation to purge. Keeps [`PREBUILT`].
const LIFE: Script = Script {
    name: "package-life",
    does: "install, upgrade, remove, purge",
    text: concat!(include_str!("../amd/package-common"), include_str!("../amd/package-life")),
};

/// On a host that has a kernel alone, and gets another. Keeps [`UPGRADED`].
const KERNELS: Script = Script {
    name: "package-kernels",
    does: "what apt brings, a second kernel",
    text: concat!(include_str!("../amd/package-common"), include_str!("../amd/package-kernels")),
};

/// The module as DKMS built it.
const PREBUILT: &str = "prebuilt.tar.gz";

/// The tree with a second kernel.
const UPGRADED: &str = "upgraded";

/// The module is compiled several times, or a kernel fetched.
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
    let prebuilt = run(lab, suite, &tested, &LIFE)?.join(PREBUILT);
    Ok(Packages { tested, prebuilt })
}

/// The tree of such a host in which the packages met a second kernel.
pub fn upgraded(lab: &Lab, suite: Suite) -> Result<PathBuf> {
    Ok(run(lab, suite, &deb::tested(lab)?, &KERNELS)?.join(UPGRADED))
}

/// Runs a script, unless that was done before; the folder with what it keeps.
fn run(lab: &Lab, suite: Suite, tested: &Tested, script: &Script) -> Result<PathBuf> {
    let flavour = Flavour::systemd(suite);
    let tree = debian::host_tree(lab, flavour)?;
    let key = debs(tested)
        .iter()
        .try_fold(Key::new("package life 4").item(&tree).text(script.text), |key, (_, path)| {
            key.file(path)
        })?;
    let name = suite.item(script.name);
    lab.cache.get_or_build(&name, &key, |kept| {
        if !nix::unistd::geteuid().is_root() {
            bail!("packages are installed in a tree by root alone: run this command as root once");
        }
        let step = lab.progress.step(format!("packages: {} ({flavour})", script.does));
        fs::create_dir(kept).with_context(|| format!("creating {}", kept.display()))?;
        fs::write(kept.join("script"), script.text).context("writing what is run in the tree")?;
        for (name, path) in debs(tested) {
            fs::copy(path, kept.join(name)).with_context(|| format!("copying {}", path.display()))?;
        }
        let mut command = debian::enter(&tree, &[Bind::write(kept, "/packages")], "sh /packages/script");
        proc::run(&mut command, &lab.log(&name), TIMEOUT)?;
        step.done("");
        Ok(())
    })
}
