// SPDX-License-Identifier: GPL-2.0-only
/*
 * Sampling: a worker arms leaf entries of the VM (arm.c) at a rate (rate.c), a
 * probe on KVM's tracepoint for faults turns each into a record, a reader takes
 * the records.
 *
 * Locking, from the outside in: the session's mutex; samplers_lock; SRCU,
 * mmu_lock for read and RCU (kes_arming_begin()); the sampler's spinlock. The
 * probe takes RCU and the spinlock alone. An entry is armed, and its leaf
 * hashed, under the spinlock: a fault on it finds the leaf.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/log2.h>
#include <linux/mutex.h>
#include <linux/random.h>
#include <linux/rculist.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/tracepoint.h>
#include <asm/vmx.h>

#include "compat.h"
#include "leaves.h"
#include "patched.h"
#include "sample.h"
#include "stats.h"
#include "trace.h"
#include "vm.h"

#define RING_DEFAULT	(1U << 14)
/* How often to look whether a VM that can not be sampled now can be again. */
#define IDLE_NS		(100 * NSEC_PER_MSEC)

DECLARE_TRACEPOINT(kvm_page_fault);

/* Samplers that run; the probe is registered as long as there is one. */
static LIST_HEAD(samplers);
static DEFINE_MUTEX(samplers_lock);

/* What kind of access faulted, from the exit qualification or the error code. */
static u8 fault_access(const struct kes_entry_format *format, u64 code, u8 *flags)
{
	bool write, fetch, walk;

	if (format->id == KES_FORMAT_EPT) {
		write = code & EPT_VIOLATION_ACC_WRITE;
		fetch = code & EPT_VIOLATION_ACC_INSTR;
		walk = (code & EPT_VIOLATION_GVA_IS_VALID) &&
		       !(code & EPT_VIOLATION_GVA_TRANSLATED);
	} else {
		write = code & PFERR_WRITE_MASK;
		fetch = code & PFERR_FETCH_MASK;
		walk = code & PFERR_GUEST_PAGE_MASK;
	}
	*flags = walk ? KES_SAMPLE_WALK : 0;
	/* A read that is also a write counts as what it needs. */
	return write ? KES_ACCESS_WRITE : fetch ? KES_ACCESS_EXEC : KES_ACCESS_READ;
}

/*
 * Records a fault on an armed entry. Whether the reader is to be woken: as a rule
 * the worker does that, so that the guest need not pay for it.
 */
static bool sampler_fault(struct kes_sampler *sampler, u32 vcpu, u64 gfn, u64 code)
{
	struct kes_sample sample = { .gfn = gfn, .vcpu = vcpu };
	struct kes_leaf *leaf = NULL;
	bool wake = false;
	int level;

	sample.access = fault_access(sampler->format, code, &sample.flags);
	spin_lock(&sampler->lock);
	for (level = PG_LEVEL_4K; sampler->armed_count && !leaf && level <= PG_LEVEL_1G; level++)
		leaf = kes_leaf_find(sampler, gfn, level);
	if (leaf) {
		/* Read under the lock: what is armed later is later. */
		sample.time_ns = ktime_get_ns();
		sample.level = leaf->armed.level;
		kes_leaf_free(sampler, leaf);
		kes_rate_fault(&sampler->rate, leaf->armed_ns, sample.time_ns);
		if (!(sample.access & sampler->access))
			sampler->stats.unwanted++;
		else if (gfn < sampler->gfn_end && kes_ring_push(&sampler->ring, &sample))
			sampler->stats.samples++;
		else
			sampler->stats.dropped++;
		wake = kes_ring_unread(&sampler->ring) == sampler->ring.size / 2;
	}
	spin_unlock(&sampler->lock);
	if (leaf)
		trace_kes_sample(sampler->kvm, &sample);
	return wake;
}

/*
 * KVM calls this before it handles a fault. Faults of nested guests and of
 * system management mode are in other address spaces.
 */
