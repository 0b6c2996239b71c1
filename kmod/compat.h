/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The only file that knows kernel versions. Each entry names the version that
 * brought the change. docs/KERNELS.md lists what was tested.
 */
#ifndef KES_COMPAT_H
#define KES_COMPAT_H

#include <linux/version.h>
#include <linux/kvm_host.h>

/*
 * KVM's private structures and entry bits are read directly, so a kernel line
 * is either known or refused: nothing is guessed. 6.12 is the line whose
 * layouts are written down in vm.c and entry.h.
 */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0) || \
	LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
#error "kvm_ept_sample knows the KVM of Linux 6.12 only; see docs/KERNELS.md"
#endif

/*
 * Up to 6.12 KVM tells the host that a page is dirty when it unmaps an entry
 * with the dirty bit (7.3: already when it maps a writable one). Who clears the
 * bit before that owes the host the same word.
 *
 * Call with kvm->mmu_lock held for read, which keeps the frame the guest's.
 */
static inline void kes_compat_set_pfn_dirty(kvm_pfn_t pfn)
{
	kvm_set_pfn_dirty(pfn);
}

/* Exported up to 6.12. Waits until every running vCPU has left the guest. */
static inline void kes_compat_flush_tlbs(struct kvm *kvm)
{
	kvm_flush_remote_tlbs(kvm);
}

#endif /* KES_COMPAT_H */
