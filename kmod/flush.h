/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_FLUSH_H
#define KES_FLUSH_H

#include <linux/kvm_host.h>

void kes_flush_tlbs(struct kvm *kvm);

#endif /* KES_FLUSH_H */
