// SPDX-License-Identifier: GPL-2.0-only
/*
 * The session: what an open /proc/kvm_ept_sample holds, and its ioctls.
 */
#include <linux/capability.h>
#include <linux/compat.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "harvest.h"
#include "legacy.h"
#include "patched.h"
#include "process.h"
#include "sample.h"
#include "selfcheck.h"
#include "session.h"
#include "stats.h"
#include "trace.h"
#include "vm.h"

struct kes_session {
	/* Held during each call: one call at a time on one file. */
	struct mutex lock;
	struct kvm *kvm;			/* reference, NULL: not attached */
	struct kes_harvester *harvester;	/* there as long as @kvm is */
	struct kes_sampler sampler;		/* runs only as long as @kvm is there */
	struct kes_account account;		/* open as long as @kvm is there */
	/* INIT of 2019, not KES_ATTACH, was the last to bind: reads are its. */
	bool speaks_2019;
	struct kes_legacy legacy;
};

static bool session_is_2019(const struct kes_session *session)
{
	return session->kvm && session->speaks_2019;
}

/* Binds the session to @kvm, whose reference it takes over, unless it fails. */
static long session_bind(struct kes_session *session, struct kvm *kvm)
{
	long ret = kes_vm_check(kvm);

	if (!ret)
		ret = kes_selfcheck(kvm, &kes_format);
	if (ret)
		goto put_vm;
	session->harvester = kvzalloc(sizeof(*session->harvester), GFP_KERNEL_ACCOUNT);
	if (!session->harvester) {
		ret = -ENOMEM;
		goto put_vm;
	}
	session->kvm = kvm;
	kes_account_open(&session->account, kvm, &session->sampler);
	trace_kes_attach(kvm, 0);
	return 0;

put_vm:
	trace_kes_attach(kvm, ret);
	kes_vm_put(kvm);
	return ret;
}

static long session_attach(struct kes_session *session, const struct kes_attach *arg)
{
	struct kvm *kvm;
	long ret;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (arg->flags || memchr_inv(arg->reserved, 0, sizeof(arg->reserved)))
		return -EINVAL;
	if (session->kvm)
		return -EISCONN;
	kvm = kes_vm_get(arg->vm_fd);
	if (IS_ERR(kvm))
		return PTR_ERR(kvm);
	ret = session_bind(session, kvm);
	if (ret)
		return ret;
	kes_sampler_limit(&session->sampler, U64_MAX);
	WRITE_ONCE(session->speaks_2019, false);
	return 0;
}

/* KES_2019_INIT. @file is the session's, by which the caller got at a procfs. */
static long session_init_2019(struct kes_session *session, const struct file *file, pid_t pid)
{
	struct kvm *kvm;
	long ret;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (session->kvm)
		return -EISCONN;
	kvm = kes_process_vm(file, pid);
	if (IS_ERR(kvm))
		return PTR_ERR(kvm);
	ret = session_bind(session, kvm);
	if (ret)
		return ret;
	kes_sampler_limit(&session->sampler, KES_2019_GFNS);
	kes_legacy_init(&session->legacy);
	WRITE_ONCE(session->speaks_2019, true);
	return 0;
}

static long session_detach(struct kes_session *session)
{
	if (!session->kvm)
		return -ENOTCONN;
	kes_sampler_reset(&session->sampler);
	trace_kes_detach(session->kvm);
	kes_account_close(&session->account);
	kvfree(session->harvester);
	session->harvester = NULL;
	kes_vm_put(session->kvm);
	session->kvm = NULL;
	return 0;
}

static long session_info(struct kes_info __user *user)
{
	struct kes_info info = {
		.abi_version = KES_ABI_VERSION,
		.entry_format = kes_format.id,
		.features = KES_FEATURE_HARVEST | KES_FEATURE_CLEAR_DIRTY |
			    (KES_COMPAT_PROBE_MAY_LOCK ? KES_FEATURE_SAMPLE : 0) |
			    KES_FEATURE_NOTIFIER |
			    (KES_COMPAT_KEEP_YOUNG ? KES_FEATURE_KEEP_YOUNG : 0) |
			    (kes_patched ? KES_FEATURE_PATCHED_KVM : 0),
		.chunk_pages = KES_CHUNK_PAGES,
		.sessions = kes_stats_attached(),
	};

	return copy_to_user(user, &info, sizeof(info)) ? -EFAULT : 0;
}

