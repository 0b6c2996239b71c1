// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt record`: what a domain accesses, round by round, into a file.
//!
//! Whoever harvests clears the accessed bits, for everyone: two who harvest the same
//! guest each miss what the other saw. So a domain that the daemon observes is recorded
//! from the daemon's own rounds; only where there is no daemon, or where it leaves the
//! domain alone, does this command harvest by itself.

mod harvester;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use ept_virt_core::record::{Frame, Header, Reader, Writer};
use ept_virt_core::units::{Bytes, format_duration};

use crate::client::{self, Recorded};
use crate::complete;
use crate::failure::Failure;
use crate::simulate::guests::time;
use crate::watch::end_on_signals;

use harvester::Harvester;

/// Time between harvests when nobody says, as the daemon has it.
const AUTO_INTERVAL: Duration = Duration::from_secs(1);

/// What to record.
#[derive(Clone, Debug, Args)]
pub struct RecordArgs {
    /// Name, id or UUID.
    #[arg(add = complete::running())]
    domain: String,
    /// The file to write, which must not exist. It shows what the guest does, and is
    /// readable for its owner alone.
    file: PathBuf,
    /// End after so many rounds; without this and --for, when the domain ends, or at
    /// Ctrl-C.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: Option<u64>,
    /// End after this time, as 10min.
    #[arg(long = "for", value_name = "TIME", value_parser = time)]
    limit: Option<Duration>,
    /// Time between two rounds, as 500ms (default: 1s). Only for domains that the daemon
    /// does not observe: the rounds of others are the daemon's, and its policy's.
    #[arg(long, value_name = "TIME", value_parser = time)]
    interval: Option<Duration>,
}

/// Where rounds come from.
enum Source {
    /// The daemon's harvests.
    Daemon(Reader<BufReader<client::Patient>>),
    /// Our own.
    Own(Box<Harvester>, Header),
}

impl Source {
    fn open(args: &RecordArgs, uri: &str, socket: &Path) -> Result<Self, Failure> {
        match client::record(socket, &args.domain)? {
            Recorded::Rounds(_) if args.interval.is_some() => Err(Failure::refused(format!(
                "the daemon observes domain \"{}\", so its rounds are recorded, as often as it holds them",
                args.domain
            ))
            .hint("leave out --interval; `ept-virt policy set DOMAIN sampling.interval=TIME` changes it")),
            Recorded::Rounds(stream) => match Reader::new(BufReader::new(stream)) {
                Ok(reader) => Ok(Source::Daemon(reader)),
                Err(error) => {
                    Err(Failure::refused(format!("the daemon's recording is not understood: {error}"))
                        .hint("make sure that ept-virt and the daemon are of the same version"))
                }
            },
            Recorded::NotObserved => {
                let (harvester, header) =
                    Harvester::attach(uri, &args.domain, args.interval.unwrap_or(AUTO_INTERVAL))?;
                Ok(Source::Own(Box::new(harvester), header))
            }
        }
    }

    fn header(&self) -> &Header {
        match self {
            Source::Daemon(reader) => reader.header(),
            Source::Own(_, header) => header,
        }
    }

    fn words(&self) -> &'static str {
        match self {
            Source::Daemon(_) => "of the daemon's",
            Source::Own(..) => "of our own: the daemon does not observe the domain",
        }
    }

    /// The next round; `None` when there is none any more, or at `end`.
    fn next(&mut self, end: Option<Instant>) -> Result<Option<Frame>, Failure> {
        match self {
            Source::Daemon(reader) => {
                reader.input().get_mut().wait_until(end);
                match reader.frame() {
                    Ok(frame) => Ok(frame),
                    Err(_) if end.is_some_and(|end| Instant::now() >= end) => Ok(None),
                    Err(error) => Err(Failure::refused(format!("the daemon's recording broke off: {error}"))),
                }
            }
            Source::Own(harvester, _) => harvester.round(end),
        }
    }
}

/// Records until there is enough, or nothing more.
pub fn run(args: &RecordArgs, uri: &str, socket: &Path) -> Result<(), Failure> {
    let name = args.file.display();
    let cannot = |error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::AlreadyExists => "name another file, or remove this one",
            _ => "name another file",
        };
        Failure::unreachable(format!("cannot write {name}: {error}")).hint(hint)
    };
    // Before the guest is touched.
    let file = File::options().write(true).create_new(true).mode(0o600).open(&args.file).map_err(cannot)?;
    let done = record(args, uri, socket, &file, &cannot);
    if done.is_err() && file.metadata().is_ok_and(|data| data.len() == 0) {
        // Nothing was recorded.
        let _ = std::fs::remove_file(&args.file);
    }
    done
}

fn record(
    args: &RecordArgs,
    uri: &str,
    socket: &Path,
    file: &File,
    cannot: &impl Fn(io::Error) -> Failure,
) -> Result<(), Failure> {
    let writing = Arc::new(Mutex::new(()));
    end_on_signals(Arc::clone(&writing))
        .map_err(|error| Failure::refused(format!("cannot watch for signals: {error}")))?;
    let mut source = Source::open(args, uri, socket)?;
    let mut writer = Writer::new(BufWriter::new(file), source.header()).map_err(cannot)?;
    say(&format!("recording rounds {}", source.words()));
    let end = args.limit.map(|limit| Instant::now() + limit);
    let (mut rounds, mut bytes, mut first, mut last) = (0, 0, None, Duration::ZERO);
    while args.rounds.is_none_or(|most| rounds < most) && end.is_none_or(|end| Instant::now() < end) {
        let Some(frame) = source.next(end)? else { break };
        last = frame.time;
        first.get_or_insert(last);
        // A signal does not end the program amid a round.
        let whole = writing.lock().unwrap_or_else(PoisonError::into_inner);
        bytes += writer.append(frame).map_err(cannot)?;
        drop(whole);
        rounds += 1;
    }
    let time = last.saturating_sub(first.unwrap_or(last));
    let time = format_duration(Duration::from_millis(time.as_millis() as u64));
    say(&format!("{rounds} rounds in {time}, {} written to {}", Bytes(bytes), args.file.display()));
    Ok(())
}

/// For people; nobody is left to tell when standard error is gone.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
