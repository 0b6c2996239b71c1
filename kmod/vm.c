// SPDX-License-Identifier: GPL-2.0-only
/*
 * The VM: recognising it, holding it, and finding its tables and slots.
 *
 * What of KVM is private and read here is checked at run time before it is
 * used. A check that fails means an unknown kernel: the call is refused.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/file.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/mm.h>
#include <linux/rculist.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "entry.h"
#include "patched.h"
#include "vm.h"

/*
 * The beginning of KVM's private struct kvm_mmu_page (arch/x86/kvm/mmu/
 * mmu_internal.h), which describes one table of a guest's second-level tables.
 */
struct kes_mmu_page {
	struct list_head link;
	struct hlist_node hash_link;
	bool tdp_mmu_page;
	u8 flags[3];
	union kvm_mmu_page_role role;
	gfn_t gfn;
	u64 *spt;
};
static_assert(offsetof(struct kes_mmu_page, tdp_mmu_page) == 32);
static_assert(offsetof(struct kes_mmu_page, role) == 36);
static_assert(offsetof(struct kes_mmu_page, gfn) == 40);
static_assert(offsetof(struct kes_mmu_page, spt) == 48);

/*
 * Any file may be called "kvm-vm"; an anonymous inode gets its name from kernel
 * code only, and that one from KVM only. Newer kernels also say whose it is.
 */
static bool file_is_kvm_vm(struct file *file)
{
	if (file_inode(file)->i_sb->s_magic != ANON_INODE_FS_MAGIC ||
	    strcmp(file->f_path.dentry->d_name.name, "kvm-vm"))
		return false;
#ifdef KES_COMPAT_VM_FILE_OWNER
	return file->f_op->owner && (!strcmp(file->f_op->owner->name, "kvm_intel") ||
				     !strcmp(file->f_op->owner->name, "kvm_amd"));
#else
	return true;
#endif
}

/* The VM behind an open file, which holds a reference to it; NULL if none is. */
struct kvm *kes_vm_of_file(struct file *file)
{
	return file_is_kvm_vm(file) ? file->private_data : NULL;
}

/*
 * Returns the VM behind a descriptor of the caller, with a reference that
 * kes_vm_put() gives back. The reference keeps struct kvm and its vCPUs, not
 * the guest's memory: that goes when the VMM exits.
 */
struct kvm *kes_vm_get(int fd)
{
	struct file *file = fget(fd);
	struct kvm *kvm;

	if (!file)
		return ERR_PTR(-EBADF);
	kvm = kes_vm_of_file(file);
	if (kvm)
		/* The open file has a reference of its own, so there is one to add to. */
		kvm_get_kvm(kvm);
	fput(file);
	return kvm ?: ERR_PTR(-ENODEV);
}

void kes_vm_put(struct kvm *kvm)
{
	kvm_put_kvm(kvm);
}

/* Whether the VM can be observed now; the errors of KES_ATTACH. */
int kes_vm_check(struct kvm *kvm)
{
	/* KVM unmapped everything when the last user of the VMM's memory left. */
	if (!atomic_read(&kvm->mm->mm_users) || READ_ONCE(kvm->vm_dead))
		return -ESRCH;
	if (kvm_arch_has_private_mem(kvm)) {
		pr_warn_once("refused a VM with private memory: its pages can be neither observed nor moved\n");
		return -EACCES;
	}
	return 0;
}

/*
 * Whether KVM maps the guest by tables that can be walked. Otherwise it shadows
 * the guest: kvm.tdp_mmu is off, or EPT or NPT is not in use. KVM initialises
 * the list when it creates a VM for its TDP MMU only.
 */
bool kes_vm_has_tables(struct kvm *kvm)
{
	return READ_ONCE(kvm->arch.tdp_mmu_roots.next);
}

/* Whether @page is laid out as this file says; touches nothing unproved. */
static bool root_is_sane(const struct kes_mmu_page *page)
{
	u64 *table = page->spt;

	return page->tdp_mmu_page && page->role.direct &&
	       (page->role.level == 4 || page->role.level == PT64_ROOT_MAX_LEVEL) &&
	       virt_addr_valid(table) && PAGE_ALIGNED(table) &&
	       page_private(virt_to_page(table)) == (unsigned long)page;
}

static int too_many_roots(void)
{
	pr_err_once("a VM has more than %d roots: refused\n", KES_MAX_ROOTS);
	return -EUCLEAN;
}

/* As KVM tells them, if it is patched. */
static int patched_roots(struct kvm *kvm, struct kes_root roots[KES_MAX_ROOTS])
{
	struct kvm_ept_sample_root root[KES_MAX_ROOTS];
	int n = kes_patched->roots(kvm, root, KES_MAX_ROOTS), i;

	if (n > KES_MAX_ROOTS)
		return too_many_roots();
	for (i = 0; i < n; i++) {
		roots[i].table = root[i].table;
		roots[i].level = root[i].level;
		roots[i].guest_mode = root[i].guest_mode;
		roots[i].tracked = root[i].ad_disabled;
	}
	return n;
}

/*
 * Fills in the roots that vCPUs can be running on, and returns their number:
 * none of a VM without tables. The caller holds rcu_read_lock(): roots and all
 * tables below them are freed a grace period after KVM unlinked them.
 *
 *   -EUCLEAN     unknown layout
 */
