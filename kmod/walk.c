// SPDX-License-Identifier: GPL-2.0-only
/*
 * The walk: what the second-level tables say of a chunk of guest memory.
 *
 * Locking. The walk runs under RCU alone, for a section of at most about a
 * millisecond: KVM frees tables a grace period after it unlinked them. An entry
 * is changed only by compare and swap from a value that was seen present, so an
 * entry that KVM changes or freezes at the same time is left alone. KVM's own
 * plain stores can at most bring an accessed bit back; that page is reported
 * once more. Clearing bits of which the host is told, of dirty pages or with
 * keep_young, takes mmu_lock for read, for a quarter of a table at a time.
 */
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/sched.h>

#include "compat.h"
#include "hold.h"
#include "table.h"
#include "trace.h"
#include "vm.h"
#include "walk.h"

static const struct kes_entry_format format_tracked = KES_ENTRY_FORMAT_TRACKED;
static const struct kes_entry_format format_blind = KES_ENTRY_FORMAT_BLIND;

/*
 * What an RCU read section may take, in instructions: a millisecond of a CPU that
 * does 50 million of them in a second, less what an interrupt can add. The
 * estimates are from the bench that counts them.
 */
#define SECTION_WORK		30000
#define READ_WORK		7
#define READ_WORK_DIRTY		3
#define READ_WORK_BOUNDARY	3
#define READ_WORK_NODE		30
#define CLEAR_WORK		16
#define CLEAR_WORK_TOLD		115
#define STEP_WORK		20

/* Whether the next step may make the section longer than it should be. */
static bool section_is_full(const struct kes_walk *walk)
{
	return walk->work && walk->work + walk->table_step * (walk->read_work +
		walk->clear_work) > SECTION_WORK;
}

/* What entries of 2 MiB of one table link or map for GFNs from @gfn on. */
static u64 table_2m_walk(struct kes_walk *walk, u64 *table, u64 gfn, u64 end)
{
	end = min(end, ALIGN_DOWN(gfn, kes_entry_pages(PG_LEVEL_1G)) +
		       kes_entry_pages(PG_LEVEL_1G));
	do {
		u64 *entry = &table[kes_entry_index(gfn, PG_LEVEL_2M)];
		unsigned int row = kes_huge_row_harvest(walk, entry, gfn, end);
		u64 value, next;

		if (row) {
			gfn += row * KES_ENTRIES;
			continue;
		}
		value = READ_ONCE(*entry);
		next = min(end, ALIGN_DOWN(gfn, KES_ENTRIES) + KES_ENTRIES);
		walk->stats->entries_read++;
		walk->work += STEP_WORK;
		if ((value & KES_ENTRY_PRESENT) && (value & KES_ENTRY_HUGE)) {
			kes_huge_harvest(walk, entry, PG_LEVEL_2M, gfn, next);
		} else if (value & KES_ENTRY_PRESENT) {
			next = min(next, ALIGN_DOWN(gfn, walk->table_step) + walk->table_step);
			kes_table_harvest(walk, kes_entry_table(value), gfn, next);
		}
		gfn = next;
	} while (gfn < end && !section_is_full(walk));
	return gfn;
}

/*
 * Walks one root from @gfn on, through one table of 2 MiB entries at most, and
 * returns the GFN before which it stopped. It starts at the root each time: no
 * table is remembered for longer.
 */
static u64 root_walk(struct kes_walk *walk, const struct kes_root *root, u64 gfn, u64 end)
{
	u64 *table = root->table;
	int level;

	if (gfn >= kes_entry_pages(root->level + 1))
		return end;
	for (level = root->level; level > PG_LEVEL_2M; level--) {
		u64 *entry = &table[kes_entry_index(gfn, level)];
		u64 value = READ_ONCE(*entry);

		walk->stats->entries_read++;
		walk->work += STEP_WORK;
		if (!(value & KES_ENTRY_PRESENT) || (value & KES_ENTRY_HUGE)) {
			end = min(end, ALIGN_DOWN(gfn, kes_entry_pages(level)) +
				       kes_entry_pages(level));
			if (value & KES_ENTRY_PRESENT)
				kes_huge_harvest(walk, entry, level, gfn, end);
			return end;
		}
		table = kes_entry_table(value);
	}
	return table_2m_walk(walk, table, gfn, end);
}

/*
 * Who did not ask for mapped pages gets them counted right by the bitmap all the
 * same, when there is more than one root.
 */
static void mapped_begin(struct kes_walk *walk)
{
	memset(walk->chunk->mapped, 0, sizeof(walk->chunk->mapped));
	walk->keep_mapped = true;
}

