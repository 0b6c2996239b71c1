/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_ARM_H
#define KES_ARM_H

#include <linux/kvm_host.h>

#include "entry.h"
#include "vm.h"

/* A leaf entry without some of its permissions: the next access faults. */
struct kes_armed {
	u64 gfn;	/* first page that the entry maps */
	u64 value;	/* the entry as it was left */
	u64 changed;	/* the bits in which it was another before */
	int level;
};

/* A page of the guest, and a root in which to look for it. */
struct kes_draw {
	u64 gfn;
	u64 root;
};

/* A VM whose tables are held for arming and releasing. */
struct kes_arming {
	struct kvm *kvm;
	const struct kes_entry_format *format;
	bool write_only;	/* revoke writing alone */
	/* From kes_arming_look() or kes_arming_begin() to kes_arming_end(): */
	bool mmu_lock;		/* is held for reading */
	int srcu_idx;
	int roots;
	struct kes_root root[KES_MAX_ROOTS];
	struct kvm_memslots *slots;
	u32 slot_count;		/* of the user's slots */
	u64 slot_pages;		/* of all of them together */
	bool flush;		/* something was armed */
	u64 begin_ns;
};

void kes_arming_init(const struct kes_entry_format *format);
const struct kes_entry_rights *kes_arming_rights(const struct kes_entry_format *format);
int kes_arming_look(struct kes_arming *arming);
int kes_arming_begin(struct kes_arming *arming);
void kes_arming_end(struct kes_arming *arming);
bool kes_arming_draw(const struct kes_arming *arming, u64 *random, struct kes_draw *draw);
u64 *kes_arming_find(const struct kes_arming *arming, const struct kes_draw *draw,
		     struct kes_armed *armed);
bool kes_arming_revoke(struct kes_arming *arming, u64 *entry, struct kes_armed *armed);
void kes_arming_restore(struct kes_arming *arming, const struct kes_armed *armed);

#endif /* KES_ARM_H */
