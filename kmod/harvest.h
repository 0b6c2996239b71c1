/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_HARVEST_H
#define KES_HARVEST_H

#include <linux/kvm_host.h>

#include "entry.h"
#include "uapi/kvm_ept_sample.h"

/*
 * Pages walked in one RCU read section: 128 MiB of guest memory, well under a
 * millisecond of work, and one page per bitmap.
 */
#define KES_CHUNK_PAGES		(1U << 15)
#define KES_CHUNK_WORDS		(KES_CHUNK_PAGES / 64)
/* A range that does not start at 2 MiB touches one unit more. */
#define KES_CHUNK_UNITS		(KES_CHUNK_PAGES / KES_ENTRIES + 1)

/* What one chunk's walk found; bit i stands for the chunk's first GFN + i. */
struct kes_chunk {
	u64 accessed[KES_CHUNK_WORDS];
	u64 dirty[KES_CHUNK_WORDS];
	u64 mapped[KES_CHUNK_WORDS];
	u64 on_nodes[KES_CHUNK_WORDS];
	u8 levels[KES_CHUNK_UNITS];
};

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
