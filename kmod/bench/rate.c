// SPDX-License-Identifier: GPL-2.0-only
/*
 * The controller of the sampling rate, built from the module's own source,
 * with simulated guests in simulated time: it settles within 10 % in 2 seconds
 * and never exceeds its limit, over many guests and seeds.
 *
 *   cc -O2 -Ishim -I.. rate.c ../rate.c -o rate && ./rate [-v]
 *
 * Prints what missed, with -v a line for each kind of guest and rate, and what
 * was seen as a whole; exits with 1 if one missed. The worker and the costs of
 * what it does are a model of sample.c: rates are compared, not times.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rate.h"

#define MSEC		1000000ULL
#define SEC		(1000 * MSEC)
#define MAX_LEAVES	20000
#define MAX_FAULTS	400000
#define SEEDS		3

/* What is simulated: a guest, and the host that the worker runs on. */
struct guest {
	const char *name;
	u32 leaves;		/* mapped */
	u32 hot;		/* of those, accessed at all */
	u64 round_ns;		/* each hot leaf is accessed once in it */
	u32 vcpus;
	u64 fault_ns;		/* what a fault takes a vCPU */
	u32 density;		/* draws that hit a mapped page, of 1000 */
	u64 on_ns, off_ns;	/* runs, then rests; 0: always runs */
	u64 switch_ns;		/* all leaves are hot from then on */
	u64 stop_ns;		/* accesses nothing from then on */
	u64 late_ns;		/* the worker runs up to that much too late */
	u32 max_hz;		/* above that the rate is out of reach; 0: none is */
};

static u64 random_state;

