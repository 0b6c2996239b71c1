// SPDX-License-Identifier: GPL-2.0-only
/*
 * The rate of sampling: how many entries to arm so that the guest pays for
 * freq_hz faults a second, never for more than twice as many in any 100 ms.
 *
 * The limit is a proof, not a hope. Entries are armed only as long as
 *
 *	armed + faults of the last 100 ms <= cap = 2 * freq_hz / 10.
 *
 * Take any window of 100 ms, and the last time in it that an entry was armed.
 * Faults of the window before that time count in "faults of the last 100 ms";
 * those after it are of entries that were armed then. Together: at most cap.
 */
#include <linux/kernel.h>
#include <linux/math64.h>
#include <linux/minmax.h>

#include "rate.h"

#define YIELD_ONE	(1U << 24)
#define YIELD_MIN	(YIELD_ONE / 1024)
/* Below this the guest rests, and what is armed may as well stay so. */
#define YIELD_REST	(YIELD_ONE / 256)
#define HOLD_MIN_NS	(500 * NSEC_PER_USEC)
#define HOLD_MAX_NS	(100 * NSEC_PER_MSEC)
#define HOLD_START_NS	(20 * NSEC_PER_MSEC)
/* Entries for one round, and so for one flush, where the period allows. */
#define ROUND_LEAVES	64
#define PERIOD_FLOOR_NS	(250 * NSEC_PER_USEC)
#define PERIOD_MIN_NS	(1 * NSEC_PER_MSEC)
#define PERIOD_MAX_NS	(20 * NSEC_PER_MSEC)
/* What was missed longer ago is not made up for. */
#define OWED_MAX_NS	(250 * NSEC_PER_MSEC)

/* The period when there are entries enough. */
static u64 period_usual_ns(u32 freq_hz)
{
	return clamp(ROUND_LEAVES * NSEC_PER_SEC / freq_hz, PERIOD_MIN_NS, PERIOD_MAX_NS);
}

/* A new frequency; what the guest paid until now still counts. */
void kes_rate_set(struct kes_rate *rate, u32 freq_hz, u64 now_ns)
{
	rate->freq_hz = freq_hz;
	rate->updated_ns = now_ns;
	rate->faults = 0;
	rate->owed = 0;
	rate->yield = YIELD_ONE;
	rate->hold_ns = HOLD_START_NS;
	rate->age_ns = 0;
	rate->period_ns = period_usual_ns(freq_hz);
}

/* Most faults in 100 ms, and so the most entries that are ever armed at once. */
u32 kes_rate_cap(u32 freq_hz)
{
	return max(2U, freq_hz / 5);
}

/* An entry that was armed at @armed_ns was accessed. */
void kes_rate_fault(struct kes_rate *rate, u64 armed_ns, u64 now_ns)
{
	u32 epoch = now_ns >> KES_RATE_BIN_SHIFT;
	struct kes_rate_bin *bin = &rate->bin[epoch % KES_RATE_BINS];

	if (bin->epoch != epoch) {
		bin->epoch = epoch;
		bin->faults = 0;
	}
	bin->faults++;
	rate->faults++;
	rate->yield += (YIELD_ONE - rate->yield) / 512;
	rate->age_ns += (s64)(now_ns - armed_ns - rate->age_ns) / 32;
}

/* An armed entry was not accessed, and is not armed any more. */
void kes_rate_release(struct kes_rate *rate)
{
	rate->yield = max(YIELD_MIN, rate->yield - rate->yield / 512);
}

static u32 window_faults(const struct kes_rate *rate, u64 now_ns)
{
	u32 epoch = now_ns >> KES_RATE_BIN_SHIFT, sum = 0, i;

	for (i = 0; i < KES_RATE_WINDOW_BINS; i++) {
		const struct kes_rate_bin *bin = &rate->bin[(epoch - i) % KES_RATE_BINS];

		if (bin->epoch == epoch - i)
			sum += bin->faults;
	}
	return sum;
}

/*
 * For how long entries stay armed. The longer the better, until the limit keeps
 * the rate down: then entries that nobody accesses take the place of others. If
 * accesses come early, most do so within three times their mean age; if they
 * come at any time, that is longer than entries stay now.
 */
static void hold_adapt(struct kes_rate *rate, bool limited)
{
	if (limited && rate->yield >= YIELD_REST && rate->hold_ns > rate->age_ns * 9 / 4)
		rate->hold_ns = max_t(u64, rate->hold_ns * 7 / 8, HOLD_MIN_NS);
	else
		rate->hold_ns = min_t(u64, rate->hold_ns * 33 / 32, HOLD_MAX_NS);
}

/* How many more entries to arm now, with @armed armed. */
u32 kes_rate_want(struct kes_rate *rate, u32 armed, u64 now_ns)
{
	u64 passed_ns = min_t(u64, now_ns - rate->updated_ns, OWED_MAX_NS);
	s64 limit = max_t(s64, (s64)rate->freq_hz * OWED_MAX_NS, NSEC_PER_SEC);
	u32 cap = kes_rate_cap(rate->freq_hz);
	u32 used = armed + window_faults(rate, now_ns);
	u32 room = cap > used ? cap - used : 0;
	u64 faults, want;

	rate->owed += (s64)(rate->freq_hz * passed_ns) - (s64)(rate->faults * NSEC_PER_SEC);
	rate->owed = clamp(rate->owed, -limit, limit);
	rate->faults = 0;
	rate->updated_ns = now_ns;

	/* Until the next update about as much again will be due. */
	passed_ns = min_t(u64, passed_ns, PERIOD_MAX_NS);
	faults = max_t(s64, rate->owed + (s64)(rate->freq_hz * passed_ns), 0);
	want = div_u64(div_u64(faults * 64, NSEC_PER_SEC) * (YIELD_ONE / 64), rate->yield);
	want = want > armed ? want - armed : 0;
	hold_adapt(rate, want && want >= room);
	return min_t(u64, want, room);
}

/*
 * Of @want entries @got were armed. If the guest has mapped few, they are to be
 * armed again soon after they were accessed.
 */
void kes_rate_armed(struct kes_rate *rate, u32 want, u32 got)
{
	if (got < want)
		rate->period_ns = max_t(u64, rate->period_ns * 3 / 4, PERIOD_FLOOR_NS);
	else
		rate->period_ns = min_t(u64, rate->period_ns * 33 / 32,
					period_usual_ns(rate->freq_hz));
}

/* Time until the next update. */
u64 kes_rate_period_ns(const struct kes_rate *rate)
{
	return min_t(u64, rate->hold_ns / 2, rate->period_ns);
}
