/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_SESSION_H
#define KES_SESSION_H

#include <linux/proc_fs.h>

#include "entry.h"

extern struct kes_entry_format kes_format;
extern const struct proc_ops kes_session_ops;

#endif /* KES_SESSION_H */
