// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which NUMA node a frame lies on.
 *
 * The node stands in the frame's struct page, and reading that costs a cache
 * miss for each page of the guest. On nearly all hosts each node is one span of
 * physical memory that no other node reaches into: then comparisons answer. They say
 * nothing of what is no memory: a device's registers, mapped for the guest.
 */
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/module.h>

#include "entry.h"
#include "nodes.h"

static bool nodes_by_page;
module_param(nodes_by_page, bool, 0644);
MODULE_PARM_DESC(nodes_by_page,
		 "Look up the NUMA node of each frame by itself, even where nodes do not interleave (default: N; for tests)");

/* The node whose memory begins first at or after @pfn, or NUMA_NO_NODE. */
static int node_from(unsigned long pfn)
{
	int nid, found = NUMA_NO_NODE;

	for_each_online_node(nid) {
		if (!node_spanned_pages(nid) || node_start_pfn(nid) < pfn)
			continue;
		if (found == NUMA_NO_NODE || node_start_pfn(nid) < node_start_pfn(found))
			found = nid;
	}
	return found;
}

/* Adds a boundary between two nodes, of which one ends and the other begins. */
static bool boundary_add(struct kes_nodes *nodes, unsigned long end, unsigned long start)
{
	unsigned int shift = 8 * nodes->window;
	u64 boundary = DIV_ROUND_UP_ULL(PFN_PHYS((u64)end), 1ULL << shift);

	if (nodes->boundaries == KES_MAX_BOUNDARIES || boundary << shift > PFN_PHYS((u64)start))
		return false;
	nodes->boundary[nodes->boundaries++] = boundary;
	return true;
}

/*
 * Chooses the window through which entries show all memory there is. With memory
 * encryption a bit of an address may say something else.
 */
static bool window_find(struct kes_nodes *nodes)
{
	u64 end = 0;
	int nid;

	for_each_online_node(nid)
		if (node_spanned_pages(nid))
			end = max(end, PFN_PHYS((u64)node_end_pfn(nid)));
	nodes->window = end <= kes_entry_window_end(1) ? 1 : 2;
	return end <= kes_entry_window_end(nodes->window) &&
	       !(~__PHYSICAL_MASK & PAGE_MASK & (kes_entry_window_end(nodes->window) - 1));
}

/* Whether the set could be told by boundaries; goes over the nodes upwards. */
static bool boundaries_find(struct kes_nodes *nodes)
{
	int nid, other, seen = 0, with_memory = 0;
	bool inside = false;
	unsigned long end = 0;

	nodes->boundaries = 0;
	for_each_online_node(nid)
		with_memory += node_spanned_pages(nid) > 0;
	for (nid = node_from(0); nid != NUMA_NO_NODE; nid = other) {
		bool isset = node_isset(nid, nodes->mask);

		if (seen && isset != inside &&
		    !boundary_add(nodes, end, node_start_pfn(nid)))
			return false;
		inside = isset;
		end = node_end_pfn(nid);
		other = node_from(end);
		seen++;
	}
	/* Above the last boundary a frame is below none of them. */
	nodes->others = inside;
	/* A node that begins within another one was passed over. */
	return seen == with_memory;
}

/*
 * Fills in the boundaries for @nodes->mask. The spans are read without the
 * memory hotplug lock: memory that is added or removed at this very moment may
 * be taken for the other tier's until the next harvest.
 */
void kes_nodes_init(struct kes_nodes *nodes)
{
	nodes->by_page = READ_ONCE(nodes_by_page) || !window_find(nodes) ||
			 !boundaries_find(nodes);
	if (nodes->by_page)
		nodes->boundaries = 0;
}

/* The slow answer, for nodes that interleave. */
bool kes_nodes_has_pfn(const struct kes_nodes *nodes, unsigned long pfn)
{
	return pfn_valid(pfn) && node_isset(page_to_nid(pfn_to_page(pfn)), nodes->mask);
}
