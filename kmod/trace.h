/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The module's tracepoints: /sys/kernel/tracing/events/kvm_ept_sample/. @pid is
 * the thread that created the VM, in the host's first PID namespace, as KVM
 * names its debugfs folder. Addresses of the kernel are not shown.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM kvm_ept_sample

#if !defined(KES_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define KES_TRACE_H

#include <linux/kvm_host.h>
#include <linux/tracepoint.h>

#include "uapi/kvm_ept_sample.h"

/* A session was bound to a VM, or was not; @result is 0 or a negative errno. */
TRACE_EVENT(kes_attach,
	TP_PROTO(const struct kvm *kvm, long result),
	TP_ARGS(kvm, result),
	TP_STRUCT__entry(
		__field(pid_t, pid)
		__field(int, result)
	),
	TP_fast_assign(
		__entry->pid = kvm->userspace_pid;
		__entry->result = result;
	),
	TP_printk("pid=%d result=%d", __entry->pid, __entry->result)
);

TRACE_EVENT(kes_detach,
	TP_PROTO(const struct kvm *kvm),
	TP_ARGS(kvm),
	TP_STRUCT__entry(
		__field(pid_t, pid)
	),
	TP_fast_assign(
		__entry->pid = kvm->userspace_pid;
	),
	TP_printk("pid=%d", __entry->pid)
);

/* A KES_HARVEST, at its end. Accessed, dirty and mapped count pages of 4 KiB. */
TRACE_EVENT(kes_harvest,
	TP_PROTO(const struct kvm *kvm, const struct kes_harvest *harvest, long result),
	TP_ARGS(kvm, harvest, result),
	TP_STRUCT__entry(
		__field(pid_t, pid)
		__field(int, result)
		__field(u64, gfn_start)
		__field(u64, gfn_count)
		__field(u64, accessed)
		__field(u64, dirty)
		__field(u64, mapped)
		__field(u64, cleared)
		__field(u64, time_ns)
		__field(u32, flags)
		__field(u32, chunks)
	),
	TP_fast_assign(
		const struct kes_harvest_stats *stats = &harvest->stats;

		__entry->pid = kvm->userspace_pid;
		__entry->result = result;
		__entry->gfn_start = harvest->gfn_start;
		__entry->gfn_count = harvest->gfn_count;
		__entry->accessed = stats->accessed;
		__entry->dirty = stats->dirty;
		__entry->mapped = stats->mapped_4k + stats->mapped_2m + stats->mapped_1g;
		__entry->cleared = stats->entries_cleared;
		__entry->time_ns = stats->time_ns;
		__entry->flags = harvest->flags;
		__entry->chunks = stats->chunks;
	),
	TP_printk("pid=%d gfn=%#llx pages=%llu flags=%#x accessed=%llu dirty=%llu mapped=%llu cleared=%llu chunks=%u ns=%llu result=%d",
		  __entry->pid, __entry->gfn_start, __entry->gfn_count, __entry->flags,
		  __entry->accessed, __entry->dirty, __entry->mapped, __entry->cleared,
		  __entry->chunks, __entry->time_ns, __entry->result)
);

/* One RCU read section of a harvest: GFNs [start, end), and how long it took. */
TRACE_EVENT(kes_chunk,
	TP_PROTO(const struct kvm *kvm, u64 gfn_start, u64 gfn_end, u64 time_ns),
	TP_ARGS(kvm, gfn_start, gfn_end, time_ns),
	TP_STRUCT__entry(
		__field(pid_t, pid)
		__field(u64, gfn_start)
		__field(u64, gfn_end)
		__field(u64, time_ns)
	),
	TP_fast_assign(
		__entry->pid = kvm->userspace_pid;
		__entry->gfn_start = gfn_start;
		__entry->gfn_end = gfn_end;
		__entry->time_ns = time_ns;
	),
	TP_printk("pid=%d gfn=%#llx end=%#llx ns=%llu", __entry->pid,
		  __entry->gfn_start, __entry->gfn_end, __entry->time_ns)
);

/* The TLBs of the whole VM were flushed, for a harvest or for sampling. */
TRACE_EVENT(kes_flush,
	TP_PROTO(const struct kvm *kvm),
	TP_ARGS(kvm),
	TP_STRUCT__entry(
		__field(pid_t, pid)
	),
	TP_fast_assign(
		__entry->pid = kvm->userspace_pid;
	),
	TP_printk("pid=%d", __entry->pid)
);

/* A KES_SAMPLE_SET, at its end. */
TRACE_EVENT(kes_sample_set,
	TP_PROTO(const struct kvm *kvm, const struct kes_sample_set *set, long result),
	TP_ARGS(kvm, set, result),
	TP_STRUCT__entry(
		__field(pid_t, pid)
		__field(u32, access)
		__field(u32, freq_hz)
		__field(int, result)
	),
	TP_fast_assign(
		__entry->pid = kvm->userspace_pid;
		__entry->access = set->access;
		__entry->freq_hz = set->freq_hz;
		__entry->result = result;
	),
	TP_printk("pid=%d access=%#x hz=%u result=%d", __entry->pid,
		  __entry->access, __entry->freq_hz, __entry->result)
);

/* A round of sampling that armed or released entries. */
TRACE_EVENT(kes_arm_round,
	TP_PROTO(const struct kvm *kvm, u32 want, u64 armed, u64 released, u64 hold_ns),
	TP_ARGS(kvm, want, armed, released, hold_ns),
	TP_STRUCT__entry(
		__field(pid_t, pid)
		__field(u32, want)
		__field(u32, armed)
		__field(u32, released)
		__field(u64, hold_ns)
	),
	TP_fast_assign(
		__entry->pid = kvm->userspace_pid;
		__entry->want = want;
		__entry->armed = armed;
		__entry->released = released;
		__entry->hold_ns = hold_ns;
	),
	TP_printk("pid=%d want=%u armed=%u released=%u hold_ns=%llu", __entry->pid,
		  __entry->want, __entry->armed, __entry->released, __entry->hold_ns)
);

/* A fault on an armed entry, also one that was not asked for or is dropped. */
TRACE_EVENT(kes_sample,
	TP_PROTO(const struct kvm *kvm, const struct kes_sample *sample),
	TP_ARGS(kvm, sample),
	TP_STRUCT__entry(
		__field(pid_t, pid)
		__field(u32, vcpu)
		__field(u64, gfn)
		__field(u8, access)
		__field(u8, level)
		__field(u8, flags)
	),
	TP_fast_assign(
		__entry->pid = kvm->userspace_pid;
		__entry->vcpu = sample->vcpu;
		__entry->gfn = sample->gfn;
		__entry->access = sample->access;
		__entry->level = sample->level;
		__entry->flags = sample->flags;
	),
	TP_printk("pid=%d vcpu=%u gfn=%#llx access=%s level=%u flags=%#x", __entry->pid,
		  __entry->vcpu, __entry->gfn,
		  __print_symbolic(__entry->access, { KES_ACCESS_READ, "read" },
				   { KES_ACCESS_WRITE, "write" }, { KES_ACCESS_EXEC, "exec" }),
		  __entry->level, __entry->flags)
);

#endif /* KES_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