/* How many roots are tracked; -EOPNOTSUPP if they can not tell what is asked. */
static int roots_check(const struct kes_walk *walk, const struct kes_root *roots, int n)
{
	int i, tracked = 0;

	for (i = 0; i < n; i++)
		tracked += roots[i].tracked;
	if (walk->gather.want_dirty && (tracked || !kes_vm_has_tables(walk->kvm)))
		return -EOPNOTSUPP;
	return tracked;
}

/* What the bits of @root mean, and who clears them. */
static void root_select(struct kes_walk *walk, const struct kes_root *root)
{
	bool blind = KES_COMPAT_NESTED_EPT_BLIND && root->guest_mode && !root->tracked &&
		     walk->format->id == KES_FORMAT_EPT;

	walk->gather.format = root->tracked ? &format_tracked :
			      blind ? &format_blind : walk->format;
	walk->clear_accessed = walk->clear_asked && !root->tracked && !blind;
	walk->clear_later = walk->clear_asked && root->tracked;
	walk->clear_dirty = walk->clear_dirty_asked && !blind;
	walk->tell_host = walk->clear_dirty || (walk->clear_accessed && walk->keep_young);
}

static u64 roots_walk(struct kes_walk *walk, const struct kes_root *roots, int n, u64 gfn)
{
	u64 next = walk->gfn_end;
	int i;

	/* Several go together in steps of 2 MiB. */
	if (walk->several_roots)
		next = kes_entry_step_end(gfn, next);
	for (i = 0; i < n; i++) {
		root_select(walk, &roots[i]);
		next = root_walk(walk, &roots[i], gfn, next);
	}
	return next;
}

/*
 * Walks all roots from GFN *@gfn on within one RCU read section, and sets *@gfn
 * to where it stopped. Returns how many of them are tracked.
 */
static int section_walk(struct kes_walk *walk, u64 *gfn)
{
	u64 begin_ns = trace_kes_chunk_enabled() ? ktime_get_ns() : 0, begin = *gfn;
	struct kes_root roots[KES_MAX_ROOTS];
	int n, tracked;

	rcu_read_lock();
	n = kes_vm_roots(walk->kvm, roots);
	tracked = n < 0 ? n : roots_check(walk, roots, n);
	walk->several_roots = n > 1;
	if (walk->several_roots && !walk->keep_mapped)
		mapped_begin(walk);
	walk->work = 0;
	while (tracked >= 0 && *gfn < walk->gfn_end && !section_is_full(walk))
		*gfn = roots_walk(walk, roots, n, *gfn);
	rcu_read_unlock();
	if (begin_ns)
		trace_kes_chunk(walk->kvm, begin, *gfn, ktime_get_ns() - begin_ns);
	if (tracked < 0)
		return tracked;
	walk->stats->roots = max_t(u32, walk->stats->roots, n);
	walk->stats->chunks++;
	if (n)
		walk->stats->sources |= KES_SOURCE_TABLES;
	return tracked;
}

/* Fills in what the estimates are, from what is asked for. */
void kes_walk_init(struct kes_walk *walk)
{
	bool tells;

	walk->gather.want_nodes = walk->nodes.boundaries;
	walk->gather.others = walk->nodes.boundaries == 1 && walk->nodes.others ? ~0ULL : 0;
	walk->gather.window = walk->nodes.window;
	walk->gather.boundary = walk->nodes.boundary[0];
	walk->ask_nodes = walk->keep_on_nodes && walk->nodes.boundaries != 1;
	walk->read_work = READ_WORK + walk->gather.want_dirty * READ_WORK_DIRTY +
			  walk->nodes.boundaries * READ_WORK_BOUNDARY +
			  walk->nodes.by_page * READ_WORK_NODE;
	/* Telling the host of pages takes long. */
	tells = walk->clear_dirty_asked || (walk->clear_asked && walk->keep_young);
	walk->clear_work = tells ? CLEAR_WORK_TOLD : CLEAR_WORK;
	walk->table_step = tells || walk->nodes.by_page ? KES_ENTRIES / 4 : KES_ENTRIES;
}

/*
 * Walks all roots over [walk->gfn_start, walk->gfn_end). Sleeps between sections,
 * not after the last one. Returns how many roots are tracked, the most in one
 * section.
 */
int kes_walk_chunk(struct kes_walk *walk)
{
	u64 gfn = walk->gfn_start;
	int ret, tracked = 0;

	for (;;) {
		walk->hold_ns = ktime_get_ns();
		ret = section_walk(walk, &gfn);
		if (ret < 0)
			return ret;
		tracked = max(tracked, ret);
		if (gfn == walk->gfn_end)
			return tracked;
		kes_hold_count(KES_HOLD_HARVEST, walk->hold_ns);
		cond_resched();
	}
}
