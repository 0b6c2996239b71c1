/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The only file that knows kernel versions. Each entry names the version that
 * brought the change. docs/KERNELS.md lists what was tested.
 */
#ifndef KES_COMPAT_H
#define KES_COMPAT_H

#include <linux/version.h>

#define KES_KERNEL_IS(major, minor) \
	(LINUX_VERSION_CODE >= KERNEL_VERSION(major, minor, 0) && \
	 LINUX_VERSION_CODE < KERNEL_VERSION(major, (minor) + 1, 0))
#define KES_KERNEL_FROM(major, minor) \
	(LINUX_VERSION_CODE >= KERNEL_VERSION(major, minor, 0))

/*
 * KVM's private structures and entry bits are read directly, so a kernel line
 * is either known or refused: nothing is guessed. These are the lines whose
 * layouts are written down in vm.c and entry.h. Kbuild asks for this
 * answer alone, with KES_ASK_KERNEL: it builds unsupported.c on other lines.
 */
#define KES_KERNELS "Linux 6.1, 6.12 and 7.3"
#if KES_KERNEL_IS(6, 1) || KES_KERNEL_IS(6, 12) || KES_KERNEL_IS(7, 3)
#define KES_KERNEL_KNOWN 1
#endif

#if defined(KES_KERNEL_KNOWN) && !defined(KES_ASK_KERNEL)

#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/page_idle.h>
#include <linux/string.h>

/* 6.7: the operations of a VM's file name the vendor module as their owner. */
#if KES_KERNEL_FROM(6, 7)
#define KES_COMPAT_VM_FILE_OWNER
#endif

/* 6.8: guests can have private memory. */
#ifndef kvm_arch_has_private_mem
#define kvm_arch_has_private_mem(kvm) false
#endif

/* 6.8: the frames of a slot can come from a guest_memfd. */
static inline bool kes_compat_is_guest_memfd(const struct kvm_memory_slot *slot)
{
#ifdef KVM_MEM_GUEST_MEMFD
	return slot->flags & KVM_MEM_GUEST_MEMFD;
#else
	return false;
#endif
}

/* 6.2: without CONFIG_KVM_SMM there is no system management mode. */
#ifndef HF_SMM_MASK
#define HF_SMM_MASK 0
#endif

/* After 6.12: TDX mirrors its tables, and the mirror is not what the CPU reads. */
#if KES_KERNEL_IS(7, 3)
#define kes_compat_is_mirror(role) ((role).is_mirror)
#else
#define kes_compat_is_mirror(role) false
#endif

/*
 * Up to 6.12 KVM tells the host that a page is dirty when it unmaps an entry
 * with the dirty bit; since then already when it maps a writable one. Who clears
 * the bit in between owes the older kernels the same word.
 *
 * Call with kvm->mmu_lock held for read, which keeps the frame the guest's.
 */
static inline void kes_compat_set_pfn_dirty(kvm_pfn_t pfn)
{
#if !KES_KERNEL_IS(7, 3)
	kvm_set_pfn_dirty(pfn);
#endif
}

/*
 * Lets the host's page reclaim and idle page tracking know that a page was
 * accessed whose accessed bit is cleared, as those do for each other. Kernels
 * without CONFIG_PAGE_IDLE_FLAG, as Debian's 6.1, have nothing to note it in. The
 * flag must not be set on a page that is free.
 *
 * Call with kvm->mmu_lock held for read, which keeps the frame the guest's.
 */
#ifdef CONFIG_PAGE_IDLE_FLAG
#define KES_COMPAT_KEEP_YOUNG	true
static inline void kes_compat_set_pfn_young(kvm_pfn_t pfn)
{
	struct page *page = pfn_valid(pfn) ? pfn_to_page(pfn) : NULL;

	if (!page || PageReserved(page) || is_zone_device_page(page))
		return;
	folio_set_young(page_folio(page));
	folio_clear_idle(page_folio(page));
}
#else
#define KES_COMPAT_KEEP_YOUNG	false
static inline void kes_compat_set_pfn_young(kvm_pfn_t pfn) { }
#endif

