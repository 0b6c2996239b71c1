// SPDX-License-Identifier: MIT OR Apache-2.0
//! Turns a stock boot image into one that holds the same kernel uncompressed,
//! because decompressing takes an emulated processor longer than booting.
//!
//! The kernel is laid out in memory as its ELF headers say and put behind a
//! small loader (bochs/flat-kernel.S) that replaces the kernel's decompressor.
//! The decompressor is also what would move the kernel to a random address, so
//! here it runs where it was linked.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::Lab;
use crate::proc;

/// The loader: a part of the key of what is built with it.
pub const LOADER: &str = include_str!("../bochs/flat-kernel.S");
/// Where a boot loader puts the protected-mode part of an image that can not be relocated.
const CODE32_START: u64 = 0x10_0000;
/// Boot loaders put the initramfs as high as they may. Below this limit it
/// leaves the second GiB free, which can then become one huge page.
const INITRAMFS_END: u64 = 1 << 30;
/// Room behind the kernel for the memory that it takes before it has an allocator.
const EARLY_BRK_BYTES: u64 = 16 << 20;
const TOOL_TIMEOUT: Duration = Duration::from_secs(120);

/// Fields of the setup header (Documentation/arch/x86/boot.rst), as offsets in the image.
mod header {
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const RELOCATABLE_KERNEL: usize = 0x234;
    pub const PAYLOAD_OFFSET: usize = 0x248;
    pub const PAYLOAD_LENGTH: usize = 0x24c;
    pub const INIT_SIZE: usize = 0x260;
}

/// A kernel as it lies in physical memory.
struct FlatKernel {
    address: u64,
    entry: u64,
    bytes: Vec<u8>,
    /// Zeroes that belong behind `bytes`.
    clear_bytes: u64,
}

/// Writes the image made from the boot image `vmlinuz` to `out`; `work` is an
/// existing folder for what is made on the way.
pub fn flatten(lab: &Lab, vmlinuz: &Path, work: &Path, out: &Path) -> Result<()> {
    let image = fs::read(vmlinuz).with_context(|| format!("reading {}", vmlinuz.display()))?;
    let (setup, payload, packer) =
        split(&image).with_context(|| format!("{} is not a boot image known here", vmlinuz.display()))?;
    let elf = work.join("vmlinux");
    let packed = work.join(format!("vmlinux.{}", packer.suffix));
    fs::write(&packed, payload)?;
    proc::run(
        Command::new(packer.program).args(["--decompress", "--force", "--keep"]).arg(&packed),
        &lab.log("intel-kernel"),
        TOOL_TIMEOUT,
    )
    .with_context(|| format!("decompressing the kernel in {}", vmlinuz.display()))?;
    let kernel = lay_out(&fs::read(&elf)?).context("reading the kernel's ELF headers")?;
    let body = link(lab, &kernel, work)?;
    fs::write(out, join(setup, &kernel, body)).with_context(|| format!("writing {}", out.display()))
}

/// A way in which kernels are compressed.
#[derive(Debug)]
struct Packer {
    program: &'static str,
    suffix: &'static str,
    magic: &'static [u8],
}

const PACKERS: [Packer; 2] = [
    Packer { program: "zstd", suffix: "zst", magic: &[0x28, 0xb5, 0x2f, 0xfd] },
    Packer { program: "xz", suffix: "xz", magic: b"\xfd7zXZ\0" },
];

/// The real-mode part and the compressed kernel of a boot image.
fn split(image: &[u8]) -> Result<(&[u8], &[u8], &'static Packer)> {
    let setup_sectors = match *image.get(header::SETUP_SECTS).context("too short")? {
        0 => 4, // as the boot protocol says
        count => usize::from(count),
    };
    let setup_bytes = (setup_sectors + 1) * 512;
    let start = setup_bytes + u32_at(image, header::PAYLOAD_OFFSET)? as usize;
    // The last 4 bytes are the uncompressed size, not a part of the stream.
    let end = start + (u32_at(image, header::PAYLOAD_LENGTH)? as usize).saturating_sub(4);
    let setup = image.get(..setup_bytes).context("too short")?;
    let payload = image.get(start..end).context("too short")?;
    let packer = PACKERS.iter().find(|packer| payload.starts_with(packer.magic)).with_context(|| {
        let start = &payload[..payload.len().min(6)];
        format!("its kernel is compressed neither with zstd nor with xz (it starts with {start:02x?})")
    })?;
    Ok((setup, payload, packer))
}

/// Lays the loadable segments of a 64-bit ELF file out by physical address.
fn lay_out(elf: &[u8]) -> Result<FlatKernel> {
    const PT_LOAD: u32 = 1;
    ensure!(elf.starts_with(b"\x7fELF\x02"), "not a 64-bit ELF file");
    let entry_virtual = u64_at(elf, 24)?;
    let table = u64_at(elf, 32)? as usize;
    let (entry_bytes, count) = (usize::from(u16_at(elf, 54)?), usize::from(u16_at(elf, 56)?));
    let mut segments = Vec::new();
    for at in (0..count).map(|i| table + i * entry_bytes) {
        if u32_at(elf, at)? == PT_LOAD {
            let offset = u64_at(elf, at + 8)? as usize;
            let file_bytes = u64_at(elf, at + 32)? as usize;
            let data = elf.get(offset..offset + file_bytes).context("a segment lies outside the file")?;
            segments.push(Segment {
                virtual_address: u64_at(elf, at + 16)?,
                address: u64_at(elf, at + 24)?,
                data,
                memory_bytes: u64_at(elf, at + 40)?,
            });
        }
    }
    let address = segments.iter().map(|s| s.address).min().context("nothing to load")?;
    let data_end = segments.iter().map(|s| s.address + s.data.len() as u64).max().unwrap_or(address);
    let memory_end = segments.iter().map(|s| s.address + s.memory_bytes).max().unwrap_or(address);
    let entry = segments
        .iter()
        .find(|s| (s.virtual_address..s.virtual_address + s.memory_bytes).contains(&entry_virtual))
        .map_or(entry_virtual, |s| entry_virtual - s.virtual_address + s.address);
    let mut bytes = vec![0; ((data_end - address) as usize).next_multiple_of(8)];
    for segment in &segments {
        let start = (segment.address - address) as usize;
        bytes[start..start + segment.data.len()].copy_from_slice(segment.data);
    }
    let clear_bytes = memory_end.saturating_sub(address + bytes.len() as u64).next_multiple_of(8);
    Ok(FlatKernel { address, entry, bytes, clear_bytes })
}

