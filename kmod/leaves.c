// SPDX-License-Identifier: GPL-2.0-only
/*
 * The leaves of a sampler: entries that are drawn at random and armed, until a vCPU
 * faults on them or their time is over. arm.c knows how an entry is armed; here
 * stands which, how many in one hold of KVM's locks, and what is remembered of them.
 *
 * Locking: see sample.c.
 */
#include <linux/hash.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/log2.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "leaves.h"
#include "sample.h"

/* Entries drawn, and armed or released, in one hold of KVM's locks. */
#define HOLD_TRIES	128
#define HOLD_LEAVES	64
/* Slots gone over to draw them: KVM lists slots by address only. */
#define HOLD_SLOTS	8192
/* Draws for each entry to arm, at most: guests are sparsely mapped. */
#define TRIES_PER_LEAF	2048
/* Draws of entries that are armed already, before that is taken for all. */
#define TAKEN_PER_LEAF	4

static struct hlist_head *leaf_bucket(const struct kes_leaves *leaves, u64 gfn, int level)
{
	return &leaves->bucket[hash_64(gfn << 2 | level, leaves->bits)];
}

/* The armed leaf of @level that maps @gfn, or NULL. */
struct kes_leaf *kes_leaf_find(const struct kes_sampler *sampler, u64 gfn, int level)
{
	struct kes_leaf *leaf;

	gfn = ALIGN_DOWN(gfn, kes_entry_pages(level));
	hlist_for_each_entry(leaf, leaf_bucket(&sampler->leaves, gfn, level), hash)
		if (leaf->armed.gfn == gfn && leaf->armed.level == level)
			return leaf;
	return NULL;
}

void kes_leaf_free(struct kes_sampler *sampler, struct kes_leaf *leaf)
{
	hlist_del_init(&leaf->hash);
	list_move(&leaf->list, &sampler->free);
	sampler->armed_count--;
}

static struct kes_arming sampler_arming(const struct kes_sampler *sampler)
{
	return (struct kes_arming){
		.kvm = sampler->kvm,
		.format = sampler->format,
		.write_only = sampler->access == KES_ACCESS_WRITE,
	};
}

/*
 * Releases armed leaves, oldest first, that were armed before @before_ns: a few.
 * Returns whether there may be more.
 */
static bool leaves_release_some(struct kes_sampler *sampler, u64 before_ns)
{
	struct kes_arming arming = sampler_arming(sampler);
	/* Tables that can not be held any more are not the guest's either. */
	bool held = !kes_arming_begin(&arming), more = true;
	struct kes_leaf *leaf;
	int i;

	for (i = 0; more && i < HOLD_LEAVES; i++) {
		spin_lock(&sampler->lock);
		leaf = list_first_entry_or_null(&sampler->armed, struct kes_leaf, list);
		more = leaf && leaf->armed_ns < before_ns;
		if (more) {
			if (held)
				kes_arming_restore(&arming, &leaf->armed);
			kes_leaf_free(sampler, leaf);
			kes_rate_release(&sampler->rate);
			sampler->stats.released++;
		}
		spin_unlock(&sampler->lock);
	}
	if (held)
		kes_arming_end(&arming);
	return more;
}

void kes_leaves_release(struct kes_sampler *sampler, u64 before_ns)
{
	while (leaves_release_some(sampler, before_ns))
		cond_resched();
}

/* What came of a draw. */
enum leaf_draw {
	DRAW_GONE,
	DRAW_TAKEN,	/* armed before, or not to be armed */
	DRAW_ARMED,
};

