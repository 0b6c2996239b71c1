/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What modinfo says. The version is the one of the whole project: a test
 * compares it with Cargo.toml and dkms.conf.
 */
#ifndef KES_VERSION_H
#define KES_VERSION_H

#define KES_VERSION	"0.1.0"
#define KES_AUTHOR	"The ept-virt authors"
#define KES_DESCRIPTION	"Accessed and dirty pages of KVM guests from EPT and NPT"

#endif /* KES_VERSION_H */