static u64 random_u64(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

static u64 random_below(u64 limit)
{
	return limit ? (random_u64() >> 11) % limit : 0;
}

/* A leaf that is armed, and when it will be accessed. */
struct leaf {
	u64 armed_ns;
	u64 access_ns;
	int armed;
	u32 heap_at;
};

static struct leaf leaf[MAX_LEAVES];
static u32 heap[MAX_LEAVES], heap_count;
/* Armed leaves, oldest first; those that faulted since are skipped. */
static struct { u32 leaf; u64 armed_ns; } queue[1 << 16];
static u32 queue_head, queue_tail;
static u64 fault_ns[MAX_FAULTS];
static u32 faults;
static u64 vcpu_free_ns[16];
static u32 armed_count;
static u64 armed_total, released_total, flushes;

static void heap_set(u32 at, u32 l)
{
	heap[at] = l;
	leaf[l].heap_at = at;
}

static void heap_up(u32 at)
{
	u32 l = heap[at];

	while (at && leaf[heap[(at - 1) / 2]].access_ns > leaf[l].access_ns) {
		heap_set(at, heap[(at - 1) / 2]);
		at = (at - 1) / 2;
	}
	heap_set(at, l);
}

static void heap_down(u32 at)
{
	u32 l = heap[at], child;

	while ((child = 2 * at + 1) < heap_count) {
		if (child + 1 < heap_count &&
		    leaf[heap[child + 1]].access_ns < leaf[heap[child]].access_ns)
			child++;
		if (leaf[heap[child]].access_ns >= leaf[l].access_ns)
			break;
		heap_set(at, heap[child]);
		at = child;
	}
	heap_set(at, l);
}

static void heap_remove(u32 l)
{
	u32 at = leaf[l].heap_at, last = heap[--heap_count];

	if (l == last)
		return;
	heap_set(at, last);
	heap_up(at);
	heap_down(leaf[last].heap_at);
}

/* When the guest, which rests now and then, accesses a leaf armed at @now. */
static u64 access_time(const struct guest *guest, u32 l, u64 now)
{
	u64 cycle = guest->on_ns + guest->off_ns, at = now;

	if (l >= guest->hot && !(guest->switch_ns && now >= guest->switch_ns)) {
		if (!guest->switch_ns)
			return ~0ULL;
		at = guest->switch_ns;
	}
	at += random_below(guest->round_ns);
	if (guest->stop_ns && at >= guest->stop_ns)
		return ~0ULL;
	if (guest->off_ns && at % cycle >= guest->on_ns)
		at = (at / cycle + 1) * cycle + random_below(guest->round_ns);
	return at;
}

static void leaf_disarm(u32 l)
{
	heap_remove(l);
	leaf[l].armed = 0;
	armed_count--;
}

/* All faults up to @now. */
static void guest_run(const struct guest *guest, struct kes_rate *rate, u64 now)
{
	while (heap_count && leaf[heap[0]].access_ns <= now) {
		u32 l = heap[0], v = guest->vcpus ? random_below(guest->vcpus) : 0;
		u64 at = leaf[l].access_ns;

		if (vcpu_free_ns[v] > at) {
			/* The vCPU is busy with another fault. */
			leaf[l].access_ns = vcpu_free_ns[v];
			heap_down(0);
			continue;
		}
		vcpu_free_ns[v] = at + guest->fault_ns;
		leaf_disarm(l);
		kes_rate_fault(rate, leaf[l].armed_ns, at);
		if (faults < MAX_FAULTS)
			fault_ns[faults++] = at;
	}
}

/* One round of the worker; returns when it is over. */
static u64 worker_round(const struct guest *guest, struct kes_rate *rate, u64 now)
{
	u64 before = now - rate->hold_ns;
	u32 want, tries, got = 0, again = 0;
	u64 start = now;

	while (queue_head != queue_tail) {
		u32 l = queue[queue_head & 0xffff].leaf;
		u64 armed_ns = queue[queue_head & 0xffff].armed_ns;

		if (leaf[l].armed && leaf[l].armed_ns == armed_ns) {
			if (armed_ns >= before)
				break;
			leaf_disarm(l);
			kes_rate_release(rate);
			released_total++;
			now += 200;
		}
		queue_head++;
	}
	guest_run(guest, rate, now);
	want = kes_rate_want(rate, armed_count, now);
	tries = want * 2048 + 512;
	while (got < want && tries-- && again < want * 4 + 64 &&
	       now < start + kes_rate_period_ns(rate)) {
		u32 l = random_below(guest->leaves);

		now += 100;
		if (guest->density && random_below(1000) >= guest->density)
			continue;
		again += leaf[l].armed;
		if (leaf[l].armed)
			continue;
		now += 300;
		leaf[l].armed = 1;
		leaf[l].armed_ns = now;
		leaf[l].access_ns = access_time(guest, l, now);
		armed_count++;
		heap[heap_count] = l;
		leaf[l].heap_at = heap_count;
		heap_up(heap_count++);
		queue[queue_tail & 0xffff].leaf = l;
		queue[queue_tail++ & 0xffff].armed_ns = now;
		got++;
		armed_total++;
		if (got % 64 == 0 || got == want) {
			now += 2000;
			flushes++;
		}
		/* The guest runs meanwhile. */
		guest_run(guest, rate, now);
	}
	kes_rate_armed(rate, want, got);
	return now;
}

static u32 most_in_window(void)
{
	u32 most = 0, end = 0;

	for (u32 start = 0; start < faults; start++) {
		while (end < faults && fault_ns[end] < fault_ns[start] + 100 * MSEC)
			end++;
		most = max(most, end - start);
	}
	return most;
}

struct seen {
	double rate_hz;
	u32 most;
	double worker_percent, arms_hz, flushes_hz, rounds_hz;
};

/* The rate is that of what follows the first two seconds: 100 faults or more. */
static struct seen simulate(const struct guest *guest, u32 freq_hz, u64 seed)
{
	static struct kes_rate rate;
	u64 start = 1000 * SEC + seed * 7919, now = start, busy = 0, last = 0, rounds = 0;
	u64 measure_ns = max(SEC, 100 * SEC / freq_hz), end_ns = start + 2 * SEC + measure_ns;
	struct seen seen = {};
	struct guest g = *guest;
	double seconds;

	random_state = 88172645463325252ULL + seed * 0x9e3779b97f4a7c15ULL;
	memset(leaf, 0, sizeof(leaf));
	memset(vcpu_free_ns, 0, sizeof(vcpu_free_ns));
	memset(&rate, 0, sizeof(rate));
	heap_count = queue_head = queue_tail = faults = armed_count = 0;
	armed_total = released_total = flushes = 0;
	if (g.switch_ns)
		g.switch_ns += start;
	if (g.stop_ns)
		g.stop_ns += start;
	kes_rate_set(&rate, freq_hz, now);
	while (now < end_ns) {
		u64 end = worker_round(&g, &rate, now), next;

		busy += end - now;
		rounds++;
		next = end + max(kes_rate_period_ns(&rate), end - now);
		next += random_below((next - end) / 8);
		if (g.late_ns && random_below(20) == 0)
			next += random_below(g.late_ns);
		guest_run(&g, &rate, next);
		now = next;
	}
	for (u32 i = 0; i < faults; i++)
		last += fault_ns[i] >= start + 2 * SEC && fault_ns[i] < end_ns;
	seconds = (double)(end_ns - start) / SEC;
	seen.rate_hz = (double)last * SEC / measure_ns;
	seen.most = most_in_window();
	seen.worker_percent = 100.0 * busy / (end_ns - start);
	seen.arms_hz = armed_total / seconds;
	seen.flushes_hz = flushes / seconds;
	seen.rounds_hz = rounds / seconds;
	return seen;
}

#define GUEST(...) { .fault_ns = 4000, __VA_ARGS__ }

static const struct guest guests[] = {
	GUEST(.name = "all of 16000 in 1 ms", .leaves = 16000, .hot = 16000, .round_ns = MSEC),
	GUEST(.name = "all of 16000 in 100 ms", .leaves = 16000, .hot = 16000,
	      .round_ns = 100 * MSEC),
	GUEST(.name = "all of 16000, 4 vCPUs", .leaves = 16000, .hot = 16000,
	      .round_ns = MSEC, .vcpus = 4),
	GUEST(.name = "200 of 200", .leaves = 200, .hot = 200, .round_ns = 10000),
	GUEST(.name = "20 of 20", .leaves = 20, .hot = 20, .round_ns = 10000),
	GUEST(.name = "5 % of 16000 hot", .leaves = 16000, .hot = 800, .round_ns = 50000,
	      .max_hz = 10000),
	GUEST(.name = "1 % of 16000 hot", .leaves = 16000, .hot = 160, .round_ns = 10000,
	      .max_hz = 1000),
	GUEST(.name = "5 % of 16000 hot, slowly", .leaves = 16000, .hot = 800,
	      .round_ns = 5 * MSEC, .max_hz = 100),
	GUEST(.name = "sparse, 1 of 40 mapped", .leaves = 4000, .hot = 4000,
	      .round_ns = MSEC, .density = 25),
	GUEST(.name = "sparse, 1 of 1000 mapped", .leaves = 4000, .hot = 4000,
	      .round_ns = MSEC, .density = 1, .max_hz = 1000),
	GUEST(.name = "rests half of each 20 ms", .leaves = 16000, .hot = 16000,
	      .round_ns = MSEC, .on_ns = 10 * MSEC, .off_ns = 10 * MSEC),
	GUEST(.name = "cold, all hot after 1 s", .leaves = 16000, .hot = 160,
	      .round_ns = MSEC, .switch_ns = SEC),
	GUEST(.name = "nothing after 500 ms", .leaves = 16000, .hot = 16000, .round_ns = MSEC,
	      .stop_ns = SEC / 2, .max_hz = 1),
	GUEST(.name = "a late worker, 30 ms", .leaves = 16000, .hot = 16000,
	      .round_ns = MSEC, .late_ns = 30 * MSEC),
};

static const u32 rates[] = { 10, 100, 1000, 10000, 50000 };

#define COUNT(a) (sizeof(a) / sizeof(*(a)))

/* The worst of several seeds. Returns whether it kept what is promised. */
static bool check(const struct guest *guest, u32 freq_hz, bool verbose, double *share)
{
	bool reachable = !guest->max_hz || freq_hz <= guest->max_hz, good;
	double low = freq_hz, high = 0;
	u32 cap = kes_rate_cap(freq_hz);
	struct seen worst = {};

	for (u64 seed = 1; seed <= (reachable ? SEEDS : 1); seed++) {
		struct seen seen = simulate(guest, freq_hz, seed);

		low = min(low, seen.rate_hz);
		high = max(high, seen.rate_hz);
		worst.most = max(worst.most, seen.most);
		worst.worker_percent = max(worst.worker_percent, seen.worker_percent);
		worst.arms_hz = max(worst.arms_hz, seen.arms_hz);
		worst.flushes_hz = max(worst.flushes_hz, seen.flushes_hz);
		worst.rounds_hz = max(worst.rounds_hz, seen.rounds_hz);
	}
	*share = max(*share, (double)worst.most / cap);
	good = worst.most <= cap && high <= 1.1 * freq_hz && (!reachable || low >= 0.9 * freq_hz);
	/* A guest that rests costs little. */
	if (guest->stop_ns && worst.arms_hz > 20.0 * freq_hz + 300)
		good = false;
	if (verbose || !good)
		printf("%-25s %5u Hz: %7.1f to %7.1f Hz, %u of %u in 100 ms; per second %.0f armed, %.0f flushes, %.0f rounds, worker %.1f %%%s%s\n",
		       guest->name, freq_hz, low, high, worst.most, cap, worst.arms_hz,
		       worst.flushes_hz, worst.rounds_hz, worst.worker_percent,
		       reachable ? "" : " (out of reach)", good ? "" : " MISSED");
	return good;
}

int main(int argc, char **argv)
{
	bool verbose = argc > 1 && !strcmp(argv[1], "-v");
	u32 missed = 0, reached = 0;
	double share = 0;

	for (size_t g = 0; g < COUNT(guests); g++) {
		for (size_t r = 0; r < COUNT(rates); r++) {
			missed += !check(&guests[g], rates[r], verbose, &share);
			reached += !guests[g].max_hz || rates[r] <= guests[g].max_hz;
		}
	}
	printf("%zu kinds of guests at %zu rates, %u within 10 %% after 2 s with %d seeds each, most in 100 ms %.0f %% of the limit, %u missed\n",
	       COUNT(guests), COUNT(rates), reached, SEEDS, 100 * share, missed);
	return missed != 0;
}
