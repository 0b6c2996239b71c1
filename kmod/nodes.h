/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_NODES_H
#define KES_NODES_H

#include <linux/nodemask.h>
#include <linux/types.h>

/* A few nodes: more, or nodes that lie in between each other, go page by page. */
#define KES_MAX_RANGES	8

struct kes_range {
	u64 start;		/* physical address */
	u64 bytes;
};

/* A set of NUMA nodes, as ranges of physical memory where that is exact. */
struct kes_nodes {
	nodemask_t mask;
	unsigned int ranges;	/* number of @range in use, unless @by_page */
	bool by_page;		/* ask each frame's struct page */
	struct kes_range range[KES_MAX_RANGES];
};

void kes_nodes_init(struct kes_nodes *nodes);
bool kes_nodes_has_pfn(const struct kes_nodes *nodes, unsigned long pfn);

#endif /* KES_NODES_H */
