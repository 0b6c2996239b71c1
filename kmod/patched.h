/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_PATCHED_H
#define KES_PATCHED_H

#include "kvm_patch.h"

/*
 * What KVM itself does for samplers, if it is built with the patch in kernel_patch;
 * otherwise NULL. Set once at load.
 */
extern const struct kvm_ept_sample_ops *kes_patched;

void kes_patched_init(void);
void kes_patched_exit(void);

#endif /* KES_PATCHED_H */
