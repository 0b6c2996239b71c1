// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ABI header against its Rust mirror: a C program made from the header
//! prints every size, offset and number; the Rust side must say the same.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use ept_virt_core::uapi::{
    self, KesAttach, KesHarvest, KesHarvestStats, KesInfo, KesMemslot, KesMemslots, KesSample, KesSampleSet,
    KesSampleStats,
};

/// What both sides are asked: a C expression, and Rust's value for it.
fn expectations() -> Vec<(String, u64)> {
    let mut all: Vec<(String, u64)> = Vec::new();
    macro_rules! layout {
        ($rust:ident, $c:literal, { $($field:ident),* }) => {
            all.push((format!("sizeof(struct {})", $c), size_of::<$rust>() as u64));
            all.push((format!("_Alignof(struct {})", $c), align_of::<$rust>() as u64));
            $(
                let name = stringify!($field);
                all.push((format!("offsetof(struct {}, {name})", $c), std::mem::offset_of!($rust, $field) as u64));
                let size = field_size(|value: &$rust| size_of_val(&value.$field));
                all.push((format!("sizeof(((struct {} *)0)->{name})", $c), size));
            )*
            let fields = [$(stringify!($field)),*];
            // Every byte belongs to a field that was listed: nothing is forgotten, no hidden padding.
            let listed: u64 = all.iter().rev().filter(|(text, _)| fields.iter().any(|field| *text == format!("sizeof(((struct {} *)0)->{field})", $c))).map(|(_, size)| size).sum();
            assert_eq!(listed, size_of::<$rust>() as u64, "fields of {} do not fill it", $c);
        };
    }
    layout!(KesInfo, "kes_info", { abi_version, entry_format, features, chunk_pages, sessions, reserved });
    layout!(KesAttach, "kes_attach", { vm_fd, flags, reserved });
    layout!(KesMemslot, "kes_memslot", { gfn_start, page_count, hva, id, flags });
    layout!(KesMemslots, "kes_memslots", { slots, capacity, count, generation, reserved });
    layout!(KesHarvestStats, "kes_harvest_stats", {
        mapped_4k, mapped_2m, mapped_1g, accessed, dirty, on_nodes, entries_read, entries_cleared,
        time_ns, roots, flushes, chunks, sources
    });
    layout!(KesHarvest, "kes_harvest", {
        gfn_start, gfn_count, accessed, dirty, mapped, on_nodes, levels, nodes, nodes_bits, flags,
        budget_ns, gfn_next, reserved, stats
    });
    layout!(KesSampleSet, "kes_sample_set", { access, freq_hz, ring_records, flags, reserved });
    layout!(KesSample, "kes_sample", { gfn, time_ns, vcpu, access, level, flags, reserved });
    layout!(KesSampleStats, "kes_sample_stats", {
        samples, dropped, unwanted, armed, released, flushes, armed_now, unread, hold_us, freq_hz, reserved
    });
    for (text, value) in [
        ("KES_ABI_VERSION", u64::from(uapi::ABI_VERSION)),
        ("KES_FEATURE_HARVEST", uapi::FEATURE_HARVEST),
        ("KES_FEATURE_CLEAR_DIRTY", uapi::FEATURE_CLEAR_DIRTY),
        ("KES_FEATURE_SAMPLE", uapi::FEATURE_SAMPLE),
        ("KES_FEATURE_NOTIFIER", uapi::FEATURE_NOTIFIER),
        ("KES_FEATURE_KEEP_YOUNG", uapi::FEATURE_KEEP_YOUNG),
        ("KES_FEATURE_PATCHED_KVM", uapi::FEATURE_PATCHED_KVM),
        ("KES_SOURCE_TABLES", u64::from(uapi::SOURCE_TABLES)),
        ("KES_SOURCE_NOTIFIER", u64::from(uapi::SOURCE_NOTIFIER)),
        ("KES_FORMAT_EPT", u64::from(uapi::FORMAT_EPT)),
        ("KES_FORMAT_NPT", u64::from(uapi::FORMAT_NPT)),
        ("KES_SLOT_READONLY", u64::from(uapi::SLOT_READONLY)),
        ("KES_SLOT_DIRTY_LOG", u64::from(uapi::SLOT_DIRTY_LOG)),
        ("KES_HARVEST_CLEAR_ACCESSED", u64::from(uapi::HARVEST_CLEAR_ACCESSED)),
        ("KES_HARVEST_CLEAR_DIRTY", u64::from(uapi::HARVEST_CLEAR_DIRTY)),
        ("KES_HARVEST_FLUSH", u64::from(uapi::HARVEST_FLUSH)),
        ("KES_HARVEST_KEEP_YOUNG", u64::from(uapi::HARVEST_KEEP_YOUNG)),
        ("KES_MAX_PAGES", uapi::MAX_PAGES),
        ("KES_LEVEL_NONE", u64::from(uapi::LEVEL_NONE)),
        ("KES_LEVEL_4K", u64::from(uapi::LEVEL_4K)),
        ("KES_LEVEL_2M", u64::from(uapi::LEVEL_2M)),
        ("KES_LEVEL_1G", u64::from(uapi::LEVEL_1G)),
        ("KES_GET_INFO", uapi::number::GET_INFO),
        ("KES_ATTACH", uapi::number::ATTACH),
        ("KES_DETACH", uapi::number::DETACH),
        ("KES_GET_MEMSLOTS", uapi::number::GET_MEMSLOTS),
        ("KES_HARVEST", uapi::number::HARVEST),
        ("KES_ACCESS_READ", u64::from(uapi::ACCESS_READ)),
        ("KES_ACCESS_WRITE", u64::from(uapi::ACCESS_WRITE)),
        ("KES_ACCESS_EXEC", u64::from(uapi::ACCESS_EXEC)),
        ("KES_MAX_FREQ_HZ", u64::from(uapi::MAX_FREQ_HZ)),
        ("KES_MAX_RING_RECORDS", u64::from(uapi::MAX_RING_RECORDS)),
        ("KES_SAMPLE_WALK", u64::from(uapi::SAMPLE_WALK)),
        ("KES_SAMPLE_SET", uapi::number::SAMPLE_SET),
        ("KES_SAMPLE_STATS", uapi::number::SAMPLE_STATS),
    ] {
        all.push((text.to_owned(), value));
    }
    // The interface of 2019: nothing of it may ever move, and the library does not use it.
    for (text, value) in [
        ("KES_2019_INIT", 1200),
        ("KES_2019_SET_PROT", 1201),
        ("KES_2019_SET_FREQ", 1202),
        ("KES_2019_GET_MEMSLOTS", 1203),
        ("KES_2019_DEINIT", 1204),
        ("KES_2019_READ", 1),
        ("KES_2019_WRITE", 2),
        ("KES_2019_EXEC", 4),
        ("KES_2019_XWR_SHIFT", 29),
        ("KES_2019_GFNS", 1 << 29),
        ("sizeof(struct kes_2019_memslot)", 24),
        ("offsetof(struct kes_2019_memslot, hva)", 8),
        ("offsetof(struct kes_2019_memslot, page_count)", 16),
        ("sizeof(struct kes_2019_memslots)", 24),
        ("offsetof(struct kes_2019_memslots, capacity)", 8),
        ("offsetof(struct kes_2019_memslots, count)", 16),
    ] {
        all.push((text.to_owned(), value));
    }
    all
}

