// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a micro VM runs a nested guest by Intel's VMX. Field encodings, controls
//! and checks: Intel SDM volume 3C, chapters on the VMCS and appendix B.

use anyhow::{Context, Result, ensure};
use kvm_bindings::{Msrs, kvm_msr_entry};

use super::machine::{CODE_GFN, Machine, PAGE};
use super::nested::{L1_TABLES, L2_CODE_GFN, NESTED_TABLES, Nested};

const VMXON_GFN: u64 = 8;
const VMCS_GFN: u64 = 9;
/// Fields and values that L1 writes into the VMCS, and two pointers before them.
const FIELDS_GFN: u64 = 5;
const FIELDS_OFFSET: u64 = 16;

/// L1 leaves through these when VMX refuses: with its error, or the exit's reason.
const ERROR_PORT: u8 = 0x11;
const REASON_PORT: u8 = 0x12;

const GUEST_RIP: u32 = 0x681E;
/// PG, NE, ET, PE.
pub const CR0: u64 = 0x8000_0031;
/// VMXE, PAE.
pub const CR4: u64 = 1 << 13 | 1 << 5;

/// `vmcall`, with which L2 ends a round.
pub const END_ROUND: [u8; 3] = [0x0F, 0x01, 0xC1];

/// Writes L1's program and what it needs; the vCPU has its CPUID.
pub fn load(machine: &Machine, nested: Nested) -> Result<()> {
    let msr = |index| -> Result<u64> {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }])?;
        ensure!(machine.vcpu.get_msrs(&mut msrs).context("KVM_GET_MSRS")? == 1, "no MSR {index:#x}");
        Ok(msrs.as_slice()[0].data)
    };
    let put = |gfn: u64, offset: u64, data: &[u8]| {
        machine.memory.write(gfn as usize * PAGE + offset as usize, data);
    };
    let revision = (msr(0x480)? as u32 & 0x7FFF_FFFF).to_le_bytes();
    for gfn in [VMXON_GFN, VMCS_GFN] {
        put(gfn, 0, &[0; PAGE]);
        put(gfn, 0, &revision);
    }
    put(FIELDS_GFN, 0, &(VMXON_GFN << 12).to_le_bytes());
    put(FIELDS_GFN, 8, &(VMCS_GFN << 12).to_le_bytes());
    // What must be one is in the lower half of each MSR.
    let controls = [msr(0x48D)?, msr(0x48E)?, msr(0x48F)?, msr(0x490)?].map(|value| value & 0xFFFF_FFFF);
    let (_, exit) = l1_program(0);
    let fields = vmcs(controls, nested, (CODE_GFN << 12) + exit);
    let (code, _) = l1_program(fields.len() as u32);
    for (index, (field, value)) in fields.iter().enumerate() {
        let offset = FIELDS_OFFSET + index as u64 * 16;
        put(FIELDS_GFN, offset, &u64::from(*field).to_le_bytes());
        put(FIELDS_GFN, offset + 8, &value.to_le_bytes());
    }
    put(CODE_GFN, 0, &code);
    Ok(())
}