static void page_fault_probe(void *unused, struct kvm_vcpu *vcpu, u64 gpa, u64 code)
{
	struct kes_sampler *sampler;

	if (vcpu->arch.mmu != &vcpu->arch.root_mmu ||
	    (vcpu->arch.hflags & (HF_GUEST_MASK | HF_SMM_MASK)))
		return;
	rcu_read_lock();
	list_for_each_entry_rcu(sampler, &samplers, link) {
		if (sampler->kvm != vcpu->kvm)
			continue;
		if (sampler_fault(sampler, vcpu->vcpu_id, gpa >> PAGE_SHIFT, code) &&
		    wq_has_sleeper(&sampler->wait))
			wake_up_interruptible(&sampler->wait);
		break;
	}
	rcu_read_unlock();
}

static int samplers_add(struct kes_sampler *sampler)
{
	struct kes_sampler *other;
	int ret = 0;

	mutex_lock(&samplers_lock);
	list_for_each_entry(other, &samplers, link) {
		if (other->kvm == sampler->kvm) {
			pr_notice_ratelimited("a VM (process %d) is sampled by another session already\n",
					      sampler->kvm->userspace_pid);
			ret = -EBUSY;
		}
	}
	if (!ret && list_empty(&samplers))
		ret = tracepoint_probe_register(&__tracepoint_kvm_page_fault,
						page_fault_probe, NULL);
	if (!ret)
		list_add_rcu(&sampler->link, &samplers);
	if (!ret && kes_patched)
		kes_patched->begin();
	mutex_unlock(&samplers_lock);
	return ret;
}

/* Afterwards no vCPU uses @sampler. */
static void samplers_remove(struct kes_sampler *sampler)
{
	mutex_lock(&samplers_lock);
	list_del_rcu(&sampler->link);
	if (kes_patched)
		kes_patched->end();
	if (list_empty(&samplers)) {
		tracepoint_probe_unregister(&__tracepoint_kvm_page_fault,
					    page_fault_probe, NULL);
		tracepoint_synchronize_unregister();
	}
	mutex_unlock(&samplers_lock);
	synchronize_rcu();
}

/* One round of the worker. Returns for how long to sleep. */
static u64 worker_round(struct kes_sampler *sampler)
{
	u64 armed = sampler->stats.armed, released = sampler->stats.released;
	u64 start_ns = ktime_get_ns(), hold_ns, period_ns;
	u32 want, got;

	if (kes_vm_check(sampler->kvm) || kes_stats_vm_is_closed(sampler->kvm)) {
		WRITE_ONCE(sampler->vm_gone, true);
		wake_up_interruptible(&sampler->wait);
		return IDLE_NS;
	}
	spin_lock(&sampler->lock);
	hold_ns = sampler->rate.hold_ns;
	spin_unlock(&sampler->lock);
	kes_leaves_release(sampler, start_ns - hold_ns);

	spin_lock(&sampler->lock);
	want = kes_rate_want(&sampler->rate, sampler->armed_count, ktime_get_ns());
	period_ns = kes_rate_period_ns(&sampler->rate);
	spin_unlock(&sampler->lock);
	got = kes_leaves_arm(sampler, want, start_ns + period_ns);
	armed = sampler->stats.armed - armed;
	released = sampler->stats.released - released;
	if (armed || released)
		trace_kes_arm_round(sampler->kvm, want, armed, released, hold_ns);

	spin_lock(&sampler->lock);
	kes_rate_armed(&sampler->rate, want, got);
	period_ns = kes_rate_period_ns(&sampler->rate);
	spin_unlock(&sampler->lock);
	if (kes_sampler_readable(sampler))
		wake_up_interruptible(&sampler->wait);
	/* At most half of a CPU. */
	return max(period_ns, ktime_get_ns() - start_ns);
}

