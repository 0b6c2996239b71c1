/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_VM_H
#define KES_VM_H

#include <linux/kvm_host.h>

#include "uapi/kvm_ept_sample.h"

/* A root of second-level tables that may be walked. */
struct kes_root {
	u64 *table;
	int level;		/* of the entries in @table: 4 or 5 */
	bool guest_mode;	/* runs a nested guest: faults are not the guest's */
	bool tracked;		/* no accessed bits: KES_ENTRY_FORMAT_TRACKED */
};

/* Valid roots seen at once: plain, and one for a nested guest's direct map. */
#define KES_MAX_ROOTS 8

/*
 * The slots that user space made, in the order of their addresses. @slots are
 * held by kvm->srcu.
 */
#define for_each_user_slot(slot, node, slots)					\
	for ((node) = rb_first(&(slots)->gfn_tree); (node); (node) = rb_next(node))	\
		if (((slot) = container_of(node, struct kvm_memory_slot,	\
					   gfn_node[(slots)->node_idx]))->id <	\
		    KVM_USER_MEM_SLOTS)

struct kvm *kes_vm_of_file(struct file *file);
struct kvm *kes_vm_get(int fd);
void kes_vm_put(struct kvm *kvm);
int kes_vm_check(struct kvm *kvm);
bool kes_vm_has_tables(struct kvm *kvm);
int kes_vm_roots(struct kvm *kvm, struct kes_root roots[KES_MAX_ROOTS]);
int kes_vm_roots_for_sampling(struct kvm *kvm, struct kes_root roots[KES_MAX_ROOTS]);
bool kes_vm_is_shadow_entry(const u64 *entry);
u32 kes_vm_slots(struct kvm *kvm, struct kes_memslot *out, u32 capacity, u64 *generation);
bool kes_vm_table_is(const u64 *table, int level, u64 gfn);
long kes_vm_memslots(struct kvm *kvm, struct kes_memslots *arg);

#endif /* KES_VM_H */
