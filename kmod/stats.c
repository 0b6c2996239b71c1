// SPDX-License-Identifier: GPL-2.0-only
/*
 * /proc/kvm_ept_sample_stats: what the module did on this host since it was
 * loaded, for the administrator. Lines of a name and a value; names stay, new
 * ones may come. uapi/kvm_ept_sample.h explains them.
 */
#include <linux/atomic.h>
#include <linux/mutex.h>
#include <linux/pid.h>
#include <linux/proc_fs.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/string.h>

#include "hold.h"
#include "patched.h"
#include "selfcheck.h"
#include "session.h"
#include "stats.h"
#include "version.h"

static const char * const count_names[KES_COUNTS] = {
	[KES_COUNT_HARVESTS] = "harvests",
	[KES_COUNT_PARTIAL] = "harvests_partial",
	[KES_COUNT_PAGES] = "harvest_pages",
	[KES_COUNT_ENTRIES_READ] = "harvest_entries_read",
	[KES_COUNT_ENTRIES_CLEARED] = "harvest_entries_cleared",
	[KES_COUNT_CHUNKS] = "harvest_chunks",
	[KES_COUNT_FLUSHES] = "harvest_flushes",
	[KES_COUNT_TIME_NS] = "harvest_time_ns",
	[KES_COUNT_EFAULT] = "harvest_errors_efault",
	[KES_COUNT_ESRCH] = "harvest_errors_esrch",
	[KES_COUNT_EUCLEAN] = "harvest_errors_euclean",
	[KES_COUNT_EOPNOTSUPP] = "harvest_errors_eopnotsupp",
	[KES_COUNT_OTHER_ERRORS] = "harvest_errors_other",
};

static atomic_t sessions_open = ATOMIC_INIT(0);

/*
 * Under accounts_lock: the attached sessions, those of one VM side by side, and
 * what the detached ones counted. Taken after a session's lock and before a
 * sampler's.
 */
static DEFINE_MUTEX(accounts_lock);
static LIST_HEAD(accounts);
static unsigned int accounts_count;
static u64 past_count[KES_COUNTS];
static struct kes_sample_stats past_samples;

void kes_stats_opened(void)
{
	atomic_inc(&sessions_open);
}

void kes_stats_closed(void)
{
	atomic_dec(&sessions_open);
}

/* How many sessions are attached. */
unsigned int kes_stats_attached(void)
{
	return READ_ONCE(accounts_count);
}

/* The session is attached to @kvm, and stays so until kes_account_close(). */
void kes_account_open(struct kes_account *account, struct kvm *kvm, struct kes_sampler *sampler)
{
	struct list_head *after = &accounts;
	struct kes_account *other;

	*account = (struct kes_account){ .kvm = kvm, .sampler = sampler };
	mutex_lock(&accounts_lock);
	list_for_each_entry(other, &accounts, link) {
		if (other->kvm == kvm) {
			after = &other->link;
			break;
		}
	}
	list_add(&account->link, after);
	WRITE_ONCE(accounts_count, accounts_count + 1);
	mutex_unlock(&accounts_lock);
}

/*
 * Whether the VMM has closed @kvm and all its vCPUs, and goes on without: nobody
 * but attached sessions keeps it.
 */
bool kes_stats_vm_is_closed(const struct kvm *kvm)
{
	struct kes_account *account;
	unsigned int sessions = 0;

	mutex_lock(&accounts_lock);
	list_for_each_entry(account, &accounts, link)
		sessions += account->kvm == kvm;
	mutex_unlock(&accounts_lock);
	return refcount_read(&kvm->users_count) <= sessions;
}

void kes_account_close(struct kes_account *account)
{
	int i;

	mutex_lock(&accounts_lock);
	list_del(&account->link);
	WRITE_ONCE(accounts_count, accounts_count - 1);
	for (i = 0; i < KES_COUNTS; i++)
		past_count[i] += account->count[i];
	mutex_unlock(&accounts_lock);
}

static enum kes_count error_count(long error)
{
	switch (error) {
	case -EFAULT:
		return KES_COUNT_EFAULT;
	case -ESRCH:
		return KES_COUNT_ESRCH;
	case -EUCLEAN:
		return KES_COUNT_EUCLEAN;
	case -EOPNOTSUPP:
		return KES_COUNT_EOPNOTSUPP;
	default:
		return KES_COUNT_OTHER_ERRORS;
	}
}

static void account_add(struct kes_account *account, enum kes_count count, u64 add)
{
	WRITE_ONCE(account->count[count], account->count[count] + add);
}

/* Counts a harvest. The session's lock is held. */
void kes_account_harvest(struct kes_account *account, const struct kes_harvest *arg, long result)
{
	const struct kes_harvest_stats *stats = &arg->stats;

	account_add(account, KES_COUNT_HARVESTS, 1);
	account_add(account, KES_COUNT_ENTRIES_READ, stats->entries_read);
	account_add(account, KES_COUNT_ENTRIES_CLEARED, stats->entries_cleared);
	account_add(account, KES_COUNT_CHUNKS, stats->chunks);
	account_add(account, KES_COUNT_FLUSHES, stats->flushes);
	account_add(account, KES_COUNT_TIME_NS, stats->time_ns);
	if (result) {
		account_add(account, error_count(result), 1);
		return;
	}
	account_add(account, KES_COUNT_PAGES, arg->gfn_next - arg->gfn_start);
	if (arg->gfn_next != arg->gfn_start + arg->gfn_count)
		account_add(account, KES_COUNT_PARTIAL, 1);
}

