/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KES_TABLE_H
#define KES_TABLE_H

#include "walk.h"

void kes_table_harvest(struct kes_walk *walk, u64 *table, u64 gfn, u64 end);
void kes_huge_harvest(struct kes_walk *walk, u64 *entry, int level, u64 gfn, u64 end);
unsigned int kes_huge_row_harvest(struct kes_walk *walk, u64 *entry, u64 gfn, u64 end);

#endif /* KES_TABLE_H */
