// SPDX-License-Identifier: MIT OR Apache-2.0
//! Standard output. A reader that closes the pipe early, as `head` does, has
//! what it wanted: that is no failure.

use std::io::{self, Write};

use clap::Args;
use serde::Serialize;

use crate::failure::Failure;

/// How the answer is printed.
#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// One line of JSON for programs.
    #[arg(long)]
    pub json: bool,
}

/// Prints `value` as JSON or as text.
pub fn print<T: Serialize>(output: Output, value: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
    write_text(&if output.json { json_line(value)? } else { text() })
}

/// `value` as one line of JSON, newline included.
pub fn json_line<T: Serialize>(value: &T) -> Result<String, Failure> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::refused(format!("cannot write JSON: {error}")))?;
    Ok(text + "\n")
}

/// Prints `text`.
pub fn write_text(text: &str) -> Result<(), Failure> {
    write_or_end(text).map(|_| ())
}

/// Prints `text`; whether the reader is still there.
pub fn write_or_end(text: &str) -> Result<bool, Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::refused(format!("cannot write to standard output: {error}"))),
    }
}
