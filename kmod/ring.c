// SPDX-License-Identifier: GPL-2.0-only
/*
 * The ring of records: vCPUs write into it and never wait, a reader takes them
 * out when it likes. Who comes late finds the ring full, and loses a record.
 */
#include <linux/log2.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/overflow.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "ring.h"

/* An empty ring for @records, rounded up to a power of two. */
int kes_ring_create(struct kes_ring *ring, u32 records)
{
	*ring = (struct kes_ring){ .size = roundup_pow_of_two(records) };
	ring->record = kvcalloc(ring->size, sizeof(*ring->record), GFP_KERNEL_ACCOUNT);
	if (ring->record)
		return 0;
	ring->size = 0;
	return -ENOMEM;
}

void kes_ring_destroy(struct kes_ring *ring)
{
	kvfree(ring->record);
	*ring = (struct kes_ring){};
}

/* Writers: adds a record; false when there is no room for it. */
bool kes_ring_push(struct kes_ring *ring, const struct kes_sample *sample)
{
	/* Acquire: the reader is done with the record that this overwrites. */
	if (ring->head - smp_load_acquire(&ring->tail) == ring->size)
		return false;
	ring->record[ring->head & (ring->size - 1)] = *sample;
	/* Release: the reader sees whole records. */
	smp_store_release(&ring->head, ring->head + 1);
	return true;
}

/*
 * How many records wait. Needs no lock; exact for the reader, who sees as many
 * whole records from the tail on.
 */
u32 kes_ring_unread(const struct kes_ring *ring)
{
	/* Acquire: pairs with kes_ring_push(). */
	return smp_load_acquire(&ring->head) - READ_ONCE(ring->tail);
}

/*
 * Reader: @from is the first of up to @count records that lie side by side.
 * Returns how many there are; they stay until kes_ring_drop().
 */
u32 kes_ring_peek(const struct kes_ring *ring, u32 count, const struct kes_sample **from)
{
	u32 index = ring->tail & (ring->size - 1);

	*from = &ring->record[index];
	return min3(count, kes_ring_unread(ring), ring->size - index);
}

/* Reader: gives the room of the @count oldest records back to the writers. */
void kes_ring_drop(struct kes_ring *ring, u32 count)
{
	/* Release: pairs with kes_ring_push(). */
	smp_store_release(&ring->tail, ring->tail + count);
}

/*
 * Reader: moves as many whole records to the user's buffer as there are and
 * fit. Returns bytes; -EFAULT when it could move none.
 */
ssize_t kes_ring_read(struct kes_ring *ring, char __user *buffer, size_t bytes)
{
	size_t room = bytes / sizeof(struct kes_sample);
	const struct kes_sample *from;
	ssize_t done = 0;
	u32 some;

	while ((some = kes_ring_peek(ring, min_t(size_t, room, ring->size), &from))) {
		if (copy_to_user(buffer + done, from, array_size(some, sizeof(*from))))
			return done ?: -EFAULT;
		kes_ring_drop(ring, some);
		done += array_size(some, sizeof(*from));
		room -= some;
		if (signal_pending(current))
			break;
	}
	return done;
}