static void samples_add(struct kes_sample_stats *sum, const struct kes_sample_stats *add)
{
	sum->samples += add->samples;
	sum->dropped += add->dropped;
	sum->unwanted += add->unwanted;
	sum->armed += add->armed;
	sum->released += add->released;
	sum->flushes += add->flushes;
}

/* Takes over what a sampler counted, and sets it to zero. Nothing is armed. */
void kes_account_samples(struct kes_sample_stats *stats)
{
	mutex_lock(&accounts_lock);
	samples_add(&past_samples, stats);
	memset(stats, 0, sizeof(*stats));
	mutex_unlock(&accounts_lock);
}

/* The VM's process in the reader's PID namespace; 0: gone, or not seen there. */
static pid_t kvm_pid(const struct kvm *kvm)
{
	struct task_struct *task;
	pid_t pid = 0;

	rcu_read_lock();
	task = pid_task(find_pid_ns(kvm->userspace_pid, &init_pid_ns), PIDTYPE_PID);
	/* The number may be another process's by now. */
	if (task && READ_ONCE(task->mm) == kvm->mm)
		pid = task_tgid_vnr(task);
	rcu_read_unlock();
	return pid;
}

static void show_module(struct seq_file *file)
{
	seq_printf(file, "version %s\n", KES_VERSION);
	seq_printf(file, "abi %u.%u\n", KES_ABI_VERSION >> 16, KES_ABI_VERSION & 0xffff);
	seq_printf(file, "format %s\n", kes_format.id == KES_FORMAT_EPT ? "ept" : "npt");
	seq_printf(file, "kvm %s\n", kes_patched ? "patched" : "stock");
	seq_printf(file, "self_check %s\n", kes_selfcheck_state());
}

static void show_sessions(struct seq_file *file)
{
	const struct kvm *last = NULL;
	struct kes_account *account;
	unsigned int vms = 0;

	list_for_each_entry(account, &accounts, link) {
		vms += account->kvm != last;
		last = account->kvm;
	}
	seq_printf(file, "sessions_open %d\n", atomic_read(&sessions_open));
	seq_printf(file, "sessions_attached %u\n", accounts_count);
	seq_printf(file, "vms_attached %u\n", vms);
}

static void show_harvests(struct seq_file *file)
{
	struct kes_account *account;
	int i;

	for (i = 0; i < KES_COUNTS; i++) {
		u64 sum = past_count[i];

		list_for_each_entry(account, &accounts, link)
			sum += READ_ONCE(account->count[i]);
		seq_printf(file, "%s %llu\n", count_names[i], sum);
	}
}

static void show_samples(struct seq_file *file)
{
	struct kes_sample_stats sum = past_samples, now;
	struct kes_account *account;
	unsigned int samplers = 0;
	u64 armed_now = 0;

	list_for_each_entry(account, &accounts, link) {
		kes_sampler_stats(account->sampler, &now);
		samples_add(&sum, &now);
		armed_now += now.armed_now;
		samplers += now.freq_hz > 0;
	}
	seq_printf(file, "samplers %u\n", samplers);
	seq_printf(file, "samples %llu\n", sum.samples);
	seq_printf(file, "samples_dropped %llu\n", sum.dropped);
	seq_printf(file, "samples_unwanted %llu\n", sum.unwanted);
	seq_printf(file, "sample_faults %llu\n", sum.samples + sum.dropped + sum.unwanted);
	seq_printf(file, "sample_armed %llu\n", sum.armed);
	seq_printf(file, "sample_armed_now %llu\n", armed_now);
	seq_printf(file, "sample_released %llu\n", sum.released);
	seq_printf(file, "sample_flushes %llu\n", sum.flushes);
}

static void show_each_session(struct seq_file *file)
{
	struct kes_sample_stats samples;
	struct kes_account *account;

	list_for_each_entry(account, &accounts, link) {
		kes_sampler_stats(account->sampler, &samples);
		seq_printf(file, "session pid=%d harvests=%llu sample_hz=%u\n",
			   kvm_pid(account->kvm),
			   READ_ONCE(account->count[KES_COUNT_HARVESTS]), samples.freq_hz);
	}
}

static int stats_show(struct seq_file *file, void *unused)
{
	show_module(file);
	if (mutex_lock_interruptible(&accounts_lock))
		return -ERESTARTSYS;
	show_sessions(file);
	show_harvests(file);
	show_samples(file);
	kes_holds_show(file);
	show_each_session(file);
	mutex_unlock(&accounts_lock);
	return 0;
}

int kes_stats_init(void)
{
	return proc_create_single(KES_STATS_PROC_NAME, 0400, NULL, stats_show) ? 0 : -ENOMEM;
}

void kes_stats_exit(void)
{
	remove_proc_entry(KES_STATS_PROC_NAME, NULL);
}
