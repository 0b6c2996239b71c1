// SPDX-License-Identifier: MIT OR Apache-2.0
//! The firmware that is all of a tiny guest: 16-bit code, started by the
//! processor's reset. It keeps two blocks, as the large guests' workload does
//! (lab/agent/src/guest.rs), and speaks its language on the serial port:
//!
//! - HOT, 16 pages from 0x10000: about twice a second each is checked to hold the
//!   number of the last pass, and is given the next one;
//! - IDLE, 96 pages from 0x20000, written once, each with its own segment.
//!
//! `check` and `poweroff` are obeyed; commands are known by their first letter.
//! Between passes the processor rests, so that many such guests share one.
//!
//! Ports and registers: 8259 interrupt controller 0x20, 8254 timer 0x40, 16550
//! serial port 0x3f8, PCI configuration 0xcf8, and the ACPI block of the PIIX4
//! (QEMU's "pc" machine has it at 00:01.3), which firmware has to place.

use std::arch::global_asm;

/// QEMU takes firmware in multiples of this.
const ROM_BYTES: usize = 64 << 10;

/// Where the processor begins after a reset.
const RESET_AT: usize = 0xfff0;

/// `ljmp $0xf000, $0`: to the copy of the firmware below 1 MiB, as interrupts
/// can not lead above.
const RESET: [u8; 5] = [0xea, 0x00, 0x00, 0x00, 0xf0];

global_asm!(
    r#"
    .pushsection .rodata.tiny_guest, "a"
    .code16
    .globl tiny_guest_begin
tiny_guest_begin:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7000, %sp
    # Vector 8, the timer; passes so far, whether within a line, wrong pages, ticks.
    movw $(tiny_tick - tiny_guest_begin), 0x20
    movw $0xf000, 0x22
    movw %ax, 0x600
    movw %ax, 0x602
    movw %ax, 0x604
    movw %ax, 0x606
    # Without a local APIC, which would keep the controller's interrupts away.
    movl $0x1b, %ecx
    rdmsr
    andw $0xf7ff, %ax
    wrmsr
    # Interrupt controller: vectors from 8 on, none but the timer.
    movb $0x11, %al
    outb %al, $0x20
    movb $0x08, %al
    outb %al, $0x21
    movb $0x04, %al
    outb %al, $0x21
    movb $0x01, %al
    outb %al, $0x21
    movb $0xfe, %al
    outb %al, $0x21
    # Timer 0 as slow as it goes: 18 a second.
    movb $0x34, %al
    outb %al, $0x43
    xorb %al, %al
    outb %al, $0x40
    outb %al, $0x40
    # The serial port keeps 16 bytes for us.
    movb $1, %al
    movw $0x3fa, %dx
    outb %al, %dx
    # ACPI registers at 0x600, enabled.
    movl $0x80000b40, %eax
    movw $0xcf8, %dx
    outl %eax, %dx
    movl $0x601, %eax
    movw $0xcfc, %dx
    outl %eax, %dx
    movl $0x80000b80, %eax
    movw $0xcf8, %dx
    outl %eax, %dx
    movb $1, %al
    movw $0xcfc, %dx
    outb %al, %dx
    # HOT holds pass 0; what an earlier life left there does not count.
    movw $0x1000, %ax
1:  movw %ax, %es
    movw $0, %es:0
    addw $0x100, %ax
    cmpw $0x2000, %ax
    jne 1b
    # IDLE.
1:  movw %ax, %es
    movw %ax, %es:0
    addw $0x100, %ax
    cmpw $0x8000, %ax
    jne 1b
    movw $0x1000, %ax
    movw %ax, %es
    movw $(tiny_ready - tiny_guest_begin), %si
    call tiny_say
tiny_rest:
    sti
    hlt
    incw 0x606
    testw $7, 0x606
    jnz tiny_rest
    # A pass.
    movw 0x600, %ax
    xorw %di, %di
1:  cmpw %ax, %es:(%di)
    je 2f
    incw 0x604
2:  incw %ax
    movw %ax, %es:(%di)
    decw %ax
    addw $0x1000, %di
    jnc 1b
    incw 0x600
tiny_listen:
    movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz tiny_rest
    movw $0x3f8, %dx
    inb %dx, %al
    cmpb $10, %al
    je 1f
    cmpb $0, 0x602
    jne tiny_listen
    movb $1, 0x602
    cmpb $'c', %al
    je tiny_check
    cmpb $'p', %al
    je tiny_power_off
    jmp tiny_listen
1:  movb $0, 0x602
    jmp tiny_listen
tiny_check:
    movw $0x2000, %ax
1:  movw %ax, %es
    cmpw %ax, %es:0
    je 2f
    incw 0x604
2:  addw $0x100, %ax
    cmpw $0x8000, %ax
    jne 1b
    movw $0x1000, %ax
    movw %ax, %es
    movw $(tiny_good - tiny_guest_begin), %si
    cmpw $0, 0x604
    je 1f
    movw $(tiny_bad - tiny_guest_begin), %si
1:  call tiny_say
    jmp tiny_listen
tiny_power_off:
    movw $(tiny_last_word - tiny_guest_begin), %si
    call tiny_say
    movw $0x604, %dx
    movw $0x2000, %ax
    outw %ax, %dx
    jmp tiny_rest
tiny_say:
    movb %cs:(%si), %ah
    testb %ah, %ah
    jz 2f
    movw $0x3fd, %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %ah, %al
    movw $0x3f8, %dx
    outb %al, %dx
    incw %si
    jmp tiny_say
2:  ret
tiny_tick:
    pushw %ax
    movb $0x20, %al
    outb %al, $0x20
    popw %ax
    iretw
tiny_ready:
    .ascii "EPT-GUEST frames hot 10 10\nEPT-GUEST frames idle 20 60\n"
    .asciz "EPT-GUEST frames end\nEPT-GUEST ready\n"
tiny_good:
    .ascii "EPT-GUEST check hot ok\nEPT-GUEST check idle ok\n"
    .asciz "EPT-GUEST check running ok\nEPT-GUEST check end\n"
tiny_bad:
    .asciz "EPT-GUEST check running bad 1\nEPT-GUEST check end\n"
tiny_last_word:
    .asciz "EPT-GUEST poweroff\n"
    .globl tiny_guest_end
tiny_guest_end:
    .code64
    .popsection
"#,
    options(att_syntax)
);

/// Pages that the guest accesses in each pass.
pub const HOT_PAGES: u64 = 16;

/// The whole ROM.
pub fn rom() -> Vec<u8> {
    let mut rom = vec![0; ROM_BYTES];
    let code = code();
    rom[..code.len()].copy_from_slice(code);
    rom[RESET_AT..][..RESET.len()].copy_from_slice(&RESET);
    rom
}

fn code() -> &'static [u8] {
    unsafe extern "C" {
        static tiny_guest_begin: u8;
        static tiny_guest_end: u8;
    }
    let (begin, end) = (&raw const tiny_guest_begin, &raw const tiny_guest_end);
    // SAFETY: both labels stand in one read-only section of this program, the
    // second after the first, and all bytes between them are initialised.
    unsafe { std::slice::from_raw_parts(begin, end.addr() - begin.addr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_stays_below_the_reset_vector() {
        assert!(code().len() < RESET_AT, "{} bytes", code().len());
        assert_eq!((rom()[0], rom()[RESET_AT], rom().len()), (0xfa, 0xea, ROM_BYTES));
    }
}