static int worker(void *data)
{
	struct kes_sampler *sampler = data;

	while (!kthread_should_stop()) {
		u64 sleep_ns = worker_round(sampler);
		ktime_t timeout = ns_to_ktime(sleep_ns);

		set_current_state(TASK_IDLE);
		if (!kthread_should_stop())
			schedule_hrtimeout_range(&timeout, sleep_ns / 8, HRTIMER_MODE_REL);
		__set_current_state(TASK_RUNNING);
	}
	return 0;
}

static u32 ring_size(const struct kes_sample_set *arg)
{
	return roundup_pow_of_two(arg->ring_records ?: RING_DEFAULT);
}

/* Whether sampling would work; the roots tell what the CPU can do. */
static int sampler_check(const struct kes_sampler *sampler, struct kvm *kvm,
			 const struct kes_sample_set *arg)
{
	const u32 access = KES_ACCESS_READ | KES_ACCESS_WRITE | KES_ACCESS_EXEC;
	struct kes_root roots[KES_MAX_ROOTS];
	int n;

	if (arg->flags || memchr_inv(arg->reserved, 0, sizeof(arg->reserved)) ||
	    (arg->access & ~access) || (arg->freq_hz && !arg->access) ||
	    arg->freq_hz > KES_MAX_FREQ_HZ || arg->ring_records > KES_MAX_RING_RECORDS)
		return -EINVAL;
	if (sampler->running && arg->freq_hz && arg->ring_records &&
	    ring_size(arg) != sampler->ring.size)
		return -EINVAL;
	if (!KES_COMPAT_PROBE_MAY_LOCK) {
		pr_warn_once("no VM is sampled on this kernel: it is one for real time (PREEMPT_RT)\n");
		return -EOPNOTSUPP;
	}
	rcu_read_lock();
	n = kes_vm_roots_for_sampling(kvm, roots);
	rcu_read_unlock();
	return min(n, 0);
}

/* Takes over @leaves, sized for arg->freq_hz. Nothing is armed. */
static void sampler_apply(struct kes_sampler *sampler, struct kes_leaves *leaves,
			  const struct kes_sample_set *arg)
{
	u32 i;

	spin_lock(&sampler->lock);
	INIT_LIST_HEAD(&sampler->free);
	for (i = 0; i < kes_rate_cap(arg->freq_hz); i++)
		list_add(&leaves->leaf[i].list, &sampler->free);
	swap(sampler->leaves, *leaves);
	sampler->access = arg->access;
	kes_rate_set(&sampler->rate, arg->freq_hz, ktime_get_ns());
	spin_unlock(&sampler->lock);
}

/* From now on nothing is armed any more; what is armed stays so. */
static void worker_stop(struct kes_sampler *sampler)
{
	if (sampler->worker)
		kthread_stop(sampler->worker);
	sampler->worker = NULL;
}

/* Enters the list of samplers with an empty ring. */
static int sampler_begin(struct kes_sampler *sampler, struct kvm *kvm,
			 const struct kes_entry_format *format,
			 const struct kes_sample_set *arg)
{
	struct kes_ring ring;
	int ret = kes_ring_create(&ring, ring_size(arg));

	if (ret)
		return ret;
	sampler->kvm = kvm;
	sampler->format = format;
	ret = samplers_add(sampler);
	if (ret) {
		kes_ring_destroy(&ring);
		return ret;
	}
	/* Nothing is armed: no vCPU looks at the ring yet. */
	swap(sampler->ring, ring);
	kes_ring_destroy(&ring);
	kes_account_samples(&sampler->stats);
	WRITE_ONCE(sampler->vm_gone, false);
	WRITE_ONCE(sampler->running, true);
	return 0;
}

