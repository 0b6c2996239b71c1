// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a domain's live XML tells of devices that keep memory where it is.

use roxmltree::Node;

use crate::text::word;
use crate::xml;

/// The first device of the domain that pins all of the guest's memory for DMA, in a few
/// words; `None` if there is none, or the XML can not be read.
///
/// VFIO pins whatever the guest could let its device access: all of it, as far as
/// nobody knows better. So do vDPA devices, and QEMU's own driver of NVMe disks.
pub fn pinning(domain_xml: &str) -> Option<String> {
    let document = xml::read(domain_xml).ok()?;
    let devices = document.root_element().children().filter(|node| node.has_tag_name("devices"));
    devices.flat_map(|devices| devices.children()).find_map(describe)
}

fn describe(node: Node) -> Option<String> {
    let kind = node.attribute("type").unwrap_or_default();
    let what = match (node.tag_name().name(), kind) {
        ("hostdev", "pci" | "mdev") | ("interface", "hostdev") => "a device of the host through VFIO",
        ("interface", "vdpa") | ("disk", "vhostvdpa") => "a vDPA device",
        ("disk", "nvme") => "an NVMe disk of the host through VFIO",
        _ => return None,
    };
    let alias = node.children().find(|child| child.has_tag_name("alias"));
    let name = alias.and_then(|alias| alias.attribute("name")).unwrap_or("without an alias");
    Some(format!("{what} ({})", word(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(devices: &str) -> String {
        format!("<domain type='kvm'><devices>{devices}</devices></domain>")
    }

    #[test]
    fn devices_that_pin_memory_are_known() {
        for device in [
            "<hostdev mode='subsystem' type='pci' managed='yes'><driver name='vfio'/><alias name='hostdev0'/></hostdev>",
            "<hostdev mode='subsystem' type='mdev' model='vfio-pci'><alias name='hostdev0'/></hostdev>",
            "<interface type='hostdev' managed='yes'><alias name='hostdev0'/></interface>",
            "<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/><alias name='net0'/></interface>",
            "<disk type='vhostvdpa' device='disk'/>",
            "<disk type='nvme' device='disk'><alias name='virtio-disk0'/></disk>",
        ] {
            let found = pinning(&domain(&format!("<emulator/>{device}")));
            assert!(found.is_some_and(|text| text.contains("VFIO") || text.contains("vDPA")), "{device}");
        }
        let named = pinning(&domain("<interface type='hostdev'><alias name='ua-fast'/></interface>"));
        assert_eq!(named.unwrap(), "a device of the host through VFIO (ua-fast)");
    }

    #[test]
    fn others_do_not() {
        for device in [
            "<hostdev mode='subsystem' type='usb'/>",
            "<hostdev mode='subsystem' type='scsi_host'/>",
            "<interface type='network'/>",
            "<disk type='file'/>",
            "<memory model='dimm'/>",
        ] {
            assert_eq!(pinning(&domain(device)), None, "{device}");
        }
        assert_eq!(pinning("<domain"), None);
        assert_eq!(pinning("<domain><hostdev type='pci'/></domain>"), None);
    }
}
