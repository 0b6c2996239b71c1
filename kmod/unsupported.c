// SPDX-License-Identifier: GPL-2.0-only
/*
 * All of the module on a kernel whose KVM it does not know. That it builds
 * keeps an upgrade of the kernel from failing; that it does not load, with a
 * reason, keeps anyone from wondering.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <linux/utsname.h>

#include "compat.h"
#include "version.h"

#ifdef KES_KERNEL_KNOWN
#error "this kernel is known: Kbuild's question to compat.h went wrong"
#endif

static int __init kes_init(void)
{
	pr_err("refused: built for Linux %d.%d (running: %s), but it knows the KVM of " KES_KERNELS " only; see docs/KERNELS.md\n",
	       LINUX_VERSION_CODE >> 16, LINUX_VERSION_CODE >> 8 & 0xff, init_utsname()->release);
	return -EOPNOTSUPP;
}

module_init(kes_init);
MODULE_DESCRIPTION(KES_DESCRIPTION);
MODULE_AUTHOR(KES_AUTHOR);
MODULE_LICENSE("GPL");
MODULE_VERSION(KES_VERSION);
