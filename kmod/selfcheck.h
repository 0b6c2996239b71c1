/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_SELFCHECK_H
#define KES_SELFCHECK_H

#include <linux/kvm_host.h>

#include "entry.h"

int kes_selfcheck(struct kvm *kvm, const struct kes_entry_format *format);
const char *kes_selfcheck_state(void);

#endif /* KES_SELFCHECK_H */
