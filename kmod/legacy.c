// SPDX-License-Identifier: GPL-2.0-only
/*
 * The interface of 2019, on top of the sampler: what the end of the ABI header
 * describes. The session's lock guards all of it.
 */
#include <linux/compat.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "legacy.h"
#include "session.h"
#include "vm.h"

static_assert(KES_2019_READ == KES_ACCESS_READ);
static_assert(KES_2019_WRITE == KES_ACCESS_WRITE);
static_assert(KES_2019_EXEC == KES_ACCESS_EXEC);

/* Samples on their way to user space: on the stack. */
#define PACKED_SAMPLES	64

/* As INIT leaves it. */
void kes_legacy_init(struct kes_legacy *legacy)
{
	*legacy = (struct kes_legacy){
		.access = KES_ACCESS_READ | KES_ACCESS_WRITE | KES_ACCESS_EXEC,
	};
}

/* Sampling runs while there is both a type of access and a frequency. */
static long legacy_apply(struct kes_legacy *legacy, struct kes_sampler *sampler,
			 struct kvm *kvm, struct kes_legacy wanted)
{
	const struct kes_sample_set arg = {
		.access = wanted.access,
		.freq_hz = wanted.access ? wanted.freq_hz : 0,
	};
	long ret = kes_sampler_set(sampler, kvm, &kes_format, &arg);

	if (!ret)
		*legacy = wanted;
	return ret;
}

/* KES_2019_SET_PROT. */
long kes_legacy_set_prot(struct kes_legacy *legacy, struct kes_sampler *sampler,
			 struct kvm *kvm, unsigned long prot)
{
	struct kes_legacy wanted = *legacy;

	if (prot & ~(unsigned long)(KES_2019_READ | KES_2019_WRITE | KES_2019_EXEC))
		return -EINVAL;
	wanted.access = prot;
	return legacy_apply(legacy, sampler, kvm, wanted);
}

/* KES_2019_SET_FREQ. The old programs know no limit. */
long kes_legacy_set_freq(struct kes_legacy *legacy, struct kes_sampler *sampler,
			 struct kvm *kvm, unsigned long freq_hz)
{
	struct kes_legacy wanted = *legacy;

	wanted.freq_hz = min_t(unsigned long, freq_hz, KES_MAX_FREQ_HZ);
	return legacy_apply(legacy, sampler, kvm, wanted);
}

static long memslots_copy(struct kes_2019_memslot __user *user,
			  const struct kes_memslot *slots, u32 count)
{
	u32 i;

	for (i = 0; i < count; i++) {
		const struct kes_2019_memslot slot = {
			.gpa = slots[i].gfn_start << PAGE_SHIFT,
			.hva = slots[i].hva,
			.page_count = slots[i].page_count,
		};

		if (copy_to_user(&user[i], &slot, sizeof(slot)))
			return -EFAULT;
	}
	return 0;
}

/* KES_2019_GET_MEMSLOTS. Its sizes are those of a 64-bit program. */
long kes_legacy_memslots(struct kvm *kvm, struct kes_2019_memslots __user *user)
{
	struct kes_2019_memslots arg;
	struct kes_memslot *slots;
	u32 capacity, count;
	u64 generation;
	long ret;

	if (in_compat_syscall())
		return -ENOTTY;
	if (copy_from_user(&arg, user, sizeof(arg)))
		return -EFAULT;
	capacity = min_t(size_t, arg.capacity, KVM_USER_MEM_SLOTS);
	/* One more: to ask for none is allowed. */
	slots = kvcalloc(capacity + 1, sizeof(*slots), GFP_KERNEL_ACCOUNT);
	if (!slots)
		return -ENOMEM;
	count = min(capacity, kes_vm_slots(kvm, slots, capacity, &generation));
	ret = memslots_copy((struct kes_2019_memslot __user *)arg.memslots, slots, count);
	kvfree(slots);
	/* Never more than were written: the old programs go through that many. */
	return ret ?: put_user((size_t)count, &user->count);
}

static __le32 sample_pack(const struct kes_sample *sample)
{
	return cpu_to_le32((u32)sample->gfn | (u32)sample->access << KES_2019_XWR_SHIFT);
}

/* Moves as many samples as there are and fit; 0 when there is none. */
ssize_t kes_legacy_read(struct kes_sampler *sampler, char __user *buffer, size_t bytes)
{
	size_t room = bytes / sizeof(__le32);
	__le32 packed[PACKED_SAMPLES];
	const struct kes_sample *from;
	ssize_t done = 0;
	u32 some, i;

	while ((some = kes_ring_peek(&sampler->ring, min_t(size_t, room, PACKED_SAMPLES), &from))) {
		for (i = 0; i < some; i++)
			packed[i] = sample_pack(&from[i]);
		if (copy_to_user(buffer + done, packed, some * sizeof(*packed)))
			return done ?: -EFAULT;
		kes_ring_drop(&sampler->ring, some);
		done += some * sizeof(*packed);
		room -= some;
		if (signal_pending(current))
			break;
	}
	return done;
}