struct Segment<'a> {
    virtual_address: u64,
    address: u64,
    data: &'a [u8],
    memory_bytes: u64,
}

/// Assembles and links the loader around the kernel; returns the flat binary.
fn link(lab: &Lab, kernel: &FlatKernel, work: &Path) -> Result<Vec<u8>> {
    fs::write(work.join("kernel.bin"), &kernel.bytes)?;
    fs::write(work.join("flat-kernel.S"), LOADER)?;
    let log = lab.log("intel-kernel");
    proc::run(
        Command::new("as")
            .current_dir(work)
            .args(["--64", "-o", "flat-kernel.o"])
            .args(["--defsym", &format!("KERNEL_ADDRESS={:#x}", kernel.address)])
            .args(["--defsym", &format!("KERNEL_BYTES={:#x}", kernel.bytes.len())])
            .args(["--defsym", &format!("CLEAR_BYTES={:#x}", kernel.clear_bytes)])
            .args(["--defsym", &format!("KERNEL_ENTRY={:#x}", kernel.entry)])
            .arg("flat-kernel.S"),
        &log,
        TOOL_TIMEOUT,
    )?;
    proc::run(
        Command::new("ld")
            .current_dir(work)
            .args(["-m", "elf_x86_64", "-e", "_start", "--oformat", "binary"])
            .args(["-Ttext", &format!("{CODE32_START:#x}")])
            .args(["-o", "flat-kernel.bin", "flat-kernel.o"]),
        &log,
        TOOL_TIMEOUT,
    )?;
    Ok(fs::read(work.join("flat-kernel.bin"))?)
}

/// The boot image: the old real-mode part, which says what follows now, and the new rest.
fn join(setup: &[u8], kernel: &FlatKernel, mut body: Vec<u8>) -> Vec<u8> {
    body.resize(body.len().next_multiple_of(16), 0);
    let mut image = setup.to_vec();
    let mut put = |at: usize, value: u64| image[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    put(header::SYSSIZE, body.len() as u64 / 16);
    put(header::INITRD_ADDR_MAX, INITRAMFS_END - 1);
    put(header::PAYLOAD_OFFSET, 0);
    put(header::PAYLOAD_LENGTH, 0);
    // How far the kernel reaches before it looks at the memory map: boot
    // loaders keep the initramfs out of it.
    let kernel_end = kernel.address + kernel.bytes.len() as u64 + kernel.clear_bytes;
    put(header::INIT_SIZE, kernel_end - CODE32_START + EARLY_BRK_BYTES);
    image[header::RELOCATABLE_KERNEL] = 0;
    image.extend_from_slice(&body);
    image
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    array_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    array_at(bytes, at).map(u64::from_le_bytes)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    match bytes.get(at..at + N).and_then(|slice| slice.try_into().ok()) {
        Some(array) => Ok(array),
        None => bail!("ends before byte {}", at + N),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with these loadable segments: virtual and physical address, data, size in memory.
    fn elf(entry: u64, segments: &[(u64, u64, &[u8], u64)]) -> Vec<u8> {
        const HEADER: usize = 64;
        const SEGMENT: usize = 56;
        let mut file = vec![0; HEADER + segments.len() * SEGMENT];
        file[..5].copy_from_slice(b"\x7fELF\x02");
        file[24..32].copy_from_slice(&entry.to_le_bytes());
        file[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        file[54..56].copy_from_slice(&(SEGMENT as u16).to_le_bytes());
        file[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        for (index, (virtual_address, address, data, memory_bytes)) in segments.iter().enumerate() {
            let at = HEADER + index * SEGMENT;
            file[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
            let fields = [file.len() as u64, *virtual_address, *address, data.len() as u64, *memory_bytes];
            for (field, value) in fields.iter().enumerate() {
                let at = at + 8 + field * 8;
                file[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            file.extend_from_slice(data);
        }
        file
    }

    #[test]
    fn segments_lie_by_physical_address_with_their_gaps() {
        let upper = 0xffff_ffff_8100_0000;
        let file = elf(upper + 2, &[(0, 0x100_0010, b"data", 24), (upper, 0x100_0000, b"code", 4)]);
        let kernel = lay_out(&file).unwrap();
        assert_eq!((kernel.address, kernel.entry), (0x100_0000, 0x100_0002));
        assert_eq!(kernel.bytes, b"code\0\0\0\0\0\0\0\0\0\0\0\0data\0\0\0\0");
        assert_eq!(kernel.clear_bytes, 16);
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let file = elf(0, &[(0, 0x100_0000, b"code", 4)]);
        for length in 0..file.len() {
            assert!(lay_out(&file[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn an_image_of_another_compression_is_refused() {
        let mut image = vec![0; 4096];
        image[header::SETUP_SECTS] = 1;
        image[header::PAYLOAD_LENGTH] = 64;
        let error = split(&image).unwrap_err().to_string();
        assert!(error.contains("neither with zstd nor with xz"), "{error}");
    }
}
