// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm_ept_sample: which pages of KVM guests were accessed, from the
 * second-level page tables. uapi/kvm_ept_sample.h is the manual.
 *
 * Mechanism only: the module reports bits and never judges a page.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <asm/cpufeature.h>

#include "arm.h"
#include "patched.h"
#include "session.h"
#include "stats.h"
#include "version.h"

/* Set once at load: a host has one vendor. */
struct kes_entry_format kes_format __ro_after_init;

static int __init kes_init(void)
{
	int ret;

	if (boot_cpu_has(X86_FEATURE_VMX)) {
		kes_format = (struct kes_entry_format)KES_ENTRY_FORMAT_EPT;
	} else if (boot_cpu_has(X86_FEATURE_SVM)) {
		kes_format = (struct kes_entry_format)KES_ENTRY_FORMAT_NPT;
	} else {
		pr_err("this CPU has neither VT-x nor SVM: there are no KVM guests to observe\n");
		return -ENODEV;
	}
	kes_arming_init(&kes_format);
	kes_patched_init();
	ret = kes_stats_init();
	if (ret)
		goto exit_patched;
	if (!proc_create(KES_PROC_NAME, 0600, NULL, &kes_session_ops)) {
		ret = -ENOMEM;
		goto exit_stats;
	}
	return 0;

exit_stats:
	kes_stats_exit();
exit_patched:
	kes_patched_exit();
	return ret;
}

/* Not reached while a session's file is open: it holds a module reference. */
static void __exit kes_exit(void)
{
	remove_proc_entry(KES_PROC_NAME, NULL);
	kes_stats_exit();
	kes_patched_exit();
}

module_init(kes_init);
module_exit(kes_exit);
MODULE_DESCRIPTION(KES_DESCRIPTION);
MODULE_AUTHOR(KES_AUTHOR);
MODULE_LICENSE("GPL");
MODULE_VERSION(KES_VERSION);
