// SPDX-License-Identifier: GPL-2.0-only
/*
 * Arming: taking permissions from a leaf entry so that the next access faults,
 * and giving them back to one that was not accessed.
 *
 * A fault on an armed entry needs nothing from this module: KVM finds an entry
 * that does not allow the access and makes it anew from the VMM's memory, as it
 * does after it write-protected one. What must hold for that:
 *
 * - KVM adds write permission to an entry without a lock when the entry is
 *   "MMU-writable". Into an entry that lost reading as well that would put an
 *   entry that no CPU accepts. So the entry loses MMU-writable together with
 *   reading, and KVM goes the long way. An entry that lost only writing keeps
 *   it, and heals the short way.
 *
 * - KVM's own write protection skips entries that are not writable, and does
 *   not flush for them. So nothing armed may be cached as writable once KVM can
 *   look: entries are armed and the TLBs flushed within one hold of mmu_lock.
 *
 * - For the same reason write permission can come back only where nobody wants
 *   to hear of writes. A slot's dirty logging is published under SRCU before
 *   KVM write-protects, and write tracking begins under mmu_lock; both are held
 *   here. Otherwise the entry gets reading and executing back, and KVM decides
 *   at the next write.
 *
 * - The exchange is with the value as armed, but for accessed and dirty bits,
 *   which a harvest may have cleared. An entry that KVM changed is KVM's.
 *
 * - KVM takes a fetch from an entry that is not present but may be executed
 *   (NPT, after 6.12) for one that the entry allows by now, and lets the guest
 *   try again for ever. So the entry is made not executable as well.
 *
 * - When KVM splits a huge entry that must not be executed (NX huge pages), it
 *   makes copies of it executable. Of an armed entry that would make entries
 *   that allow only that. So an entry that is not executable already is armed
 *   for writing alone, or not. One that is can get there only when NX huge pages
 *   are switched on while it is armed: before the VM's roots are dropped, which
 *   the same switch does next, a fetch or the begin of dirty logging may split
 *   it. With EPT this needs a CPU that accepts entries that can only be executed
 *   (all with accessed bits do, but a hypervisor may hide it), and other
 *   accesses to the copies fault and heal. With NPT the last paragraph applies
 *   until the roots are dropped.
 *
 * A KVM that is patched (patched.h) arms and restores entries itself, and sees to
 * all of this.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ktime.h>
#include <linux/math64.h>
#include <asm/msr.h>
#include <asm/vmx.h>

#include "compat.h"
#include "arm.h"
#include "flush.h"
#include "hold.h"
#include "patched.h"

static const struct kes_entry_rights rights_ept = KES_ENTRY_RIGHTS_EPT;
static const struct kes_entry_rights rights_npt = KES_ENTRY_RIGHTS_NPT;

/* The permissions of entries of @format. */
const struct kes_entry_rights *kes_arming_rights(const struct kes_entry_format *format)
{
	return format->id == KES_FORMAT_EPT ? &rights_ept : &rights_npt;
}

/* Whether the CPU accepts entries that can only be executed. Set once at load. */
static bool execute_only __ro_after_init;

void __init kes_arming_init(const struct kes_entry_format *format)
{
	u32 low, high;

	execute_only = format->id != KES_FORMAT_EPT ||
		       (!rdmsr_safe(MSR_IA32_VMX_EPT_VPID_CAP, &low, &high) &&
			(low & VMX_EPT_EXECUTE_ONLY_BIT));
}

static int arming_hold(struct kes_arming *arming, bool mmu_lock)
{
	struct kvm_memory_slot *slot;
	struct rb_node *node;

	arming->mmu_lock = mmu_lock;
	arming->srcu_idx = srcu_read_lock(&arming->kvm->srcu);
	arming->slots = __kvm_memslots(arming->kvm, 0);
	arming->slot_count = 0;
	arming->slot_pages = 0;
	arming->flush = false;
	for_each_user_slot(slot, node, arming->slots) {
		arming->slot_count++;
		arming->slot_pages += slot->npages;
	}
	if (mmu_lock)
		read_lock(&arming->kvm->mmu_lock);
	rcu_read_lock();
	arming->begin_ns = ktime_get_ns();
	arming->roots = kes_vm_roots_for_sampling(arming->kvm, arming->root);
	if (arming->roots < 0) {
		kes_arming_end(arming);
		return arming->roots;
	}
	return 0;
}

