// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which guest frames a policy's exclusions mean in a domain that runs.

use std::ops::Range;

use roxmltree::Node;

use crate::text::word;
use crate::units::{Bytes, PAGE_BYTES, digits};
use crate::xml;

use super::Exclusion;

/// What is not to be moved in a running domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excluded {
    /// Guest frame numbers, in order, none twice. A page that is excluded in part
    /// is excluded.
    pub frames: Vec<Range<u64>>,
    /// The policy names memory devices: memory that is plugged in may turn out to be
    /// one of them.
    pub by_device: bool,
    /// What names nothing, in plain words.
    pub warnings: Vec<String>,
}

impl Excluded {
    /// What `exclusions` mean in the domain with this live XML. An error says why
    /// that is not known, so that nothing may be moved.
    pub fn resolve(exclusions: &[Exclusion], domain_xml: &str) -> Result<Self, String> {
        let mut excluded = Excluded::default();
        let named: Vec<&str> = exclusions.iter().filter_map(Exclusion::alias).collect();
        if !named.is_empty() {
            excluded.by_device = true;
            let devices = memory_devices(domain_xml)?;
            for alias in named {
                match devices.iter().find(|device| device.alias == alias) {
                    Some(device) => excluded.frames.push(device.frames()?),
                    None => excluded.warnings.push(format!(
                        "the policy excludes the memory device \"{}\", which the domain does not have",
                        word(alias)
                    )),
                }
            }
        }
        excluded.frames.extend(exclusions.iter().filter_map(Exclusion::frames));
        excluded.frames = merged(excluded.frames);
        Ok(excluded)
    }
}

impl Exclusion {
    fn alias(&self) -> Option<&str> {
        match self {
            Exclusion::Device(alias) => Some(alias),
            Exclusion::Range { .. } => None,
        }
    }

    fn frames(&self) -> Option<Range<u64>> {
        match self {
            Exclusion::Range { start, end } => Some(start / PAGE_BYTES..end.div_ceil(PAGE_BYTES)),
            Exclusion::Device(_) => None,
        }
    }
}

/// The same frames in order, none twice.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut().filter(|last| range.start <= last.end) {
            Some(last) => last.end = last.end.max(range.end),
            None => merged.push(range),
        }
    }
    merged
}

/// A `<memory>` device, as the live XML describes it.
struct MemoryDevice {
    alias: String,
    model: String,
    /// First guest physical address, where libvirt tells it.
    base: Option<u64>,
    bytes: Option<Bytes>,
}

impl MemoryDevice {
    /// libvirt writes the address of DIMMs and NVDIMMs into `<address base=>`, and of
    /// virtio-mem and virtio-pmem, since 9.4, into `<target><address base=>`.
    fn read(node: Node) -> Option<Self> {
        let alias = child(node, "alias")?.attribute("name")?.to_owned();
        let target = child(node, "target");
        let in_target = target.and_then(|target| child(target, "address"));
        let address = in_target.or_else(|| child(node, "address"));
        let base = address.and_then(|address| hexadecimal(address.attribute("base")?));
        let size = target.and_then(|target| child(target, "size"));
        let bytes = size
            .and_then(|size| Bytes::parse(size.text()?.trim(), size.attribute("unit").unwrap_or("KiB")).ok());
        Some(Self { alias, model: node.attribute("model").unwrap_or_default().to_owned(), base, bytes })
    }

    fn frames(&self) -> Result<Range<u64>, String> {
        let found = self.base.zip(self.bytes).and_then(|(base, bytes)| {
            Some(base / PAGE_BYTES..base.checked_add(bytes.0)?.div_ceil(PAGE_BYTES))
        });
        found.ok_or_else(|| {
            format!(
                "the policy excludes the memory device \"{}\", and libvirt does not tell where the guest has it (of {} it does from 9.4 on); exclude its <range> instead",
                word(&self.alias),
                word(&self.model),
            )
        })
    }
}