/*
 * After 6.12 KVM's own bits of EPT entries moved, and fetches in user mode got a
 * permission of their own. (The bits of NPT entries stayed.)
 */
#if KES_KERNEL_IS(7, 3)
#define KES_COMPAT_EPT_EXECUTE		(BIT_ULL(2) | BIT_ULL(10))
#define KES_COMPAT_EPT_MMU_WRITABLE	BIT_ULL(55)
#else
#define KES_COMPAT_EPT_EXECUTE		BIT_ULL(2)
#define KES_COMPAT_EPT_MMU_WRITABLE	BIT_ULL(58)
#endif

/*
 * Whether someone other than KVM may want to hear of each write to the pages
 * [gfn, gfn + pages) of @slot (KVMGT). Up to 6.1 known page by page; since 6.5
 * it is enough to know that nobody ever asked.
 *
 * Call with kvm->mmu_lock held.
 */
static inline bool kes_compat_writes_tracked(struct kvm *kvm, struct kvm_memory_slot *slot,
					     gfn_t gfn, u64 pages)
{
#if KES_KERNEL_IS(6, 1)
	const unsigned short *track = slot->arch.gfn_track[KVM_PAGE_TRACK_WRITE];

	return track && memchr_inv(track + (gfn - slot->base_gfn), 0, pages * sizeof(*track));
#elif defined(CONFIG_KVM_EXTERNAL_WRITE_TRACKING)
	return READ_ONCE(kvm->arch.external_write_tracking_enabled);
#else
	return false;
#endif
}

/*
 * Up to 6.12 KVM lets EPT write no accessed and dirty bits while a nested guest
 * without nested EPT runs (construct_eptp() in vmx.c), and marks neither the root
 * nor the entries.
 */
#if KES_KERNEL_IS(7, 3)
#define KES_COMPAT_NESTED_EPT_BLIND	false
#else
#define KES_COMPAT_NESTED_EPT_BLIND	true
#endif

/*
 * Up to 6.12 tracepoints call their probes with preemption off. With PREEMPT_RT a
 * spinlock sleeps, so what a probe may do there is too little for a sampler.
 */
#if KES_KERNEL_IS(7, 3) || !defined(CONFIG_PREEMPT_RT)
#define KES_COMPAT_PROBE_MAY_LOCK	true
#else
#define KES_COMPAT_PROBE_MAY_LOCK	false
#endif

/*
 * A reverse map's head: 0 when no entry of tables that KVM shadows maps the page,
 * the address of the entry when one does, and anything odd when there are more.
 * After 6.12 bit 1 is a lock.
 */
static inline unsigned long kes_compat_rmap(const struct kvm_rmap_head *head)
{
#if KES_KERNEL_IS(7, 3)
	return atomic_long_read(&head->val) & ~2UL;
#else
	return READ_ONCE(head->val);
#endif
}

/*
 * Takes the page that is mapped at @address of @mm, and returns 1; nothing is
 * faulted in. Since 6.5 the call tells no areas.
 *
 * Call with the mmap_lock held for read.
 */
static inline long kes_compat_get_mapped_page(struct mm_struct *mm, unsigned long address,
					      struct page **page)
{
#if KES_KERNEL_IS(6, 1)
	return get_user_pages_remote(mm, address, 1, FOLL_NOFAULT, page, NULL, NULL);
#else
	return get_user_pages_remote(mm, address, 1, FOLL_NOFAULT, page, NULL);
#endif
}

/* After 6.12 kvm_flush_remote_tlbs() is exported to KVM's own modules only. */
#if !KES_KERNEL_IS(7, 3)
#define KES_COMPAT_FLUSH_EXPORTED
#endif

#endif /* KES_KERNEL_KNOWN && !KES_ASK_KERNEL */

#endif /* KES_COMPAT_H */
