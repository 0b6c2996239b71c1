// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which NUMA node a frame lies on.
 *
 * The node stands in the frame's struct page, and reading that costs a cache
 * miss for each page of the guest. On nearly all hosts each node is one span of
 * physical memory that no other node reaches into: then two comparisons answer.
 */
#include <linux/mm.h>
#include <linux/module.h>

#include "nodes.h"

static bool nodes_by_page;
module_param(nodes_by_page, bool, 0644);
MODULE_PARM_DESC(nodes_by_page,
		 "Look up the NUMA node of each frame by itself, even where nodes do not interleave (default: N; for tests)");

static bool spans_overlap(int nid, int other)
{
	return node_start_pfn(nid) < node_end_pfn(other) &&
	       node_start_pfn(other) < node_end_pfn(nid);
}

static bool node_interleaves(int nid)
{
	int other;

	for_each_online_node(other)
		if (other != nid && spans_overlap(nid, other))
			return true;
	return false;
}

/*
 * Fills in the ranges for @nodes->mask. The spans are read without the memory
 * hotplug lock: memory that is added or removed at this very moment may be
 * taken for the other tier's until the next harvest.
 */
void kes_nodes_init(struct kes_nodes *nodes)
{
	int nid;

	nodes->ranges = 0;
	nodes->by_page = READ_ONCE(nodes_by_page);
	for_each_online_node(nid) {
		struct kes_range *range;

		if (!node_isset(nid, nodes->mask) || !node_spanned_pages(nid))
			continue;
		if (nodes->ranges == KES_MAX_RANGES || node_interleaves(nid)) {
			nodes->by_page = true;
			return;
		}
		range = &nodes->range[nodes->ranges++];
		range->start = PFN_PHYS(node_start_pfn(nid));
		range->bytes = PFN_PHYS((u64)node_spanned_pages(nid));
	}
}

/* The slow answer, for nodes that interleave. */
bool kes_nodes_has_pfn(const struct kes_nodes *nodes, unsigned long pfn)
{
	return pfn_valid(pfn) && node_isset(page_to_nid(pfn_to_page(pfn)), nodes->mask);
}
