// SPDX-License-Identifier: MIT OR Apache-2.0
//! Quantities with their units, read and written as libvirt does: a number and
//! a `unit` word beside it.
//!
//! Sizes follow libvirt's words: `KiB`, `MiB`, `GiB`, `TiB` (or `K`, `M`, `G`,
//! `T`) count in 1024s, `KB`, `MB`, `GB`, `TB` in 1000s.

use std::fmt;
use std::time::Duration;

use crate::text::word;

/// Size of the page that everything counts in, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Pages of 4 KiB in a huge page of 2 MiB.
pub const PAGES_PER_2M: u64 = 512;

/// Size of such a page, in bytes.
pub const BYTES_PER_2M: u64 = PAGES_PER_2M * PAGE_BYTES;

/// Why a quantity could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a number, or not one of those allowed.
    #[error("\"{text}\" is not {expected}")]
    BadNumber {
        /// What was read.
        text: String,
        /// What was expected, as "a whole number".
        expected: &'static str,
    },
    /// Not a unit of this quantity.
    #[error("unknown unit \"{unit}\": use one of {known}", known = .known.join(", "))]
    UnknownUnit {
        /// What was read.
        unit: String,
        /// The units that there are.
        known: &'static [&'static str],
    },
    /// The quantity does not fit.
    #[error("{number} {unit} is too large")]
    TooLarge {
        /// The number.
        number: u64,
        /// The unit.
        unit: String,
    },
}

/// Words for sizes, in the order in which messages show them.
pub const SIZE_UNITS: &[&str] = &["bytes", "KiB", "MiB", "GiB", "TiB"];

/// Words for rates.
pub const RATE_UNITS: &[&str] = &["KiB/s", "MiB/s", "GiB/s"];

/// Words for times.
pub const TIME_UNITS: &[&str] = &["ms", "s", "min", "h"];

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Reads a number in `unit`.
    pub fn parse(number: &str, unit: &str) -> Result<Self, UnitError> {
        let factor = match unit {
            "b" | "byte" | "bytes" => 1,
            "KB" => 1000,
            "MB" => 1000 * 1000,
            "GB" => 1000 * 1000 * 1000,
            "TB" => 1000 * 1000 * 1000 * 1000,
            "k" | "K" | "KiB" => 1 << 10,
            "M" | "MiB" => 1 << 20,
            "G" | "GiB" => 1 << 30,
            "T" | "TiB" => 1 << 40,
            _ => return Err(UnitError::UnknownUnit { unit: word(unit), known: SIZE_UNITS }),
        };
        scaled(whole(number)?, factor, unit).map(Bytes)
    }

    /// Whole pages of 4 KiB in it.
    pub const fn pages(self) -> u64 {
        self.0 / PAGE_BYTES
    }

    /// The bytes of `pages` pages of 4 KiB.
    pub const fn of_pages(pages: u64) -> Self {
        Bytes(pages.saturating_mul(PAGE_BYTES))
    }
}

/// Three significant digits at most in the largest unit that fits: `32 MiB`, `1.5 GiB`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        // 1023.5 and more would print as 1024 of the smaller unit.
        while value >= 1023.5 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let decimals = if value >= 99.95 {
            0
        } else if value >= 9.995 {
            1
        } else {
            2
        };
        let number = format!("{value:.decimals$}");
        let number = match number.contains('.') {
            true => number.trim_end_matches('0').trim_end_matches('.'),
            false => &number,
        };
        f.pad(&format!("{number} {}", UNITS[unit]))
    }
}

/// A number of bytes for each second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BytesPerSecond(pub u64);

impl BytesPerSecond {
    /// Reads a number in `unit`, a unit of size with `/s` behind it.
    pub fn parse(number: &str, unit: &str) -> Result<Self, UnitError> {
        let unknown = || UnitError::UnknownUnit { unit: word(unit), known: RATE_UNITS };
        let size_unit = unit.strip_suffix("/s").ok_or_else(unknown)?;
        match Bytes::parse(number, size_unit) {
            Ok(Bytes(bytes)) => Ok(BytesPerSecond(bytes)),
            Err(UnitError::UnknownUnit { .. }) => Err(unknown()),
            Err(other) => Err(other),
        }
    }
}

impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/s", Bytes(self.0)))
    }
}

/// A part of a whole that the place of use names, in hundredths of a percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(u16);

impl Share {
    /// The whole.
    pub const WHOLE: Share = Share(100 * 100);

    /// `percent` of the whole; more than 100 counts as the whole.
    pub const fn from_percent(percent: u16) -> Self {
        if percent > 100 { Share::WHOLE } else { Share(percent * 100) }
    }

