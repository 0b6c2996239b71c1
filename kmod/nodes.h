/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_NODES_H
#define KES_NODES_H

#include <linux/nodemask.h>
#include <linux/types.h>

/* More, or nodes that lie in between each other, go page by page. */
#define KES_MAX_BOUNDARIES	8

/*
 * A set of NUMA nodes, where that is exact as boundaries in physical memory: at
 * each one, membership changes. So a frame is in the set when it lies below an
 * odd number of them, or the other way round (@others). The usual host, with
 * its slow memory above its DRAM, has one boundary; a set of all nodes has none.
 */
struct kes_nodes {
	nodemask_t mask;
	bool by_page;		/* ask each frame's struct page */
	bool others;
	unsigned int boundaries;
	unsigned int window;	/* see kes_entry_window() */
	u32 boundary[KES_MAX_BOUNDARIES];	/* as seen through it, ascending */
};

void kes_nodes_init(struct kes_nodes *nodes);
bool kes_nodes_has_pfn(const struct kes_nodes *nodes, unsigned long pfn);

#endif /* KES_NODES_H */
