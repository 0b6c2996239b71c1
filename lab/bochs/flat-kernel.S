/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The protected-mode part of a Linux boot image that holds the kernel
 * uncompressed. It stands where the kernel's own decompressor would stand and
 * does what that does, apart from the decompressing, which takes an emulated
 * processor several seconds: it enters long mode, copies the kernel to the
 * address that it was linked for, and jumps to it.
 *
 * Entered as the 32-bit boot protocol says (Documentation/arch/x86/boot.rst):
 * at CODE32_START, paging off, flat segments, %esi = boot_params.
 *
 * Given by the assembler's command line (--defsym):
 *   KERNEL_ADDRESS  physical address of the kernel's first byte, above this image's code
 *   KERNEL_BYTES    size of kernel.bin, a multiple of 8
 *   CLEAR_BYTES     memory behind it that the kernel expects to be zero, a multiple of 8
 *   KERNEL_ENTRY    physical address of startup_64
 * and kernel.bin in the folder of the assembler.
 */
	.set PTE_TABLE, 0x7		/* present, writable, user */
	.set PTE_2M, 0x83		/* present, writable, large */
	.set CR0_PE_PG, 0x80000001
	.set CR4_PAE, 0x20
	.set MSR_EFER, 0xc0000080
	.set EFER_LME, 0x100
	.set BOOT_CS, 0x10		/* the selectors that the kernel expects */
	.set BOOT_DS, 0x18

	.code32
	.globl _start
_start:
	cli
	lgdt	gdt_pointer
	movl	%cr4, %eax
	orl	$CR4_PAE, %eax
	movl	%eax, %cr4
	movl	$level4, %eax
	movl	%eax, %cr3
	movl	$MSR_EFER, %ecx
	rdmsr
	orl	$EFER_LME, %eax
	wrmsr
	movl	%cr0, %eax
	orl	$CR0_PE_PG, %eax
	movl	%eax, %cr0
	ljmp	$BOOT_CS, $long_mode

	.code64
long_mode:
	movl	$BOOT_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	%esi, %ebx		/* boot_params; clears the upper half */
	/* The destination lies above the source and may overlap it: last word first. */
	movq	$kernel + KERNEL_BYTES - 8, %rsi
	movq	$KERNEL_ADDRESS + KERNEL_BYTES - 8, %rdi
	movq	$KERNEL_BYTES / 8, %rcx
	std
	rep movsq
	cld
	movq	$KERNEL_ADDRESS + KERNEL_BYTES, %rdi
	movq	$CLEAR_BYTES / 8, %rcx
	xorl	%eax, %eax
	rep stosq
	movq	%rbx, %rsi
	movq	$KERNEL_ENTRY, %rax
	jmp	*%rax

	.balign 16
gdt:
	.quad	0, 0
	.quad	0x00af9a000000ffff	/* BOOT_CS: 64-bit code */
	.quad	0x00cf92000000ffff	/* BOOT_DS: flat data */
gdt_pointer:
	.word	. - gdt - 1
	.long	gdt

	/* The first 4 GiB one to one, in pages of 2 MiB. */
	.balign 4096
level4:
	.quad	level3 + PTE_TABLE
	.fill	511, 8, 0
level3:
	.quad	level2 + PTE_TABLE
	.quad	level2 + 0x1000 + PTE_TABLE
	.quad	level2 + 0x2000 + PTE_TABLE
	.quad	level2 + 0x3000 + PTE_TABLE
	.fill	508, 8, 0
level2:
	.set page, PTE_2M
	.rept 2048
	.quad	page
	.set page, page + 0x200000
	.endr

kernel:
	.incbin "kernel.bin"
