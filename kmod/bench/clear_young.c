// SPDX-License-Identifier: GPL-2.0-only
/*
 * For the bench alone, never installed: asks KVM page by page through its MMU
 * notifier whether a page was accessed, and makes it old, as DAMON and idle page
 * tracking do, and counts what that takes in ticks of the time-stamp counter.
 *
 *   finit_module("fd=N gfn=G pages=P") by the process that owns the VM
 *
 * measures once. The answers are in /sys/module/clear_young/parameters. What those
 * two do besides, to find the page and to walk its reverse map, is left out: the
 * comparison is in their favour.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <asm/msr.h>

static int fd;
module_param(fd, int, 0);
MODULE_PARM_DESC(fd, "Descriptor of the VM, of the process that loads this module");
static ulong gfn;
module_param(gfn, ulong, 0);
MODULE_PARM_DESC(gfn, "First page to ask for");
static ulong pages;
module_param(pages, ulong, 0);
MODULE_PARM_DESC(pages, "Number of pages, all in one slot");
static ulong ticks;
module_param(ticks, ulong, 0400);
MODULE_PARM_DESC(ticks, "Result: what it took");
static ulong young;
module_param(young, ulong, 0400);
MODULE_PARM_DESC(young, "Result: how many pages were young");

/* The address of the first page; the VM's only user is the caller. */
static unsigned long first_hva(struct kvm *kvm)
{
	struct kvm_memory_slot *slot;
	unsigned long hva = 0;
	int idx = srcu_read_lock(&kvm->srcu);

	slot = search_memslots(__kvm_memslots(kvm, 0), gfn, false);
	if (slot && pages <= slot->base_gfn + slot->npages - gfn)
		hva = slot->userspace_addr + ((gfn - slot->base_gfn) << PAGE_SHIFT);
	srcu_read_unlock(&kvm->srcu, idx);
	return hva;
}

static int measure(struct kvm *kvm)
{
	struct mmu_notifier *notifier = &kvm->mmu_notifier;
	unsigned long hva = first_hva(kvm), end = hva + (pages << PAGE_SHIFT);

	if (!hva || kvm->mm != current->mm)
		return -EINVAL;
	for (; hva < end; hva += PAGE_SIZE) {
		u64 before = rdtsc_ordered();

		young += !!notifier->ops->clear_young(notifier, kvm->mm, hva, hva + PAGE_SIZE);
		ticks += rdtsc_ordered() - before;
		cond_resched();
	}
	return 0;
}

static int __init clear_young_init(void)
{
	struct file *file = fget(fd);
	int ret = -EBADF;

	if (!file)
		return ret;
	if (!strcmp(file->f_path.dentry->d_name.name, "kvm-vm"))
		ret = measure(file->private_data);
	fput(file);
	return ret;
}

static void __exit clear_young_exit(void)
{
}

module_init(clear_young_init);
module_exit(clear_young_exit);
MODULE_DESCRIPTION("Bench: accessed pages by KVM's MMU notifier, page by page");
MODULE_LICENSE("GPL");
