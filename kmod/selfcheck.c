// SPDX-License-Identifier: GPL-2.0-only
/*
 * The self-check: whether this kernel's second-level tables say what the module
 * reads in them. A kernel of a known line may still be laid out otherwise, and
 * its numbers would be wrong without anyone noticing.
 *
 * Once for each load, on the first VM that has pages mapped, some leaf entries
 * are followed from the root, each table on the way is compared with what KVM
 * notes about it, and each frame with the one that the VMM's own page tables
 * have for the same page. Where a table does not fit the module refuses to work,
 * until it is loaded again. A frame that does not fit may be the doing of a VMM
 * with page tables of its own kind: it speaks against that VM alone, and the next
 * one is checked as well.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/delay.h>
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/sched/mm.h>

#include "compat.h"
#include "arm.h"
#include "selfcheck.h"
#include "vm.h"

/* How many pages are looked at. */
#define PAGES		16
/* Entries looked at to find one of them, and all: below a millisecond. */
#define TRIES_PER_PAGE	1024
#define TRIES		8192
/* How often a page may be on its way elsewhere, and how long that takes. */
#define COMPARES	8
#define COMPARE_US	1000

enum { STATE_PENDING, STATE_PASSED, STATE_FAILED };

static const char * const state_names[] = { "pending", "passed", "failed" };

/* Held for a check; the state is final when it is not pending any more. */
static DEFINE_MUTEX(selfcheck_lock);
static int selfcheck_state = STATE_PENDING;

/* One VM's check. */
struct kes_selfcheck {
	struct kvm *kvm;
	const struct kes_entry_format *format;
	const char *wrong;	/* what did not fit; NULL: nothing so far */
	bool wrong_frame;	/* ... and it is a frame */
	u64 wrong_gfn;
	int tries;		/* left */
	int pages;
	u64 gfn[PAGES];		/* mapped pages */
};

/* Where a page lies, by the guest's tables and in the VMM. */
struct kes_place {
	unsigned long pfn;
	unsigned long hva;
};

const char *kes_selfcheck_state(void)
{
	return state_names[READ_ONCE(selfcheck_state)];
}

static void check_fails(struct kes_selfcheck *check, u64 gfn, const char *wrong)
{
	check->wrong = wrong;
	check->wrong_gfn = gfn;
}

/* An entry that links a table of @level for @gfn, which is read next. */
static bool link_fits(struct kes_selfcheck *check, const struct kes_root *root,
		      u64 value, u64 gfn, int level)
{
	/* KVM marks each link accessed when it makes it; nobody clears that. */
	if (!root->tracked && !(value & BIT_ULL(check->format->accessed_nr)))
		check_fails(check, gfn, "a table in use that is not marked accessed");
	else if (!kes_vm_table_is(kes_entry_table(value), level, gfn))
		check_fails(check, gfn, "a table that KVM does not know as one");
	return !check->wrong;
}

static bool leaf_fits(struct kes_selfcheck *check, u64 value, u64 gfn)
{
	if ((value & KES_ENTRY_WRITE) &&
	    !(value & kes_arming_rights(check->format)->mmu_writable))
		check_fails(check, gfn, "a writable entry that KVM did not make writable");
	return !check->wrong;
}

/*
 * The entry of the last table that is there for @gfn, and its level; 0 when
 * something on the way does not fit. The caller holds RCU.
 */
static u64 entry_find(struct kes_selfcheck *check, const struct kes_root *root, u64 gfn,
		      int *level)
{
	u64 *table = root->table, value;

	for (*level = root->level;; (*level)--) {
		value = READ_ONCE(table[kes_entry_index(gfn, *level)]);
		if (!(value & KES_ENTRY_PRESENT))
			return value;
		if (*level == PG_LEVEL_4K || (value & KES_ENTRY_HUGE))
			return leaf_fits(check, value, gfn) ? value : 0;
		if (!link_fits(check, root, value, gfn, *level - 1))
			return 0;
		table = kes_entry_table(value);
	}
}

