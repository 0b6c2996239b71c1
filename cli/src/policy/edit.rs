// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt policy edit`: the element in the user's editor.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ept_virt_core::policy::Layer;

use crate::failure::Failure;

const HEAD: &str = "<!-- What is left out has its default; `ept-virt policy schema` has all settings.\n     \
                    An empty file changes nothing. -->\n";

/// A file that only its owner reads, and that goes when it is not needed any more.
struct Draft {
    path: PathBuf,
}

impl Draft {
    fn new(text: &str) -> io::Result<Self> {
        let dir = env::temp_dir();
        for attempt in 0..100 {
            let path = dir.join(format!("ept-virt-policy-{}-{attempt}.xml", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                file => {
                    let draft = Self { path };
                    file?.write_all(text.as_bytes())?;
                    return Ok(draft);
                }
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn read(&self) -> io::Result<String> {
        fs::read_to_string(&self.path)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Lets the user change `layer` until it is valid, or until they give up; `None`
/// when nothing changed.
pub fn edit(layer: &Layer, check: &dyn Fn(&Layer) -> Result<(), String>) -> Result<Option<Layer>, Failure> {
    let failed =
        |error: io::Error| Failure::unreachable(format!("cannot keep the policy in a file: {error}"));
    let draft = Draft::new(&(HEAD.to_owned() + &layer.to_xml())).map_err(failed)?;
    loop {
        open_editor(&draft.path)?;
        let text = draft.read().map_err(failed)?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let changed = Layer::from_element_xml(&text).map_err(|error| error.to_string());
        let problem = match changed.and_then(|changed| check(&changed).map(|()| changed)) {
            Ok(changed) => return Ok((changed != *layer).then_some(changed)),
            Err(problem) => problem,
        };
        if !ask_again(&problem).map_err(failed)? {
            return Err(Failure::refused(format!("the policy was not changed: {problem}")));
        }
    }
}

fn open_editor(path: &Path) -> Result<(), Failure> {
    let named =
        ["VISUAL", "EDITOR"].iter().find_map(|name| env::var(name).ok().filter(|value| !value.is_empty()));
    let editor = named.unwrap_or_else(|| "vi".into());
    // Through the shell, as git and virsh do: the variables may hold options.
    let status = Command::new("sh").arg("-c").arg(format!("{editor} \"$1\"")).arg("sh").arg(path).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            Err(Failure::refused(format!("the editor \"{editor}\" ended with {status}; nothing was changed")))
        }
        Err(error) => {
            Err(Failure::unreachable(format!("cannot start the editor \"{editor}\": {error}"))
                .hint("set EDITOR"))
        }
    }
}

/// Whether the user wants to go on; nobody is asked without a terminal.
fn ask_again(problem: &str) -> io::Result<bool> {
    if !io::stdin().is_terminal() {
        return Ok(false);
    }
    eprint!("{problem}\nEdit again? [Y/n] ");
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(!answer.is_empty() && !answer.trim_start().to_lowercase().starts_with('n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_is_private_and_goes_away() {
        use std::os::unix::fs::PermissionsExt;
        let draft = Draft::new("<placement/>").unwrap();
        let path = draft.path.clone();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(draft.read().unwrap(), "<placement/>");
        drop(draft);
        assert!(!path.exists());
    }
}
