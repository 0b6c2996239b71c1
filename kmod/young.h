/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_YOUNG_H
#define KES_YOUNG_H

#include <linux/kvm_host.h>

#include "entry.h"

/*
 * A range of GFNs and what is known of its pages; bit i of a bitmap stands for
 * gfn_start + i.
 */
struct kes_young {
	struct kvm *kvm;
	const struct kes_entry_format *format;
	u64 gfn_start;
	u64 gfn_end;
	unsigned long *accessed;
	/* Pages whose entries kes_young_clear() is to make old. */
	unsigned long *old;
	u8 *levels;		/* KES_LEVEL_*, one for each 2 MiB that the range touches */
	bool clear;		/* fill in @old */
	u64 asked;		/* pages that KVM was asked about */
};

bool kes_young_shadowed(struct kvm *kvm);
bool kes_young_possible(struct kvm *kvm);
u64 kes_young_find(struct kes_young *young);
u64 kes_young_clear(struct kes_young *young);

#endif /* KES_YOUNG_H */