/* Before and after the work: what a dying VM shows is not the truth. */
static long session_vm_check(const struct kes_session *session)
{
	if (!session->kvm)
		return -ENOTCONN;
	return kes_stats_vm_is_closed(session->kvm) ? -ESRCH : kes_vm_check(session->kvm);
}

/*
 * Takes the argument of a call that answers in it. That the answer can be written
 * is tried before anything is done: a call that is refused changes nothing.
 */
static int argument_take(void *arg, void __user *user, size_t bytes)
{
	if (copy_from_user(arg, user, bytes) || copy_to_user(user, arg, bytes))
		return -EFAULT;
	return 0;
}

/* Before work on the tables: as above, and this kernel must be the known one. */
static long session_tables_check(const struct kes_session *session)
{
	long ret = session_vm_check(session);

	return ret ?: kes_selfcheck(session->kvm, &kes_format);
}

static long session_memslots(struct kes_session *session, struct kes_memslots __user *user)
{
	struct kes_memslots arg;
	long ret = argument_take(&arg, user, sizeof(arg));

	if (ret)
		return ret;
	ret = session_vm_check(session);
	if (!ret)
		ret = kes_vm_memslots(session->kvm, &arg);
	if (!ret && copy_to_user(user, &arg, sizeof(arg)))
		ret = -EFAULT;
	return ret;
}

static long session_harvest(struct kes_session *session, struct kes_harvest __user *user)
{
	struct kes_harvest arg;
	long ret = argument_take(&arg, user, sizeof(arg));

	if (ret)
		return ret;
	if (!session->kvm)
		return -ENOTCONN;
	memset(&arg.stats, 0, sizeof(arg.stats));
	ret = session_tables_check(session);
	if (!ret)
		ret = kes_harvest(session->kvm, &kes_format, session->harvester, &arg);
	if (!ret)
		ret = session_vm_check(session);
	kes_account_harvest(&session->account, &arg, ret);
	trace_kes_harvest(session->kvm, &arg, ret);
	if (!ret && copy_to_user(user, &arg, sizeof(arg)))
		ret = -EFAULT;
	return ret;
}

static long session_sample_set(struct kes_session *session,
			       const struct kes_sample_set __user *user)
{
	struct kes_sample_set arg;
	long ret;

	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	if (!session->kvm)
		return -ENOTCONN;
	ret = session_tables_check(session);
	if (!ret)
		ret = kes_sampler_set(&session->sampler, session->kvm, &kes_format, &arg);
	trace_kes_sample_set(session->kvm, &arg, ret);
	return ret;
}

static long session_sample_stats(struct kes_session *session,
				 struct kes_sample_stats __user *user)
{
	struct kes_sample_stats stats;

	if (!session->kvm)
		return -ENOTCONN;
	kes_sampler_stats(&session->sampler, &stats);
	return copy_to_user(user, &stats, sizeof(stats)) ? -EFAULT : 0;
}

/* The calls of 2019. Their argument is a number, but for GET_MEMSLOTS. */
static long session_call_2019(struct kes_session *session, const struct file *file,
			      unsigned int cmd, unsigned long arg)
{
	long ret;

	if (cmd == KES_2019_INIT)
		return session_init_2019(session, file, arg);
	if (!session_is_2019(session))
		return -ENOTCONN;
	if (cmd == KES_2019_DEINIT)
		return session_detach(session);
	ret = session_tables_check(session);
	if (ret)
		return ret;
	switch (cmd) {
	case KES_2019_SET_PROT:
		return kes_legacy_set_prot(&session->legacy, &session->sampler,
					   session->kvm, arg);
	case KES_2019_SET_FREQ:
		return kes_legacy_set_freq(&session->legacy, &session->sampler,
					   session->kvm, arg);
	default:
		return kes_legacy_memslots(session->kvm, (void __user *)arg);
	}
}

