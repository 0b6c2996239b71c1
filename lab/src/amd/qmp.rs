// SPDX-License-Identifier: MIT OR Apache-2.0
//! The emulator's monitor (QMP: one JSON object per line).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connected monitor.
pub struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// Shakes hands.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).context("bounding the wait for the monitor")?;
        let mut monitor = Self { stream: BufReader::new(stream) };
        monitor.receive()?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Writes the machine's state to `uri` and waits until that is done.
    pub fn migrate(&mut self, uri: &str, timeout: Duration) -> Result<()> {
        // The default bandwidth is meant for networks.
        let unlimited = json!({"max-bandwidth": 1_u64 << 40});
        self.execute("migrate-set-parameters", unlimited)?;
        self.execute("migrate", json!({ "uri": uri }))?;
        let deadline = Instant::now() + timeout;
        loop {
            let answer = self.execute("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("saving the machine failed: {answer}"),
                _ if Instant::now() > deadline => bail!("saving the machine takes too long"),
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Presses and releases a key, by QEMU's name for it.
    pub fn press(&mut self, key: &str) -> Result<()> {
        self.execute("send-key", json!({"keys": [{"type": "qcode", "data": key}]})).map(drop)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream.get_mut(), "{request}")
            .with_context(|| format!("sending {command} to the monitor"))?;
        loop {
            let mut answer = self.receive()?;
            if let Some(error) = answer.get("error") {
                bail!("the monitor refuses {command}: {error}");
            }
            // Anything else is an event.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).context("reading from the monitor")?;
        if read == 0 {
            bail!("the emulator closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("reading the monitor's {line:?}"))
    }
}
