/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_PROCESS_H
#define KES_PROCESS_H

#include <linux/fs.h>
#include <linux/kvm_host.h>

struct kvm *kes_process_vm(const struct file *proc_file, pid_t number);

#endif /* KES_PROCESS_H */