static long session_call(struct kes_session *session, const struct file *file,
			 unsigned int cmd, unsigned long arg)
{
	void __user *user = (void __user *)arg;
	struct kes_attach attach;

	switch (cmd) {
	case KES_GET_INFO:
		return session_info(user);
	case KES_ATTACH:
		if (copy_from_user(&attach, user, sizeof(attach)))
			return -EFAULT;
		return session_attach(session, &attach);
	case KES_DETACH:
		return session_is_2019(session) ? -EBUSY : session_detach(session);
	case KES_GET_MEMSLOTS:
		return session_memslots(session, user);
	case KES_HARVEST:
		return session_harvest(session, user);
	case KES_SAMPLE_SET:
		return session_is_2019(session) ? -EBUSY : session_sample_set(session, user);
	case KES_SAMPLE_STATS:
		return session_sample_stats(session, user);
	case KES_2019_INIT:
	case KES_2019_SET_PROT:
	case KES_2019_SET_FREQ:
	case KES_2019_GET_MEMSLOTS:
	case KES_2019_DEINIT:
		return session_call_2019(session, file, cmd, arg);
	default:
		return -ENOTTY;
	}
}

static long session_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct kes_session *session = file->private_data;
	long ret;

	if (mutex_lock_interruptible(&session->lock))
		return -ERESTARTSYS;
	ret = session_call(session, file, cmd, arg);
	mutex_unlock(&session->lock);
	return ret;
}

#ifdef CONFIG_COMPAT
static long session_compat_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return session_ioctl(file, cmd, (unsigned long)compat_ptr(arg));
}
#endif

/* The session's lock is held. */
static ssize_t session_take(struct kes_session *session, char __user *buffer, size_t bytes)
{
	if (session->speaks_2019)
		return kes_legacy_read(&session->sampler, buffer, bytes);
	if (bytes < sizeof(struct kes_sample))
		return -EINVAL;
	return kes_sampler_read(&session->sampler, buffer, bytes);
}

/* A read that waits for samples lets other calls in meanwhile. */
static ssize_t session_read(struct file *file, char __user *buffer, size_t bytes, loff_t *pos)
{
	struct kes_session *session = file->private_data;
	struct kes_sampler *sampler = &session->sampler;
	ssize_t ret;

	for (;;) {
		if (mutex_lock_interruptible(&session->lock))
			return -ERESTARTSYS;
		ret = session_take(session, buffer, bytes);
		mutex_unlock(&session->lock);
		if (ret != -EAGAIN || (file->f_flags & O_NONBLOCK))
			return ret;
		if (wait_event_interruptible(sampler->wait, kes_sampler_readable(sampler) ||
							    kes_sampler_ended(sampler)))
			return -ERESTARTSYS;
	}
}

static __poll_t session_poll(struct file *file, struct poll_table_struct *table)
{
	struct kes_session *session = file->private_data;
	__poll_t events = 0;

	/* The old reads never wait. */
	if (READ_ONCE(session->speaks_2019))
		return DEFAULT_POLLMASK;
	poll_wait(file, &session->sampler.wait, table);
	if (kes_sampler_readable(&session->sampler))
		events |= EPOLLIN | EPOLLRDNORM;
	if (kes_sampler_ended(&session->sampler))
		events |= EPOLLHUP;
	return events;
}

/*
 * An open file holds a reference to this module, as an open file of procfs alone
 * does not: a VM may be observed through it, and whoever polls it stays in the
 * session's wait queue until the file is closed.
 */
static int session_open(struct inode *inode, struct file *file)
{
	struct kes_session *session;

	if (!try_module_get(THIS_MODULE))
		return -ENODEV;
	session = kzalloc(sizeof(*session), GFP_KERNEL_ACCOUNT);
	if (!session) {
		module_put(THIS_MODULE);
		return -ENOMEM;
	}
	kes_stats_opened();
	mutex_init(&session->lock);
	kes_sampler_init(&session->sampler);
	file->private_data = session;
	/* No position: reads on one file need not wait for each other. */
	return stream_open(inode, file);
}

static int session_release(struct inode *inode, struct file *file)
{
	struct kes_session *session = file->private_data;

	session_detach(session);
	mutex_destroy(&session->lock);
	kfree(session);
	kes_stats_closed();
	/* Procfs waits for this call to return before it lets the module go. */
	module_put(THIS_MODULE);
	return 0;
}

const struct proc_ops kes_session_ops = {
	.proc_open = session_open,
	.proc_release = session_release,
	.proc_read = session_read,
	.proc_poll = session_poll,
	.proc_ioctl = session_ioctl,
#ifdef CONFIG_COMPAT
	.proc_compat_ioctl = session_compat_ioctl,
#endif
	.proc_lseek = noop_llseek,
};
