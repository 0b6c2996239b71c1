// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the log goes: to journald, with fields, when it listens; else to standard
//! error. `RUST_LOG` chooses in both.

use std::panic;

use env_logger::{Builder, Env, Logger};
use log::{Log, Metadata, Record, error};
use systemd_journal_logger::{JournalLog, connected_to_journal};

/// Logs about one domain, given by name and UUID: in the journal,
/// `EPT_VIRT_DOMAIN=NAME` and `EPT_VIRT_UUID=UUID` find the line.
macro_rules! about {
    ($level:ident, $name:expr, $uuid:expr, $($text:tt)+) => {
        log::$level!(EPT_VIRT_DOMAIN:% = $name, EPT_VIRT_UUID:% = $uuid; $($text)+)
    };
}
pub(super) use about;

/// Starts logging. Faults of ours, in whatever thread, are logged as well.
pub fn start() {
    let mut builder = Builder::from_env(Env::default().default_filter_or("info"));
    // Whoever reads standard error has the time; the level is what it can not know.
    let filter = builder.format_timestamp(None).format_target(false).build();
    let most = filter.filter();
    let log: Box<dyn Log> = match connected_to_journal().then(JournalLog::new) {
        Some(Ok(journal)) => Box::new(Journal { filter, journal }),
        _ => Box::new(filter),
    };
    // Only a second call could fail, and there is none.
    if log::set_boxed_logger(log).is_ok() {
        log::set_max_level(most);
    }
    panic::set_hook(Box::new(|fault| error!("a fault in ept-virt, please report it: {fault}")));
}

/// journald, which asks nobody what to leave out.
struct Journal {
    filter: Logger,
    journal: JournalLog,
}

impl Log for Journal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if self.filter.matches(record) {
            self.journal.log(record);
        }
    }

    fn flush(&self) {}
}
