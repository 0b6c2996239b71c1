/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _ASM_X86_KVM_EPT_SAMPLE_H
#define _ASM_X86_KVM_EPT_SAMPLE_H

#include <linux/kvm_types.h>

/* Changes with everything below. */
#define KVM_EPT_SAMPLE_VERSION	1

/* The topmost table of a tree of tables that vCPUs can be running on. */
struct kvm_ept_sample_root {
	u64 *table;
	int level;		/* of the entries in @table */
	bool guest_mode;	/* runs nested guests */
	bool ad_disabled;	/* the CPU writes no Accessed and Dirty bits */
};

/**
 * struct kvm_ept_sample_ops - what KVM does for a sampler of memory accesses
 * @version: KVM_EPT_SAMPLE_VERSION of this KVM.
 * @begin: From now on entries may be armed.  Sleeps.  Each sampler calls it once.
 * @end: Undoes @begin.  Sleeps.  Entries that are still armed cost one fault each.
 * @arm: Takes the permissions (@write_only: Writable) from the leaf entry that
 *	maps @gfn, so that the next access faults and is seen by the tracepoint
 *	kvm_page_fault.  KVM then restores the entry.  Returns the level of the
 *	entry, or 0 if there is none to arm.  Until the caller has called @flush,
 *	CPUs can go on with what they have cached.
 * @disarm: Restores the entry that maps @gfn, if it is armed.
 * @flush: Flushes the TLBs of all vCPUs.
 * @roots: Fills in up to @count roots and returns how many there are; none if
 *	the VM does not use the TDP MMU.  The tables, and those below, stay as
 *	long as the caller is in its RCU read-side critical section.
 *
 * @arm to @flush: hold kvm->mmu_lock for read and kvm->srcu, from the first entry
 * that is armed until after the flush.  @roots: hold RCU.
 */
struct kvm_ept_sample_ops {
	unsigned int version;
	void (*begin)(void);
	void (*end)(void);
	int (*arm)(struct kvm *kvm, gfn_t gfn, bool write_only);
	void (*disarm)(struct kvm *kvm, gfn_t gfn);
	void (*flush)(struct kvm *kvm);
	int (*roots)(struct kvm *kvm, struct kvm_ept_sample_root *roots, int count);
};

extern const struct kvm_ept_sample_ops kvm_ept_sample_ops;

#endif /* _ASM_X86_KVM_EPT_SAMPLE_H */
