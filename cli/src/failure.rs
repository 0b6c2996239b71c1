// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a command ends when it does not succeed.

use std::fmt;
use std::process::ExitCode;

use ept_virt_core::domain::LibvirtError;

/// Why a command failed; prints as one line, with what to do behind it.
#[derive(Debug)]
pub struct Failure {
    kind: Kind,
    message: String,
    hint: Option<String>,
}

/// Kinds of failure, each with its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Asked, and the answer was no.
    Refused,
    /// Nothing could be asked.
    Unreachable,
}

impl Failure {
    /// The request was made and failed: exit code 1.
    pub fn refused(message: impl Into<String>) -> Self {
        Failure { kind: Kind::Refused, message: message.into(), hint: None }
    }

    /// The request could not be made, as without a daemon, a permission or a
    /// part of the installation: exit code 2.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Failure { kind: Kind::Unreachable, message: message.into(), hint: None }
    }

    /// With what the person can do.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Failure { hint: Some(hint.into()), ..self }
    }

    /// What failed.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What the person can do, if that is known.
    pub fn what_to_do(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The exit code that `--help` documents.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.kind {
            Kind::Refused => 1,
            Kind::Unreachable => 2,
        })
    }
}

impl From<LibvirtError> for Failure {
    fn from(error: LibvirtError) -> Self {
        match error {
            LibvirtError::Connect { .. } => Failure::unreachable(error.to_string()),
            _ => Failure::refused(error.to_string()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, ": {hint}"),
            None => Ok(()),
        }
    }
}
