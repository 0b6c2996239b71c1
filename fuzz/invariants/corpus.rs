// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fuzzers found worth keeping.

use std::fs;
use std::path::Path;

/// Gives every file of a target's corpus to `check`.
pub fn replay(target: &str, check: impl Fn(&[u8])) {
    // Each user is a crate in a folder of the project's root.
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut count = 0;
    for entry in fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
        let path = entry.expect("a folder can be read to its end").path();
        // Shown when the check fails.
        println!("{}", path.display());
        check(&fs::read(&path).expect("a file of the corpus can be read"));
        count += 1;
    }
    assert!(count > 10, "{} holds {count} files", dir.display());
}