/* Adds the first page of [gfn, end) that is mapped, if it is soon found. */
static void pages_add(struct kes_selfcheck *check, const struct kes_root *root, u64 gfn, u64 end)
{
	int tries = TRIES_PER_PAGE, level;

	end = min(end, kes_entry_pages(root->level + 1));
	while (gfn < end && tries-- && check->tries && check->pages < PAGES) {
		u64 value = entry_find(check, root, gfn, &level);

		check->tries--;
		if (check->wrong)
			return;
		if (value & KES_ENTRY_PRESENT) {
			check->gfn[check->pages++] = gfn;
			return;
		}
		gfn = ALIGN_DOWN(gfn, kes_entry_pages(level)) + kes_entry_pages(level);
	}
}

/* Cuts each slot into as many parts as gives PAGES of them; a page from each. */
static void pages_collect(struct kes_selfcheck *check, const struct kes_root *root,
			  struct kvm_memslots *slots)
{
	struct kvm_memory_slot *slot;
	unsigned int count = 0, parts, part;
	struct rb_node *node;

	for_each_user_slot(slot, node, slots)
		count++;
	if (!count)
		return;
	parts = DIV_ROUND_UP(PAGES, count);
	for (part = 0; part < parts; part++) {
		for_each_user_slot(slot, node, slots) {
			u64 from = mul_u64_u32_div(slot->npages, part, parts);
			u64 to = mul_u64_u32_div(slot->npages, part + 1, parts);

			pages_add(check, root, slot->base_gfn + from, slot->base_gfn + to);
			if (check->wrong || check->pages == PAGES || !check->tries)
				return;
		}
	}
}

/* The root to look at: 0 when there is none, or an error of kes_vm_roots(). */
static int root_find(struct kvm *kvm, struct kes_root *root)
{
	struct kes_root roots[KES_MAX_ROOTS];
	int i, n = kes_vm_roots(kvm, roots);

	for (i = 0; i < n; i++) {
		if (!roots[i].guest_mode) {
			*root = roots[i];
			return 1;
		}
	}
	return min(n, 0);
}

static int check_collect(struct kes_selfcheck *check)
{
	int idx = srcu_read_lock(&check->kvm->srcu), ret;
	struct kes_root root;

	rcu_read_lock();
	ret = root_find(check->kvm, &root);
	if (ret > 0)
		pages_collect(check, &root, __kvm_memslots(check->kvm, 0));
	rcu_read_unlock();
	srcu_read_unlock(&check->kvm->srcu, idx);
	return min(ret, 0);
}

/* False: @gfn is not mapped now, or something does not fit. */
static bool place_find(struct kes_selfcheck *check, u64 gfn, struct kes_place *place)
{
	struct kvm_memory_slot *slot;
	struct kes_root root;
	bool found = false;
	u64 value;
	int level, idx;

	idx = srcu_read_lock(&check->kvm->srcu);
	rcu_read_lock();
	slot = search_memslots(__kvm_memslots(check->kvm, 0), gfn, false);
	/* Memory of guest_memfd is mapped by KVM itself, whatever the VMM maps. */
	if (slot && !kes_compat_is_guest_memfd(slot) && root_find(check->kvm, &root) > 0) {
		value = entry_find(check, &root, gfn, &level);
		found = !check->wrong && (value & KES_ENTRY_PRESENT);
		place->pfn = kes_entry_pfn(value) + gfn % kes_entry_pages(level);
		place->hva = slot->userspace_addr + ((gfn - slot->base_gfn) << PAGE_SHIFT);
	}
	rcu_read_unlock();
	srcu_read_unlock(&check->kvm->srcu, idx);
	return found;
}

/*
 * The frame that the VMM's page tables have for @hva, 0: none now. Nothing is
 * faulted in. Sets @comparable to false for what is not ordinary memory, or can
 * not be looked at.
 */
