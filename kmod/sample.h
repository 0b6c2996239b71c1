/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_SAMPLE_H
#define KES_SAMPLE_H

#include <linux/kvm_host.h>
#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

#include "arm.h"
#include "entry.h"
#include "rate.h"
#include "ring.h"
#include "uapi/kvm_ept_sample.h"

/* An armed entry, or room for one. */
struct kes_leaf {
	struct hlist_node hash;
	struct list_head list;	/* of the armed, oldest first, or of the free */
	struct kes_armed armed;
	u64 armed_ns;
};

/* As many leaves as the rate allows to be armed, and their hash by GFN. */
struct kes_leaves {
	struct kes_leaf *leaf;
	struct hlist_head *bucket;
	unsigned int bits;	/* log2 of the number of buckets */
};

/*
 * A session's sampling of its VM. The session's lock guards the calls; what
 * vCPUs, worker and calls share is under @lock.
 */
struct kes_sampler {
	struct list_head link;	/* in the list of samplers, while @running */
	struct kvm *kvm;
	const struct kes_entry_format *format;
	struct task_struct *worker;
	u64 random;		/* the worker's own */
	struct wait_queue_head wait;
	bool running;
	bool vm_gone;

	spinlock_t lock;
	u32 access;		/* KES_ACCESS_* */
	u64 gfn_end;		/* records of pages from here on count as dropped */
	struct kes_leaves leaves;
	struct list_head armed;
	struct list_head free;
	u32 armed_count;
	struct kes_rate rate;
	struct kes_ring ring;
	struct kes_sample_stats stats;
};

void kes_sampler_init(struct kes_sampler *sampler);
long kes_sampler_set(struct kes_sampler *sampler, struct kvm *kvm,
		     const struct kes_entry_format *format, const struct kes_sample_set *arg);
void kes_sampler_limit(struct kes_sampler *sampler, u64 gfn_end);
void kes_sampler_stop(struct kes_sampler *sampler);
void kes_sampler_reset(struct kes_sampler *sampler);
void kes_sampler_stats(struct kes_sampler *sampler, struct kes_sample_stats *stats);
ssize_t kes_sampler_read(struct kes_sampler *sampler, char __user *buffer, size_t bytes);
bool kes_sampler_readable(const struct kes_sampler *sampler);
bool kes_sampler_ended(const struct kes_sampler *sampler);

#endif /* KES_SAMPLE_H */
