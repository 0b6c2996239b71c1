/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_LEAVES_H
#define KES_LEAVES_H

#include <linux/types.h>

struct kes_leaf;
struct kes_leaves;
struct kes_sampler;

int kes_leaves_create(struct kes_leaves *leaves, u32 count);
void kes_leaves_destroy(struct kes_leaves *leaves);
u32 kes_leaves_arm(struct kes_sampler *sampler, u32 want, u64 end_ns);
void kes_leaves_release(struct kes_sampler *sampler, u64 before_ns);

/* With the sampler's lock held: */
struct kes_leaf *kes_leaf_find(const struct kes_sampler *sampler, u64 gfn, int level);
void kes_leaf_free(struct kes_sampler *sampler, struct kes_leaf *leaf);

#endif /* KES_LEAVES_H */
