/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_HOLD_H
#define KES_HOLD_H

#include <linux/types.h>

struct seq_file;

/* What a CPU is held for. */
enum kes_hold {
	KES_HOLD_HARVEST,	/* a section of the walk, or handing a chunk over */
	KES_HOLD_SAMPLE,	/* arming and releasing entries, and the flush */
	KES_HOLDS,
};

void kes_hold_count(enum kes_hold hold, u64 begin_ns);
void kes_holds_show(struct seq_file *file);

#endif /* KES_HOLD_H */
