// SPDX-License-Identifier: MIT OR Apache-2.0
//! Observing, judging and placing the memory of KVM guests.
//!
//! Data flows one way: [`sampler`] → [`heat`] → [`plan`] → [`migrate`], under a
//! [`policy`] that `domain` reads from libvirt. The modules between are pure.

pub mod bitmap;
pub mod budget;
pub mod devices;
#[cfg(feature = "libvirt")]
pub mod domain;
pub mod heat;
pub mod memory;
pub mod migrate;
pub mod pace;
pub mod plan;
pub mod policy;
pub mod process;
pub mod record;
pub mod sampler;
pub mod samples;
pub mod simulate;
pub mod slowdown;
pub mod text;
pub mod topology;
pub mod uapi;
pub mod units;
pub mod wire;
pub mod working_set;
mod xml;