fn field_size<T: Default>(of: impl Fn(&T) -> usize) -> u64 {
    of(&T::default()) as u64
}

fn header() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kmod/uapi/kvm_ept_sample.h")
}

#[test]
fn header_and_mirror_agree() {
    let expected = expectations();
    let mut source = format!(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"{}\"\nint main(void) {{\n",
        header().display()
    );
    for (index, (text, _)) in expected.iter().enumerate() {
        writeln!(source, "printf(\"{index} %llu\\n\", (unsigned long long)({text}));").unwrap();
    }
    source.push_str("printf(\"path /proc/%s\\n\", KES_PROC_NAME);\nreturn 0; }\n");

    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (c, program) = (dir.join("abi.c"), dir.join("abi"));
    std::fs::write(&c, source).unwrap();
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-o"])
        .arg(&program)
        .arg(&c)
        .status()
        .unwrap();
    assert!(compiled.success(), "the header does not compile in a user program");
    let output = String::from_utf8(Command::new(&program).output().unwrap().stdout).unwrap();

    let mut from_c: BTreeMap<&str, &str> = output.lines().filter_map(|line| line.split_once(' ')).collect();
    assert_eq!(from_c.remove("path"), Some(uapi::PROC_PATH));
    for (index, (text, rust)) in expected.iter().enumerate() {
        assert_eq!(from_c.remove(index.to_string().as_str()), Some(rust.to_string().as_str()), "{text}");
    }
    assert!(from_c.is_empty());
}

/// A number that the header gains must reach the mirror and this test.
#[test]
fn every_number_of_the_header_is_compared() {
    let text = std::fs::read_to_string(header()).unwrap();
    let compared: Vec<String> = expectations().into_iter().map(|(name, _)| name).collect();
    let structures = text.lines().filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(" {"));
    for name in structures {
        assert!(compared.contains(&format!("sizeof(struct {name})")), "struct {name} is not mirrored");
    }
    let numbers = text.lines().filter_map(|line| line.strip_prefix("#define ")?.split_whitespace().next());
    for name in
        numbers.filter(|name| !["_UAPI_KVM_EPT_SAMPLE_H", "KES_PROC_NAME", "KES_IOC_MAGIC"].contains(name))
    {
        assert!(compared.iter().any(|text| text == name), "{name} is not mirrored");
    }
}
