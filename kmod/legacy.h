/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_LEGACY_H
#define KES_LEGACY_H

#include <linux/kvm_host.h>

#include "entry.h"
#include "sample.h"

/* What a session that speaks the interface of 2019 was told. */
struct kes_legacy {
	u32 access;		/* KES_ACCESS_*; 0: none */
	u32 freq_hz;		/* 0: not now */
};

void kes_legacy_init(struct kes_legacy *legacy);
long kes_legacy_set_prot(struct kes_legacy *legacy, struct kes_sampler *sampler,
			 struct kvm *kvm, unsigned long prot);
long kes_legacy_set_freq(struct kes_legacy *legacy, struct kes_sampler *sampler,
			 struct kvm *kvm, unsigned long freq_hz);
long kes_legacy_memslots(struct kvm *kvm, struct kes_2019_memslots __user *user);
ssize_t kes_legacy_read(struct kes_sampler *sampler, char __user *buffer, size_t bytes);

#endif /* KES_LEGACY_H */
