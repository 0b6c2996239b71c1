// SPDX-License-Identifier: GPL-2.0-only
/*
 * Whether this KVM is patched: looked up by name, so that one module loads on both.
 * kvm_patch.h is the header that the patch adds to the kernel.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cache.h>
#include <linux/module.h>
#include <linux/printk.h>

#include "patched.h"

const struct kvm_ept_sample_ops *kes_patched __ro_after_init;

void __init kes_patched_init(void)
{
	kes_patched = symbol_get(kvm_ept_sample_ops);
	if (!kes_patched || kes_patched->version == KVM_EPT_SAMPLE_VERSION)
		return;
	pr_warn("KVM's interface for samplers is version %u, and %u is known: not used\n",
		kes_patched->version, KVM_EPT_SAMPLE_VERSION);
	symbol_put(kvm_ept_sample_ops);
	kes_patched = NULL;
}

void kes_patched_exit(void)
{
	if (kes_patched)
		symbol_put(kvm_ept_sample_ops);
}
