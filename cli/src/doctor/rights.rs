// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the caller may do.

use super::report::Check;

/// Whether everything could be looked at.
pub fn judge(is_root: bool) -> Check {
    match is_root {
        true => Check::ok("permissions", "root: all commands can be used"),
        false => Check::warn(
            "permissions",
            "not root: `samples`, `memslots`, `start`, `stop`, `pause`, `resume` and `hook install` take root, \
             `policy` the right to change domains, and some of the above could not be seen",
            "run this as root; the group that the daemon's configuration names may ask for list, status and map",
        ),
    }
}
