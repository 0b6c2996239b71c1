/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_RATE_H
#define KES_RATE_H

#include <linux/time64.h>
#include <linux/types.h>

/* A window of 100 ms, and the bins of about 1 ms that cover it for certain. */
#define KES_RATE_BIN_SHIFT	20
#define KES_RATE_WINDOW_BINS	(100 * NSEC_PER_MSEC / (1 << KES_RATE_BIN_SHIFT) + 2)
#define KES_RATE_BINS		128

struct kes_rate_bin {
	u32 epoch;
	u32 faults;
};

/* How often the guest faults, and how many entries to arm for that. */
struct kes_rate {
	u32 freq_hz;
	u64 updated_ns;
	u64 faults;		/* since the last update */
	s64 owed;		/* faults short of freq_hz, in billionths */
	u32 yield;		/* share of armed entries that fault, of 2^24 */
	u64 hold_ns;		/* for how long an entry stays armed */
	u64 age_ns;		/* for how long it was when it faulted; a mean */
	u64 period_ns;
	struct kes_rate_bin bin[KES_RATE_BINS];
};

void kes_rate_set(struct kes_rate *rate, u32 freq_hz, u64 now_ns);
u32 kes_rate_cap(u32 freq_hz);
void kes_rate_fault(struct kes_rate *rate, u64 armed_ns, u64 now_ns);
void kes_rate_release(struct kes_rate *rate);
u32 kes_rate_want(struct kes_rate *rate, u32 armed, u64 now_ns);
void kes_rate_armed(struct kes_rate *rate, u32 want, u32 got);
u64 kes_rate_period_ns(const struct kes_rate *rate);

#endif /* KES_RATE_H */