int kes_vm_roots(struct kvm *kvm, struct kes_root roots[KES_MAX_ROOTS])
{
	struct kes_mmu_page *page;
	int n = 0;

	if (kes_patched)
		return patched_roots(kvm, roots);
	if (!kes_vm_has_tables(kvm))
		return 0;
	list_for_each_entry_rcu(page, &kvm->arch.tdp_mmu_roots, link) {
		union kvm_mmu_page_role role;

		if (!virt_addr_valid(page) || !root_is_sane(page)) {
			pr_err_once("KVM's tables are not laid out as this module knows them: refused\n");
			return -EUCLEAN;
		}
		role.word = READ_ONCE(page->role.word);
		/* Invalid: on its way out. SMM: another address space. */
		if (role.invalid || role.smm || kes_compat_is_mirror(role))
			continue;
		if (n == KES_MAX_ROOTS)
			return too_many_roots();
		roots[n].table = page->spt;
		roots[n].level = role.level;
		roots[n].guest_mode = role.guest_mode;
		roots[n].tracked = role.ad_disabled;
		n++;
	}
	return n;
}

/*
 * As kes_vm_roots(), for those who take permissions from entries: KVM itself
 * does that where the tables have no accessed bits, and would not know the two
 * apart.
 *
 *   -ENXIO       the VM has no tables to walk
 *   -EOPNOTSUPP  the tables have no accessed bits
 */
int kes_vm_roots_for_sampling(struct kvm *kvm, struct kes_root roots[KES_MAX_ROOTS])
{
	int n = kes_vm_roots(kvm, roots), i;

	if (!kes_vm_has_tables(kvm)) {
		pr_warn_once("a VM whose page tables KVM shadows is not sampled: kvm.tdp_mmu is off, or EPT or NPT is not in use\n");
		return -ENXIO;
	}
	for (i = 0; i < n; i++) {
		if (roots[i].tracked) {
			pr_warn_once("a VM without accessed and dirty bits is not sampled: no EPT A/D, or kvm_intel.eptad=0\n");
			return -EOPNOTSUPP;
		}
	}
	return n;
}

/*
 * Whether @entry is one of tables that KVM shadows, and has an accessed bit. The
 * caller holds mmu_lock, which keeps the table of an entry that KVM told.
 */
bool kes_vm_is_shadow_entry(const u64 *entry)
{
	const struct kes_mmu_page *page;

	if (!virt_addr_valid(entry))
		return false;
	page = (struct kes_mmu_page *)page_private(virt_to_page(entry));
	return virt_addr_valid(page) && !page->tdp_mmu_page &&
	       page->spt == PTR_ALIGN_DOWN(entry, PAGE_SIZE) && !page->role.ad_disabled;
}

/*
 * Whether KVM says that @table is one of @level that maps @gfn; touches nothing
 * unproved. The caller holds rcu_read_lock().
 */
bool kes_vm_table_is(const u64 *table, int level, u64 gfn)
{
	const struct kes_mmu_page *page;

	if (!virt_addr_valid(table) || !PAGE_ALIGNED(table))
		return false;
	page = (const struct kes_mmu_page *)page_private(virt_to_page(table));
	return virt_addr_valid(page) && page->tdp_mmu_page && page->spt == table &&
	       page->role.level == level &&
	       page->gfn == ALIGN_DOWN(gfn, kes_entry_pages(level + 1));
}

static void memslot_fill(struct kes_memslot *out, const struct kvm_memory_slot *slot)
{
	out->gfn_start = slot->base_gfn;
	out->page_count = slot->npages;
	out->hva = slot->userspace_addr;
	out->id = slot->id;
	out->flags = 0;
	if (slot->flags & KVM_MEM_READONLY)
		out->flags |= KES_SLOT_READONLY;
	if (slot->flags & KVM_MEM_LOG_DIRTY_PAGES)
		out->flags |= KES_SLOT_DIRTY_LOG;
}

/*
 * Copies the slots that user space made (address space 0) to @out, in the order
 * of their addresses, as far as @capacity goes. Returns how many there are.
 */
u32 kes_vm_slots(struct kvm *kvm, struct kes_memslot *out, u32 capacity, u64 *generation)
{
	struct kvm_memory_slot *slot;
	struct kvm_memslots *slots;
	struct rb_node *node;
	u32 count = 0;
	int idx;

	idx = srcu_read_lock(&kvm->srcu);
	slots = __kvm_memslots(kvm, 0);
	for_each_user_slot(slot, node, slots) {
		if (count < capacity)
			memslot_fill(&out[count], slot);
		count++;
	}
	*generation = slots->generation & ~KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS;
	srcu_read_unlock(&kvm->srcu, idx);
	return count;
}

/*
 * KES_GET_MEMSLOTS. The slots are copied out after the SRCU section has ended:
 * a caller whose buffer faults slowly must not hold up KVM's memory updates.
 */
long kes_vm_memslots(struct kvm *kvm, struct kes_memslots *arg)
{
	u32 capacity = min_t(u32, arg->capacity, KVM_USER_MEM_SLOTS);
	struct kes_memslot *slots = NULL;
	long ret = 0;

	if (memchr_inv(arg->reserved, 0, sizeof(arg->reserved)))
		return -EINVAL;
	if (capacity) {
		slots = kvcalloc(capacity, sizeof(*slots), GFP_KERNEL_ACCOUNT);
		if (!slots)
			return -ENOMEM;
	}
	arg->count = kes_vm_slots(kvm, slots, capacity, &arg->generation);
	if (arg->count <= capacity &&
	    copy_to_user(u64_to_user_ptr(arg->slots), slots,
			 array_size(arg->count, sizeof(*slots))))
		ret = -EFAULT;
	kvfree(slots);
	return ret;
}
