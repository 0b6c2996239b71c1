/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_STATS_H
#define KES_STATS_H

#include <linux/kvm_host.h>
#include <linux/list.h>

#include "sample.h"
#include "uapi/kvm_ept_sample.h"

#define KES_STATS_PROC_NAME	KES_PROC_NAME "_stats"

/* What is counted of harvests; stats.c has the names. */
enum kes_count {
	KES_COUNT_HARVESTS,
	KES_COUNT_PARTIAL,
	KES_COUNT_PAGES,
	KES_COUNT_ENTRIES_READ,
	KES_COUNT_ENTRIES_CLEARED,
	KES_COUNT_CHUNKS,
	KES_COUNT_FLUSHES,
	KES_COUNT_TIME_NS,
	KES_COUNT_EFAULT,
	KES_COUNT_ESRCH,
	KES_COUNT_EUCLEAN,
	KES_COUNT_EOPNOTSUPP,
	KES_COUNT_OTHER_ERRORS,
	KES_COUNTS
};

/*
 * What one session did since it was attached. Counts are written under the
 * session's lock alone, so that counting costs nothing, and read at any time;
 * they are added to the host's when the session is detached.
 */
struct kes_account {
	struct list_head link;		/* in the list of accounts, by VM */
	struct kvm *kvm;
	struct kes_sampler *sampler;
	u64 count[KES_COUNTS];
};

int kes_stats_init(void);
void kes_stats_exit(void);

void kes_stats_opened(void);
void kes_stats_closed(void);
unsigned int kes_stats_attached(void);
bool kes_stats_vm_is_closed(const struct kvm *kvm);

void kes_account_open(struct kes_account *account, struct kvm *kvm, struct kes_sampler *sampler);
void kes_account_close(struct kes_account *account);
void kes_account_harvest(struct kes_account *account, const struct kes_harvest *arg, long result);
void kes_account_samples(struct kes_sample_stats *stats);

#endif /* KES_STATS_H */
