// SPDX-License-Identifier: GPL-2.0-only
/*
 * The process: finding the VM of a process by its pid, for callers that may look
 * into that process.
 *
 * Who may is for the kernel to say: user ids, capabilities, user namespaces,
 * whether the process can be dumped, Yama, SELinux, AppArmor. Its answer,
 * ptrace_may_access(), is exported to modules on no kernel. But it is what
 * decides whether /proc/PID/mem can be opened, so that is tried, on the caller's
 * behalf and in the very procfs that the caller reached this module by.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/err.h>
#include <linux/fdtable.h>
#include <linux/file.h>
#include <linux/pid.h>
#include <linux/proc_fs.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>

#include "process.h"
#include "vm.h"

/* Files looked at in one hold of a descriptor table's lock. */
#define HOLD_FILES	256

/* What a pid stands for at a moment. An exec gives it another memory. */
struct process {
	struct task_struct *task;	/* reference */
	struct mm_struct *mm;		/* reference to its user space */
};

static int process_get(struct process *process, struct pid *pid)
{
	bool kernel_thread;

	process->task = get_pid_task(pid, PIDTYPE_PID);
	if (!process->task)
		return -ESRCH;
	process->mm = get_task_mm(process->task);
	if (process->mm)
		return 0;
	kernel_thread = process->task->flags & PF_KTHREAD;
	put_task_struct(process->task);
	return kernel_thread ? -ENODEV : -ESRCH;
}

static void process_put(struct process *process)
{
	mmput(process->mm);
	put_task_struct(process->task);
}

/*
 * Whether the caller may open @pid's mem: PTRACE_MODE_ATTACH_FSCREDS, and the
 * permissions of the file. @proc_file is the caller's open file of this module.
 */
static int process_check(const struct file *proc_file, struct pid *pid)
{
	struct super_block *procfs = file_inode(proc_file)->i_sb;
	const struct path root = { .mnt = proc_file->f_path.mnt, .dentry = procfs->s_root };
	pid_t number = pid_nr_ns(pid, proc_pid_ns(procfs));
	bool mounted_over;
	struct file *mem;
	char name[32];

	if (!number)
		return -ESRCH;
	snprintf(name, sizeof(name), "%d/mem", number);
	mem = file_open_root(&root, name, O_RDONLY | O_LARGEFILE, 0);
	if (IS_ERR(mem))
		return mem == ERR_PTR(-ENOENT) ? -ESRCH : PTR_ERR(mem);
	/* Then it was not the process's own file that let the caller in. */
	mounted_over = mem->f_path.mnt != root.mnt;
	fput(mem);
	return mounted_over ? -EACCES : 0;
}

/* What a walk over a descriptor table looks for, and found. */
struct search {
	const struct mm_struct *mm;	/* the VM's memory must be this */
	struct kvm *kvm;		/* the first one, with a reference */
	unsigned int others;
	unsigned int files;
};

/* Called with the table's lock held. Other than 0 ends the walk: where to go on. */
static int search_file(const void *data, struct file *file, unsigned int fd)
{
	struct search *search = (struct search *)data;
	struct kvm *kvm = kes_vm_of_file(file);

	if (kvm && kvm->mm == search->mm) {
		if (!search->kvm) {
			/* The file is open, so there is a reference to add to. */
			kvm_get_kvm(kvm);
			search->kvm = kvm;
		} else if (kvm != search->kvm) {
			search->others++;
		}
	}
	return ++search->files % HOLD_FILES ? 0 : fd + 1;
}

/* The VM in the descriptor table of @process that runs on its memory. */
static struct kvm *process_search(const struct process *process)
{
	struct search search = { .mm = process->mm };
	int fd = 0;

	do {
		/* Keeps the table: its owner lets go of it under this lock. */
		task_lock(process->task);
		fd = iterate_fd(process->task->files, fd, search_file, &search);
		task_unlock(process->task);
		cond_resched();
	} while (fd);
	if (search.others)
		pr_notice_ratelimited("process %d has %u VMs: its first is observed\n",
				      task_pid_nr(process->task), search.others + 1);
	return search.kvm ?: ERR_PTR(-ENODEV);
}

/*
 * Returns the VM of the process with the caller's number @number for it, or for
 * one of its threads, with a reference that kes_vm_put() gives back.
 *
 *   -ESRCH   there is no such process, or it exits or calls exec
 *   -EACCES  (or what else a security module says) the caller may not trace it
 *   -ENODEV  it has no VM
 */
struct kvm *kes_process_vm(const struct file *proc_file, pid_t number)
{
	struct process before, after;
	struct pid *pid = find_get_pid(number);
	struct kvm *kvm;
	int ret;

	if (!pid)
		return ERR_PTR(-ESRCH);
	ret = process_get(&before, pid);
	if (ret)
		goto put_pid;
	ret = process_check(proc_file, pid);
	if (ret)
		goto put_before;
	ret = process_get(&after, pid);
	if (ret)
		goto put_before;
	/* The same memory before and after: that is what the check was about. */
	kvm = after.mm == before.mm ? process_search(&after) : ERR_PTR(-ESRCH);
	ret = PTR_ERR_OR_ZERO(kvm);
	process_put(&after);
put_before:
	process_put(&before);
put_pid:
	put_pid(pid);
	return ret ? ERR_PTR(ret) : kvm;
}