static unsigned long vmm_pfn(struct mm_struct *mm, unsigned long hva, bool *comparable)
{
	struct vm_area_struct *vma;
	unsigned long pfn = 0;
	struct page *page;

	*comparable = false;
	/* Whoever holds it may wait for a disk for ever, and all VMs for this check. */
	if (!mmap_read_trylock(mm))
		return 0;
	vma = find_vma(mm, hva);
	if (vma && vma->vm_start <= hva && (vma->vm_flags & VM_READ) &&
	    !(vma->vm_flags & (VM_IO | VM_PFNMAP))) {
		*comparable = true;
		if (kes_compat_get_mapped_page(mm, hva, &page) == 1) {
			pfn = page_to_pfn(page);
			put_page(page);
		}
	}
	mmap_read_unlock(mm);
	return pfn;
}

/*
 * Whether a page was compared, and is the same. It may be migrated, swapped out
 * or unmapped meanwhile: it is a mismatch only when KVM's entry stood still and
 * the VMM has another frame or none, each time.
 */
static bool page_compare(struct kes_selfcheck *check, u64 gfn)
{
	struct kes_place place, after;
	bool comparable, stood = true;
	unsigned long pfn;
	int i;

	for (i = 0; i < COMPARES; i++) {
		if (i)
			usleep_range(COMPARE_US, 2 * COMPARE_US);
		if (!place_find(check, gfn, &place))
			return false;
		pfn = vmm_pfn(check->kvm->mm, place.hva, &comparable);
		if (!comparable)
			return false;
		if (pfn == place.pfn)
			return true;
		stood &= place_find(check, gfn, &after) && after.pfn == place.pfn &&
			 after.hva == place.hva;
	}
	check->wrong_frame = stood;
	if (stood)
		check_fails(check, gfn, "a frame that is not the one of the VMM's page tables");
	return false;
}

/* Returns how many pages were compared: 0, nothing can be said yet. Or an error. */
static int check_run(struct kes_selfcheck *check)
{
	int i, compared = 0, ret = check_collect(check);

	if (ret)
		return ret;
	if (check->wrong || !check->pages || !mmget_not_zero(check->kvm->mm))
		return 0;
	for (i = 0; i < check->pages && !check->wrong; i++)
		compared += page_compare(check, check->gfn[i]);
	mmput(check->kvm->mm);
	return compared;
}

/* What came of a check in which something was wrong. */
static int check_refuse(const struct kes_selfcheck *check)
{
	if (check->wrong_frame) {
		pr_err_ratelimited("self-check failed at GFN %#llx of process %d: %s; this VM is refused\n",
				   check->wrong_gfn, check->kvm->userspace_pid, check->wrong);
	} else {
		pr_err("self-check failed at GFN %#llx: %s; this kernel's KVM is not laid out as known, all VMs are refused\n",
		       check->wrong_gfn, check->wrong);
		WRITE_ONCE(selfcheck_state, STATE_FAILED);
	}
	return -EUCLEAN;
}

/*
 * Checks the kernel on @kvm, unless that was done. -EUCLEAN: it is not the one
 * that this module knows, or has not shown on any VM to be. -EINTR: the caller is
 * being killed. May sleep.
 */
int kes_selfcheck(struct kvm *kvm, const struct kes_entry_format *format)
{
	struct kes_selfcheck check = { .kvm = kvm, .format = format, .tries = TRIES };
	int compared = 0;

	if (likely(READ_ONCE(selfcheck_state) == STATE_PASSED))
		return 0;
	if (mutex_lock_killable(&selfcheck_lock))
		return -EINTR;
	if (selfcheck_state == STATE_PENDING) {
		compared = check_run(&check);
		if (check.wrong)
			compared = check_refuse(&check);
		else if (compared > 0)
			WRITE_ONCE(selfcheck_state, STATE_PASSED);
	}
	mutex_unlock(&selfcheck_lock);
	return READ_ONCE(selfcheck_state) == STATE_FAILED ? -EUCLEAN : min(compared, 0);
}
