/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_RING_H
#define KES_RING_H

#include <linux/compiler.h>
#include <linux/types.h>

#include "uapi/kvm_ept_sample.h"

/*
 * Records from many writers to one reader, without a lock between the two
 * sides. Writers exclude each other, and so do readers: by the locks that
 * sample.c names. Indices run freely.
 */
struct kes_ring {
	struct kes_sample *record;
	u32 size;		/* a power of two; 0: there is no ring */
	u32 head;		/* written by the writers */
	u32 tail;		/* written by the reader */
};

int kes_ring_create(struct kes_ring *ring, u32 records);
void kes_ring_destroy(struct kes_ring *ring);
bool kes_ring_push(struct kes_ring *ring, const struct kes_sample *sample);
u32 kes_ring_unread(const struct kes_ring *ring);
u32 kes_ring_peek(const struct kes_ring *ring, u32 count, const struct kes_sample **from);
void kes_ring_drop(struct kes_ring *ring, u32 count);
ssize_t kes_ring_read(struct kes_ring *ring, char __user *buffer, size_t bytes);

#endif /* KES_RING_H */