/// 64-bit code that runs L2 until it ends a round, and says so to user space; and
/// the offset at which L2's exits come back.
fn l1_program(fields: u32) -> (Vec<u8>, u64) {
    let address = |offset: u64| (((FIELDS_GFN << 12) + offset) as u32).to_le_bytes();
    let mut code = vec![0xB9, 0x3A, 0, 0, 0]; // mov ecx, IA32_FEATURE_CONTROL
    code.extend([0xB8, 5, 0, 0, 0]); // mov eax, locked and VMX outside SMX
    code.extend([0x31, 0xD2, 0x0F, 0x30]); // xor edx, edx; wrmsr
    for (instruction, pointer) in [
        (&[0xF3, 0x0F, 0xC7, 0x34, 0x25][..], 0), // vmxon
        (&[0x66, 0x0F, 0xC7, 0x34, 0x25], 8),     // vmclear
        (&[0x0F, 0xC7, 0x34, 0x25], 8),           // vmptrld
    ] {
        code.extend(instruction);
        code.extend(address(pointer));
    }
    code.push(0xBE); // mov esi, fields
    code.extend(address(FIELDS_OFFSET));
    code.push(0xB9); // mov ecx, their number
    code.extend(fields.to_le_bytes());
    let next = code.len();
    code.extend([0x48, 0x8B, 0x06]); // mov rax, [rsi]
    code.extend([0x0F, 0x79, 0x46, 0x08]); // vmwrite rax, [rsi + 8]
    code.extend([0x76, 0]); // jbe error
    let to_error = code.len();
    code.extend([0x48, 0x83, 0xC6, 0x10]); // add rsi, 16
    code.extend([0xFF, 0xC9]); // dec ecx
    code.extend([0x75, (next as isize - code.len() as isize - 2) as i8 as u8]); // jnz next
    code.extend([0x0F, 0x01, 0xC2]); // vmlaunch
    code.extend([0xEB, 0]); // jmp error
    let from_launch = code.len();
    let exit = code.len();
    code.extend([0xB8, 0x02, 0x44, 0, 0]); // mov eax, exit reason
    code.extend([0x0F, 0x78, 0xC3]); // vmread rbx, rax
    code.extend([0x83, 0xFB, 18]); // cmp ebx, VMCALL
    code.extend([0x75, 0]); // jne reason
    let to_reason = code.len();
    code.push(0xB8); // mov eax, RIP of L2
    code.extend(GUEST_RIP.to_le_bytes());
    code.push(0xB9); // mov ecx, its program
    code.extend(((L2_CODE_GFN << 12) as u32).to_le_bytes());
    code.extend([0x0F, 0x79, 0xC1]); // vmwrite rax, rcx
    code.extend([0xE6, 0x10]); // out round port, al
    code.extend([0x0F, 0x01, 0xC3]); // vmresume
    let error = code.len();
    code.extend([0xB8, 0x00, 0x44, 0, 0]); // mov eax, VM-instruction error
    code.extend([0x0F, 0x78, 0xC3]); // vmread rbx, rax
    code.extend([0x89, 0xD8, 0xE7, ERROR_PORT]); // mov eax, ebx; out port, eax
    let reason = code.len();
    code.extend([0x89, 0xD8, 0xE7, REASON_PORT, 0xF4]); // mov eax, ebx; out port, eax; hlt
    for (from, to) in [(to_error, error), (from_launch, error), (to_reason, reason)] {
        code[from - 1] = (to - from) as u8;
    }
    (code, exit as u64)
}

/// L2 in compatibility mode on L1's page tables, and L1 as it is.
fn vmcs([pin, processor, exit, entry]: [u64; 4], nested: Nested, exit_rip: u64) -> Vec<(u32, u64)> {
    let secondary = u64::from(nested != Nested::Off);
    let accessed_bits = u64::from(nested != Nested::Tracked) << 6;
    let mut fields = vec![
        (0x4000, pin),
        (0x4002, processor | secondary << 31),
        (0x400C, exit | 1 << 9),
        (0x4012, entry | 1 << 9),
        (0x2800, u64::MAX), // no shadow VMCS
    ];
    if nested != Nested::Off {
        fields.push((0x401E, 1 << 1)); // EPT
        fields.push((0x201A, NESTED_TABLES << 12 | accessed_bits | 3 << 3 | 6)); // four levels, write-back
    }
    // Control registers: of L1, of L2.
    for base in [0x6C00, 0x6800] {
        fields.extend([(base, CR0), (base + 2, L1_TABLES << 12), (base + 4, CR4)]);
    }
    // Selectors ES, CS, SS, DS, FS, GS, TR of L1.
    fields.extend(
        [0x10, 8, 0x10, 0x10, 0x10, 0x10, 0x18].into_iter().zip((0x0C00..).step_by(2)).map(|(s, f)| (f, s)),
    );
    fields.push((0x6C16, exit_rip));
    let data = (0x10, 0xC093, 0xFFFF_FFFF);
    let code = (8, 0xC09B, 0xFFFF_FFFF);
    let segments = [data, code, data, data, data, data, (0, 0x1_0000, 0), (0x18, 0x8B, 0xFFFF)];
    for (index, (selector, rights, limit)) in segments.into_iter().enumerate() {
        let index = 2 * index as u32;
        fields.extend([(0x0800 + index, selector), (0x4814 + index, rights), (0x4800 + index, limit)]);
    }
    fields.extend([(0x681A, 0x400), (0x6820, 2), (GUEST_RIP, L2_CODE_GFN << 12)]);
    fields
}