fn memory_devices(domain_xml: &str) -> Result<Vec<MemoryDevice>, String> {
    let document = xml::read(domain_xml).map_err(|error| {
        format!("the policy excludes memory devices, and the domain's XML can not be read: {}", error.problem)
    })?;
    let devices = document.root_element().children().filter(|child| child.has_tag_name("devices"));
    let memory = devices.flat_map(|devices| devices.children()).filter(|node| node.has_tag_name("memory"));
    Ok(memory.filter_map(MemoryDevice::read).collect())
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// libvirt writes addresses with `0x`; it reads decimal ones too.
fn hexadecimal(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None => digits(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As libvirt 11.3 prints them; the last two as 9.0 does.
    const DEVICES: &str = "<domain type='kvm'><devices>
        <memory model='dimm'>
          <target><size unit='KiB'>65536</size><node>0</node></target>
          <alias name='dimm0'/>
          <address type='dimm' slot='0' base='0x100000000'/>
        </memory>
        <memory model='virtio-mem'>
          <target>
            <size unit='KiB'>1048576</size><node>0</node><block unit='KiB'>2048</block>
            <requested unit='KiB'>524288</requested><current unit='KiB'>524288</current>
            <address base='0x140000000'/>
          </target>
          <alias name='virtiomem0'/>
          <address type='pci' domain='0x0000' bus='0x00' slot='0x04' function='0x0'/>
        </memory>
        <memory model='virtio-mem'>
          <target><size unit='KiB'>1048576</size><node>0</node></target>
          <alias name='virtiomem1'/>
          <address type='pci' domain='0x0000' bus='0x00' slot='0x05' function='0x0'/>
        </memory>
        <memory model='nvdimm'><alias name='nvdimm0'/></memory>
      </devices></domain>";

    fn device(alias: &str) -> Exclusion {
        Exclusion::Device(alias.into())
    }

    #[test]
    fn ranges_are_whole_pages_and_merged() {
        let range = |start, end| Exclusion::Range { start, end };
        let asked = [range(0x5000, 0x9001), range(0x1001, 0x1002), range(0x9000, 0xb000)];
        let excluded = Excluded::resolve(&asked, "<not read").unwrap();
        assert_eq!(excluded.frames, [1..2, 5..11]);
        assert!(!excluded.by_device && excluded.warnings.is_empty());
        // As far as addresses go.
        let all = Excluded::resolve(&[range(0, u64::MAX)], "").unwrap();
        assert_eq!(all.frames.len(), 1);
        assert_eq!(all.frames[0], 0..1 << 52);
    }

    #[test]
    fn devices_are_found_by_alias() {
        let excluded = Excluded::resolve(&[device("virtiomem0"), device("dimm0")], DEVICES).unwrap();
        assert_eq!(excluded.frames, [0x10_0000..0x10_4000, 0x14_0000..0x18_0000]);
        assert!(excluded.by_device && excluded.warnings.is_empty());
    }

    #[test]
    fn a_device_that_is_not_there_is_told_and_no_obstacle() {
        let excluded = Excluded::resolve(&[device("dimm7"), device("dimm0")], DEVICES).unwrap();
        assert_eq!(excluded.frames.len(), 1);
        assert!(excluded.warnings[0].contains("\"dimm7\""), "{:?}", excluded.warnings);
    }

    #[test]
    fn a_device_without_an_address_lets_nothing_move() {
        for alias in ["virtiomem1", "nvdimm0"] {
            let problem = Excluded::resolve(&[device(alias)], DEVICES).unwrap_err();
            assert!(problem.contains("does not tell where"), "{problem}");
        }
        assert!(Excluded::resolve(&[device("dimm0")], "<domain").unwrap_err().contains("can not be read"));
        let wrapped = "<domain><devices><memory model='dimm'><alias name='a'/>\
            <target><size unit='bytes'>4096</size></target><address base='0xfffffffffffff001'/></memory></devices></domain>";
        assert!(Excluded::resolve(&[device("a")], wrapped).is_err());
    }
}