/* KES_SAMPLE_SET. */
long kes_sampler_set(struct kes_sampler *sampler, struct kvm *kvm,
		     const struct kes_entry_format *format, const struct kes_sample_set *arg)
{
	struct task_struct *task;
	struct kes_leaves leaves;
	int ret = sampler_check(sampler, kvm, arg);

	if (ret)
		return ret;
	if (!arg->freq_hz) {
		kes_sampler_stop(sampler);
		return 0;
	}
	ret = kes_leaves_create(&leaves, kes_rate_cap(arg->freq_hz));
	if (ret)
		return ret;
	/* All that can fail comes first: a call that fails changes nothing. */
	task = kthread_create(worker, sampler, "kes-sample/%d", kvm->userspace_pid);
	ret = PTR_ERR_OR_ZERO(task);
	if (ret)
		goto destroy_leaves;
	if (sampler->running) {
		worker_stop(sampler);
		kes_leaves_release(sampler, U64_MAX);
	} else {
		ret = sampler_begin(sampler, kvm, format, arg);
		if (ret) {
			kthread_stop(task);
			goto destroy_leaves;
		}
	}
	sampler_apply(sampler, &leaves, arg);
	sampler->worker = task;
	wake_up_process(task);
destroy_leaves:
	kes_leaves_destroy(&leaves);
	return ret;
}

/* Ends sampling; the records stay. Entries that are armed are given back. */
void kes_sampler_stop(struct kes_sampler *sampler)
{
	if (!sampler->running)
		return;
	worker_stop(sampler);
	kes_leaves_release(sampler, U64_MAX);
	samplers_remove(sampler);
	kes_leaves_destroy(&sampler->leaves);
	WRITE_ONCE(sampler->running, false);
	wake_up_interruptible(&sampler->wait);
}

/*
 * The reader has no room for pages from @gfn_end on. Call before sampling begins.
 */
void kes_sampler_limit(struct kes_sampler *sampler, u64 gfn_end)
{
	spin_lock(&sampler->lock);
	sampler->gfn_end = gfn_end;
	spin_unlock(&sampler->lock);
}

/* Ends sampling and forgets the records: the next VM is another one. */
void kes_sampler_reset(struct kes_sampler *sampler)
{
	kes_sampler_stop(sampler);
	kes_ring_destroy(&sampler->ring);
	kes_account_samples(&sampler->stats);
	spin_lock(&sampler->lock);
	memset(&sampler->rate, 0, sizeof(sampler->rate));
	spin_unlock(&sampler->lock);
}

void kes_sampler_init(struct kes_sampler *sampler)
{
	spin_lock_init(&sampler->lock);
	init_waitqueue_head(&sampler->wait);
	INIT_LIST_HEAD(&sampler->armed);
	INIT_LIST_HEAD(&sampler->free);
	sampler->random = get_random_u64();
}

/* KES_SAMPLE_STATS. */
void kes_sampler_stats(struct kes_sampler *sampler, struct kes_sample_stats *stats)
{
	spin_lock(&sampler->lock);
	*stats = sampler->stats;
	stats->armed_now = sampler->armed_count;
	stats->unread = kes_ring_unread(&sampler->ring);
	stats->hold_us = div_u64(sampler->rate.hold_ns, NSEC_PER_USEC);
	stats->freq_hz = READ_ONCE(sampler->running) ? sampler->rate.freq_hz : 0;
	spin_unlock(&sampler->lock);
}

/* Whether a read has something to return, records or an end. Needs no lock. */
bool kes_sampler_readable(const struct kes_sampler *sampler)
{
	return kes_ring_unread(&sampler->ring);
}

bool kes_sampler_ended(const struct kes_sampler *sampler)
{
	return !READ_ONCE(sampler->running) || READ_ONCE(sampler->vm_gone);
}

/* Moves as many records as there are and fit. The session's lock is held. */
ssize_t kes_sampler_read(struct kes_sampler *sampler, char __user *buffer, size_t bytes)
{
	ssize_t done = kes_ring_read(&sampler->ring, buffer, bytes);

	if (done)
		return done;
	if (!sampler->running)
		return -ENODATA;
	return READ_ONCE(sampler->vm_gone) ? -ESRCH : -EAGAIN;
}