/* Holds the VM's slots and tables for drawing, until kes_arming_end(). */
int kes_arming_look(struct kes_arming *arming)
{
	return arming_hold(arming, false);
}

/*
 * Holds the VM's slots and tables for arming and restoring, until
 * kes_arming_end(). Keep it short: KVM takes mmu_lock for write to unmap pages.
 */
int kes_arming_begin(struct kes_arming *arming)
{
	return arming_hold(arming, true);
}

void kes_arming_end(struct kes_arming *arming)
{
	if (arming->flush)
		kes_flush_tlbs(arming->kvm);
	kes_hold_count(KES_HOLD_SAMPLE, arming->begin_ns);
	rcu_read_unlock();
	if (arming->mmu_lock)
		read_unlock(&arming->kvm->mmu_lock);
	srcu_read_unlock(&arming->kvm->srcu, arming->srcu_idx);
}

/* The leaf entry that maps @gfn, or NULL. */
static u64 *leaf_find(const struct kes_root *root, u64 gfn, int *level)
{
	u64 *table = root->table, *entry;
	u64 value;

	if (gfn >= kes_entry_pages(root->level + 1))
		return NULL;
	for (*level = root->level;; (*level)--) {
		entry = &table[kes_entry_index(gfn, *level)];
		value = READ_ONCE(*entry);
		if (!(value & KES_ENTRY_PRESENT))
			return NULL;
		if (*level == PG_LEVEL_4K || (value & KES_ENTRY_HUGE))
			return entry;
		table = kes_entry_table(value);
	}
}

static bool entry_executable(const struct kes_entry_rights *rights, u64 value)
{
	return rights->no_execute ? !(value & rights->no_execute) : value & rights->execute;
}

/* What to change in an entry to arm it; 0: it is not to be armed. */
static u64 entry_change(const struct kes_arming *arming, u64 value, int level,
			   const struct kvm_memory_slot *slot)
{
	const struct kes_entry_rights *rights = kes_arming_rights(arming->format);

	if ((value & KES_ENTRY_WRITE) && !(value & rights->mmu_writable)) {
		pr_err_once("a writable entry is not laid out as this module knows it: not sampled\n");
		return 0;
	}
	/* KVM does not write-protect huge entries while it logs: it splits them. */
	if (level > PG_LEVEL_4K && (slot->flags & KVM_MEM_LOG_DIRTY_PAGES))
		return 0;
	if (arming->write_only)
		return value & KES_ENTRY_WRITE;
	if (!(value & KES_ENTRY_READ))
		return 0;
	if (level > PG_LEVEL_4K && !kes_patched &&
	    !(execute_only && entry_executable(rights, value)))
		return 0;
	return (value & (KES_ENTRY_READ | KES_ENTRY_WRITE | rights->execute |
			 rights->mmu_writable)) | (~value & rights->no_execute);
}

/* The next of a sequence of random numbers (SplitMix64; Steele et al., 2014). */
static u64 random_next(u64 *state)
{
	u64 mix = *state += 0x9e3779b97f4a7c15ULL;

	mix = (mix ^ mix >> 30) * 0xbf58476d1ce4e5b9ULL;
	mix = (mix ^ mix >> 27) * 0x94d049bb133111ebULL;
	return mix ^ mix >> 31;
}

static const struct kes_root *draw_root(const struct kes_arming *arming,
					const struct kes_draw *draw)
{
	return arming->roots ? &arming->root[draw->root % arming->roots] : NULL;
}

/*
 * Draws a page, each of the guest's with the same chance, and a root. Whether
 * that maps it: if not, draw again.
 */
