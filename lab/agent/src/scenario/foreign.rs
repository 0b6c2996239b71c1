// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests as other tools define them: virt-install, and nova.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::console::Console;
use super::domain::DomainSpec;
use super::host::{self, PAYLOAD, virsh};

/// A guest of virt-install's, under the name that README speaks of.
pub const VIRT_INSTALL: &str = "web-1";

/// virt-install is a program in Python, which takes long to start here.
const TIMEOUT: Duration = Duration::from_secs(180);

/// What virt-install writes into metadata, and an edit must leave there.
const OS_ID: &str = "http://libosinfo.org/linux/2022";

/// What nova writes into metadata: the form of its release 2023.2.
const NOVA: &str = "\
    <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>\
    <nova:package version='28.0.0'/><nova:name>web-2</nova:name>\
    <nova:creationTime>2026-01-31 10:02:03</nova:creationTime>\
    <nova:flavor name='m1.tiny'><nova:memory>192</nova:memory><nova:disk>1</nova:disk>\
    <nova:swap>0</nova:swap><nova:ephemeral>0</nova:ephemeral><nova:vcpus>1</nova:vcpus></nova:flavor>\
    <nova:owner><nova:user uuid='4d3ea4e1a7d34eb2a4bb4c1d3cf7d9b5'>admin</nova:user>\
    <nova:project uuid='e0b5c5b3ca0a4a6a8e2ed4bb7e0f1c5d'>demo</nova:project></nova:owner>\
    <nova:root type='image' uuid='1fb6e2a3-7f1d-49d6-9a4e-0f9d4f0f5d11'/><nova:ports/>\
    </nova:instance>";

/// Has virt-install define a guest that does the lab's workload. All else of it is what
/// virt-install takes when nobody says otherwise.
pub fn define_by_virt_install() -> Result<()> {
    let spec = DomainSpec::default();
    let boot = format!(
        "kernel={PAYLOAD}/vmlinuz,initrd={PAYLOAD}/guest.cpio,kernel_args=\"{}\"",
        spec.command_line()
    );
    let memory = spec.memory_mib().to_string();
    let serial = format!(
        "unix,source.mode=bind,source.path=/run/{VIRT_INSTALL}.sock,log.file=/run/{VIRT_INSTALL}.log,\
         log.append=off"
    );
    let mut command = Command::new("virt-install");
    command.args(["--name", VIRT_INSTALL, "--memory", &memory, "--vcpus", "1", "--osinfo", "linux2022"]);
    // Which the emulated processor has, but not for guests of guests.
    command.args(["--cpu", "host-passthrough,disable=svm"]);
    command.args(["--import", "--disk", "none", "--network", "none", "--graphics", "none"]);
    command.args(["--boot", &boot, "--serial", &serial, "--print-xml"]);
    let xml = host::succeed_within(&mut command, TIMEOUT)?;
    ensure!(xml.contains(OS_ID), "virt-install wrote no metadata: {xml}");
    let path = format!("/run/{VIRT_INSTALL}.xml");
    fs::write(&path, xml).with_context(|| format!("writing {path}"))?;
    Console::clear(VIRT_INSTALL)?;
    virsh(&["define", &path]).map(drop)
}

/// A guest as nova defines them, under the name that nova would give it.
pub fn of_nova() -> DomainSpec {
    DomainSpec { name: "instance-0000002a", policy: Some(NOVA.into()), ..DomainSpec::default() }
}

/// Whether what its maker wrote is still in a domain's metadata.
pub fn check_metadata(name: &str) -> Result<()> {
    let theirs = match name {
        VIRT_INSTALL => OS_ID,
        _ => "<nova:project uuid=\"e0b5c5b3ca0a4a6a8e2ed4bb7e0f1c5d\">demo</nova:project>",
    };
    // libvirt writes the quotation marks that it likes.
    let xml = virsh(&["dumpxml", name])?.replace('\'', "\"");
    ensure!(xml.contains(theirs), "setting a policy took {theirs} away: {xml}");
    Ok(())
}
