/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_WALK_H
#define KES_WALK_H

#include <linux/kvm_host.h>

#include "entry.h"
#include "gather.h"
#include "nodes.h"
#include "uapi/kvm_ept_sample.h"

/* Pages whose bits are collected before they are handed over: a page a bitmap. */
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

/* The walk of one chunk. */
struct kes_walk {
	struct kvm *kvm;
	struct kes_chunk *chunk;
	u64 *old;		/* see struct kes_harvester */
	struct kes_harvest_stats *stats;
	const struct kes_entry_format *format;
	struct kes_gather gather;	/* its format: that of the root in hand */
	struct kes_nodes nodes;
	bool clear_asked;	/* accessed bits are to be cleared ... */
	bool clear_accessed;	/* ... in the entries of the root in hand */
	bool clear_later;	/* ... by KVM, after the walk */
	bool clear_dirty_asked;	/* dirty bits are to be cleared ... */
	bool clear_dirty;	/* ... in the entries of the root in hand */
	bool keep_young;	/* for the host, pages stay young that become old here */
	bool tell_host;		/* clearing in the root in hand takes mmu_lock */
	bool several_roots;	/* a page can be met more than once */
	bool keep_mapped;	/* the chunk's bitmap of mapped pages is needed */
	bool keep_on_nodes;
	bool ask_nodes;		/* what is gathered does not tell them */
	u64 gfn_start;
	u64 gfn_end;
	/* In instructions, roughly: see SECTION_WORK. */
	u32 read_work;		/* for an entry */
	u32 clear_work;		/* more for one in which bits are cleared */
	u32 work;		/* of this section so far */
	u32 table_step;		/* entries of 4 KiB walked at once */
	u64 hold_ns;		/* since when others wait; see hold.c */
};

void kes_walk_init(struct kes_walk *walk);
int kes_walk_chunk(struct kes_walk *walk);

#endif /* KES_WALK_H */