/* Arms the leaf of a page that was drawn. */
static enum leaf_draw leaf_arm(struct kes_sampler *sampler, struct kes_arming *arming,
			       const struct kes_draw *draw, u64 now_ns)
{
	enum leaf_draw result = DRAW_TAKEN;
	struct kes_armed armed;
	struct kes_leaf *leaf;
	u64 *entry = kes_arming_find(arming, draw, &armed);

	if (!entry)
		return DRAW_GONE;
	if (!armed.changed)
		return DRAW_TAKEN;
	spin_lock(&sampler->lock);
	leaf = list_first_entry_or_null(&sampler->free, struct kes_leaf, list);
	if (leaf && !kes_leaf_find(sampler, armed.gfn, armed.level) &&
	    kes_arming_revoke(arming, entry, &armed)) {
		leaf->armed = armed;
		leaf->armed_ns = now_ns;
		hlist_add_head(&leaf->hash, leaf_bucket(&sampler->leaves, armed.gfn, armed.level));
		list_move_tail(&leaf->list, &sampler->armed);
		sampler->armed_count++;
		sampler->stats.armed++;
		result = DRAW_ARMED;
	}
	spin_unlock(&sampler->lock);
	return result;
}

/* Arms what was drawn, with one flush. Returns how many leaves. */
static u32 leaves_arm_drawn(struct kes_sampler *sampler, const struct kes_draw *draw,
			    u32 count, s64 *taken)
{
	struct kes_arming arming = sampler_arming(sampler);
	u64 now_ns = ktime_get_ns();
	u32 armed = 0, i;

	if (kes_arming_begin(&arming))
		return 0;
	for (i = 0; i < count && *taken > 0; i++) {
		enum leaf_draw result = leaf_arm(sampler, &arming, &draw[i], now_ns);

		armed += result == DRAW_ARMED;
		*taken -= result == DRAW_TAKEN;
	}
	spin_lock(&sampler->lock);
	sampler->stats.flushes += arming.flush;
	spin_unlock(&sampler->lock);
	kes_arming_end(&arming);
	return armed;
}

/* Draws up to @count mapped pages, in a few tries. Returns how many. */
static u32 leaves_draw(struct kes_sampler *sampler, struct kes_draw *draw, u32 count,
		       s64 *tries)
{
	struct kes_arming arming = sampler_arming(sampler);
	u32 found = 0, most, i;

	if (kes_arming_look(&arming)) {
		*tries = 0;
		return 0;
	}
	most = clamp_t(u32, HOLD_SLOTS / max(arming.slot_count, 1U), 1, HOLD_TRIES);
	for (i = 0; i < most && found < count; i++)
		found += kes_arming_draw(&arming, &sampler->random, &draw[found]);
	kes_arming_end(&arming);
	*tries -= i;
	return found;
}

/*
 * Arms up to @want leaves until @end_ns. Fewer, if that many are not found soon
 * or nearly all are armed. Returns how many. They are drawn without mmu_lock,
 * so that it is held only for what there is to arm.
 */
u32 kes_leaves_arm(struct kes_sampler *sampler, u32 want, u64 end_ns)
{
	s64 tries = (s64)want * TRIES_PER_LEAF + HOLD_TRIES;
	s64 taken = (s64)want * TAKEN_PER_LEAF + HOLD_LEAVES;
	struct kes_draw draw[HOLD_LEAVES];
	u32 left = want;

	while (left && tries > 0 && taken > 0 && ktime_get_ns() < end_ns) {
		u32 count = min_t(u32, left, HOLD_LEAVES), found = 0;

		while (found < count && tries > 0 && ktime_get_ns() < end_ns) {
			found += leaves_draw(sampler, draw + found, count - found, &tries);
			cond_resched();
		}
		left -= leaves_arm_drawn(sampler, draw, found, &taken);
		cond_resched();
	}
	return want - left;
}

void kes_leaves_destroy(struct kes_leaves *leaves)
{
	kvfree(leaves->leaf);
	kvfree(leaves->bucket);
	*leaves = (struct kes_leaves){};
}

int kes_leaves_create(struct kes_leaves *leaves, u32 count)
{
	leaves->bits = order_base_2(count);
	leaves->leaf = kvcalloc(count, sizeof(*leaves->leaf), GFP_KERNEL_ACCOUNT);
	leaves->bucket = kvcalloc(1UL << leaves->bits, sizeof(*leaves->bucket),
				  GFP_KERNEL_ACCOUNT);
	if (leaves->leaf && leaves->bucket)
		return 0;
	kes_leaves_destroy(leaves);
	return -ENOMEM;
}