bool kes_arming_draw(const struct kes_arming *arming, u64 *random, struct kes_draw *draw)
{
	u64 page = mul_u64_u64_shr(random_next(random), arming->slot_pages, 64);
	const struct kes_root *root;
	struct kvm_memory_slot *slot;
	struct rb_node *node;
	int level;

	for_each_user_slot(slot, node, arming->slots) {
		if (page < slot->npages) {
			draw->gfn = slot->base_gfn + page;
			draw->root = arming->roots > 1 ? random_next(random) : 0;
			root = draw_root(arming, draw);
			return root && leaf_find(root, draw->gfn, &level);
		}
		page -= slot->npages;
	}
	return false;
}

/*
 * Describes in @armed how to arm the entry that maps what was drawn. NULL when
 * nothing does now. With nothing to change in it the entry is armed, or not to
 * be armed.
 */
u64 *kes_arming_find(const struct kes_arming *arming, const struct kes_draw *draw,
		     struct kes_armed *armed)
{
	struct kvm_memory_slot *slot = search_memslots(arming->slots, draw->gfn, false);
	const struct kes_root *root = draw_root(arming, draw);
	u64 *entry, value;

	if (!slot || slot->id >= KVM_USER_MEM_SLOTS || !root || root->guest_mode)
		return NULL;
	entry = leaf_find(root, draw->gfn, &armed->level);
	if (!entry)
		return NULL;
	value = READ_ONCE(*entry);
	if (!(value & KES_ENTRY_PRESENT))
		return NULL;
	armed->changed = entry_change(arming, value, armed->level, slot);
	armed->value = value ^ armed->changed;
	armed->gfn = ALIGN_DOWN(draw->gfn, kes_entry_pages(armed->level));
	return entry;
}

/* Arms an entry that kes_arming_find() returned, unless it changed since. */
bool kes_arming_revoke(struct kes_arming *arming, u64 *entry, struct kes_armed *armed)
{
	u64 old = armed->value ^ armed->changed;

	if (kes_patched) {
		armed->level = kes_patched->arm(arming->kvm, armed->gfn, arming->write_only);
		if (!armed->level)
			return false;
	} else if (!try_cmpxchg64(entry, &old, armed->value)) {
		return false;
	}
	arming->flush = true;
	return true;
}

/* What an armed entry can get back now. */
static u64 armed_restorable(const struct kes_arming *arming, const struct kes_armed *armed)
{
	u64 write = KES_ENTRY_WRITE | kes_arming_rights(arming->format)->mmu_writable;
	u64 pages = kes_entry_pages(armed->level);
	struct kvm_memory_slot *slot = search_memslots(arming->slots, armed->gfn, false);

	if (!slot || armed->gfn + pages > slot->base_gfn + slot->npages ||
	    (slot->flags & (KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)) ||
	    READ_ONCE(arming->kvm->arch.shadow_root_allocated) ||
	    kes_compat_writes_tracked(arming->kvm, slot, armed->gfn, pages))
		return armed->changed & ~write;
	return armed->changed;
}

/* Gives an armed entry its permissions back, as far as that is right by now. */
void kes_arming_restore(struct kes_arming *arming, const struct kes_armed *armed)
{
	u64 hardware = BIT_ULL(arming->format->accessed_nr) | BIT_ULL(arming->format->dirty_nr);
	u64 restore, value;
	int i, level;
	u64 *entry;

	if (kes_patched) {
		kes_patched->disarm(arming->kvm, armed->gfn);
		return;
	}
	restore = armed_restorable(arming, armed);
	for (i = 0; i < arming->roots; i++) {
		if (arming->root[i].guest_mode)
			continue;
		entry = leaf_find(&arming->root[i], armed->gfn, &level);
		if (!entry || level != armed->level)
			continue;
		value = READ_ONCE(*entry);
		/* Again only when a harvest or the CPU changed a bit in between. */
		while (!((value ^ armed->value) & ~hardware) &&
		       !try_cmpxchg64(entry, &value, value ^ restore))
			;
	}
}
