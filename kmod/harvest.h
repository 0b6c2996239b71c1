/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_HARVEST_H
#define KES_HARVEST_H

#include <linux/kvm_host.h>

#include "walk.h"

/* What harvests of one session share; the session's lock guards it. */
struct kes_harvester {
	struct kes_chunk chunk;
	/* Pages of the chunk that KVM is to make old; empty between chunks. */
	u64 old[KES_CHUNK_WORDS];
	bool unflushed;		/* cleared bits since the last flush */
};

long kes_harvest(struct kvm *kvm, const struct kes_entry_format *format,
		 struct kes_harvester *harvester, struct kes_harvest *arg);

#endif /* KES_HARVEST_H */
