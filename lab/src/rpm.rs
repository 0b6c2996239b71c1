// SPDX-License-Identifier: MIT OR Apache-2.0
//! The recipe of RPM packages, and what rpmlint says of it.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::Lab;
use crate::apt::{Need, need};
use crate::proc;

/// What judging it takes.
pub const NEEDS: &[Need] = &[
    need("rpmlint", "judges the recipe of RPM packages"),
    // A recommendation of the former in some of Debian's releases.
    need("rpm", "reads the recipe for it"),
];

const TIMEOUT: Duration = Duration::from_secs(60);

/// Has rpmlint judge the recipe: a warning is an error.
pub fn judge(lab: &Lab) -> Result<()> {
    let mut rpmlint = Command::new("rpmlint");
    rpmlint.current_dir(&lab.root).args([
        "--strict",
        "--rpmlintrc=rpm/ept-virt.rpmlintrc",
        "rpm/ept-virt.spec",
    ]);
    proc::run(&mut rpmlint, &lab.log("rpmlint"), TIMEOUT)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_recipe_has_the_workspaces_version() {
        let recipe = include_str!("../../rpm/ept-virt.spec");
        let version = recipe.lines().find_map(|line| line.strip_prefix("Version:")).map(str::trim);
        assert_eq!(version, Some(env!("CARGO_PKG_VERSION")));
    }
}