    /// Reads `40%` or `12.5%`, at most 100 and at most two decimals.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        let bad = || UnitError::BadNumber {
            text: word(text),
            expected: "a percentage from 0% to 100%, as 40% or 12.5%",
        };
        let number = text.strip_suffix('%').ok_or_else(bad)?;
        let (whole_part, fraction) = number.split_once('.').unwrap_or((number, "0"));
        if fraction.is_empty() || fraction.len() > 2 {
            return Err(bad());
        }
        let percent: u32 = digits(whole_part).ok_or_else(bad)?;
        let hundredths: u32 = digits(&format!("{fraction:0<2}")).ok_or_else(bad)?;
        let parts = percent.saturating_mul(100).saturating_add(hundredths);
        u16::try_from(parts).ok().filter(|parts| *parts <= Share::WHOLE.0).map(Share).ok_or_else(bad)
    }

    /// This share of `whole`, rounded down.
    pub fn of(self, whole: u64) -> u64 {
        // At most `whole`, so it fits again.
        (u128::from(whole) * u128::from(self.0) / u128::from(Share::WHOLE.0)) as u64
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (percent, hundredths) = (self.0 / 100, self.0 % 100);
        f.pad(&match (hundredths, hundredths % 10) {
            (0, _) => format!("{percent}%"),
            (_, 0) => format!("{percent}.{}%", hundredths / 10),
            _ => format!("{percent}.{hundredths:02}%"),
        })
    }
}

/// Reads a time in `unit`.
pub fn parse_duration(number: &str, unit: &str) -> Result<Duration, UnitError> {
    let ms_each = match unit {
        "ms" => 1,
        "s" => 1000,
        "min" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        _ => return Err(UnitError::UnknownUnit { unit: word(unit), known: TIME_UNITS }),
    };
    scaled(whole(number)?, ms_each, unit).map(Duration::from_millis)
}

/// Writes a time in the largest unit that loses nothing: `500 ms`, `30 s`, `5 min`.
/// Less than a millisecond is rounded to microseconds.
pub fn format_duration(time: Duration) -> String {
    let us = time.as_micros();
    match us {
        0 => "0 s".into(),
        1..1000 => format!("{us} µs"),
        _ if us % 3_600_000_000 == 0 => format!("{} h", us / 3_600_000_000),
        _ if us % 60_000_000 == 0 => format!("{} min", us / 60_000_000),
        _ if us % 1_000_000 == 0 => format!("{} s", us / 1_000_000),
        _ => format!("{} ms", us / 1000),
    }
}

fn whole(number: &str) -> Result<u64, UnitError> {
    let trimmed = number.trim();
    digits(trimmed).ok_or_else(|| UnitError::BadNumber { text: word(trimmed), expected: "a whole number" })
}

/// Digits only: the standard parsers also take a sign, which no quantity has.
pub(crate) fn digits<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn scaled(number: u64, factor: u64, unit: &str) -> Result<u64, UnitError> {
    number.checked_mul(factor).ok_or_else(|| UnitError::TooLarge { number, unit: unit.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_read_as_in_libvirt() {
        for (number, unit, bytes) in [
            ("1", "KiB", 1024),
            ("1", "KB", 1000),
            ("64", "M", 64 << 20),
            (" 4 ", "GiB", 4 << 30),
            ("0", "bytes", 0),
        ] {
            assert_eq!(Bytes::parse(number, unit), Ok(Bytes(bytes)), "{number} {unit}");
        }
        assert_eq!(BytesPerSecond::parse("64", "MiB/s"), Ok(BytesPerSecond(64 << 20)));
        assert_eq!(parse_duration("5", "min"), Ok(Duration::from_secs(300)));
    }

    #[test]
    fn what_is_no_quantity_says_what_would_be() {
        let message = |result: Result<Bytes, UnitError>| result.unwrap_err().to_string();
        assert_eq!(message(Bytes::parse("+4", "GiB")), "\"+4\" is not a whole number");
        assert_eq!(message(Bytes::parse("1.5", "GiB")), "\"1.5\" is not a whole number");
        assert_eq!(
            message(Bytes::parse("4", "Gib")),
            "unknown unit \"Gib\": use one of bytes, KiB, MiB, GiB, TiB"
        );
        assert_eq!(message(Bytes::parse("99999999999", "GiB")), "99999999999 GiB is too large");
        assert_eq!(
            BytesPerSecond::parse("4", "MiB").unwrap_err().to_string(),
            "unknown unit \"MiB\": use one of KiB/s, MiB/s, GiB/s"
        );
    }

    #[test]
    fn sizes_print_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4 KiB"),
            (1 << 20, "1 MiB"),
            ((1 << 20) - 1, "1 MiB"),
            (1536 << 20, "1.5 GiB"),
            (33 << 20, "33 MiB"),
            (100 << 10, "100 KiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn durations_print_without_loss() {
        for (ms, text) in [
            (0, "0 s"),
            (500, "500 ms"),
            (1500, "1500 ms"),
            (30_000, "30 s"),
            (300_000, "5 min"),
            (7_200_000, "2 h"),
        ] {
            assert_eq!(format_duration(Duration::from_millis(ms)), text);
        }
    }

    proptest! {
        #[test]
        fn shares_read_back_and_stay_below_the_whole(parts in 0u16..=10_000, whole: u64) {
            let share = Share(parts);
            prop_assert_eq!(Share::parse(&share.to_string()), Ok(share));
            prop_assert!(share.of(whole) <= whole);
            prop_assert_eq!(Share::WHOLE.of(whole), whole);
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".{0,8}", unit in ".{0,6}") {
            let _ = (Bytes::parse(&text, &unit), BytesPerSecond::parse(&text, &unit));
            let _ = (parse_duration(&text, &unit), Share::parse(&text));
        }

        #[test]
        fn printed_sizes_are_near_and_short(bytes: u64) {
            let text = Bytes(bytes).to_string();
            prop_assert!(text.len() <= 9, "{}", text);
        }
    }
}
