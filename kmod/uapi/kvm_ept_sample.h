/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * kvm_ept_sample: which pages of a KVM guest were accessed, as the hardware
 * wrote it into the second-level page tables (EPT on Intel, NPT on AMD), and
 * which kinds of access they see, by sampling.
 *
 * This file is the ABI and its manual.
 *
 * THE FILE
 *
 * /proc/kvm_ept_sample, mode 0600. Every open file is a session of its own and
 * is attached to at most one VM. All state dies with the file, and as long as it
 * is open the module can not be unloaded. No call changes what the guest sees. What
 * a guest pays is what the caller asked for: one TLB flush for a KES_HARVEST_FLUSH,
 * and faults and flushes for KES_SAMPLE_SET. read(2) and poll(2) deliver samples;
 * see KES_SAMPLE_SET. The interface of 2019 lives on the same file; see the end of
 * this one.
 *
 * RULES
 *
 * - All structures have the same layout for 32-bit and 64-bit programs. A
 *   pointer travels as a __u64.
 * - Reserved fields and unknown flag bits must be zero, or the call fails with
 *   EINVAL. They are how later versions grow.
 * - A call that fails has changed nothing, with one exception: a harvest that
 *   fails may have cleared bits of chunks that it handed over before, and one that
 *   ends in EFAULT also of the chunk that it could not hand over.
 * - GFN: guest frame number, guest physical address >> 12. Always 4 KiB units,
 *   whatever size the page is mapped with.
 * - Bitmaps are arrays of native-endian __u64 words; bit (i % 64) of word
 *   (i / 64) stands for GFN gfn_start + i. A harvest overwrites the bits of the
 *   range that it covers, including the unused bits of the last word (zero).
 *
 * STATISTICS
 *
 * /proc/kvm_ept_sample_stats, mode 0400: what the module did on the whole host
 * since it was loaded, in lines of a name, a space and a value. Names keep
 * their meaning; new ones may come. All are counts unless said otherwise.
 *
 *   version, abi, format    of the module (format: ept or npt)
 *   kvm                     stock or patched, as KES_FEATURE_PATCHED_KVM
 *   self_check              pending, passed or failed. Each load compares some
 *                           entries of the first VM that has pages mapped with
 *                           the VMM's page tables; failed refuses all VMs. A
 *                           frame that does not fit refuses only that VM
 *   sessions_open           open files, now
 *   sessions_attached       of them those with a VM, now
 *   vms_attached            different VMs among these, now
 *   harvests                calls of KES_HARVEST, with those that failed
 *   harvests_partial        ended by a signal or by the budget
 *   harvest_pages           pages of the ranges walked
 *   harvest_entries_read, harvest_entries_cleared, harvest_chunks,
 *   harvest_flushes, harvest_time_ns
 *                           sums of kes_harvest_stats
 *   harvest_errors_efault, _esrch, _euclean, _eopnotsupp, _other
 *                           calls that failed, by errno
 *   samplers                sessions that sample, now
 *   samples, samples_dropped, samples_unwanted, sample_armed,
 *   sample_released, sample_flushes
 *                           sums of kes_sample_stats
 *   sample_armed_now        entries that are armed, now
 *   sample_faults           samples, also dropped and unwanted ones
 *
 *   harvest_holds_below_16_us and so on, harvest_holds_longer,
 *   harvest_holds_longest_us, the same of sample_holds
 *                           how often, and for how long, a CPU was held before
 *                           others could run, each in the first line that fits;
 *                           the longest in microseconds
 *
 * Then a line for each attached session: "session pid=P harvests=N sample_hz=F",
 * where P is the VMM's process as the reader's PID namespace numbers it, or 0 if
 * it is not there.
 *
 * Tracepoints stand in /sys/kernel/tracing/events/kvm_ept_sample/.
 *
 * ERRORS OF ALL CALLS
 *
 *   ENOTTY      unknown command: this module is older than the program
 *   EINVAL      a reserved field, a flag or a range is not valid
 *   EFAULT      a pointer is not valid. That a structure can be written to which
 *               the call answers in, having read it, is tried before all else
 *   ENOTCONN    the call needs an attached VM
 *   ESRCH       the VM's process has exited, or closed the VM; what it had can
 *               not be observed
 *   ENOMEM      no memory for the session's buffers
 */
#ifndef _UAPI_KVM_EPT_SAMPLE_H
#define _UAPI_KVM_EPT_SAMPLE_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define KES_PROC_NAME		"kvm_ept_sample"

/*
 * The ABI's version: major in the upper, minor in the lower 16 bits. A new
 * minor only adds; programs check that the major is theirs.
 */
#define KES_ABI_VERSION		0x00010004U

#define KES_IOC_MAGIC		0xE7

/*
 * KES_GET_INFO: what this module is and can do. Needs no VM.
 *
 * @abi_version: KES_ABI_VERSION of the module.
 * @features:    KES_FEATURE_*.
 * @entry_format: KES_FORMAT_EPT or KES_FORMAT_NPT, by the host's CPU.
 * @chunk_pages: pages a harvest walks between two looks at signals; the
 *               granularity of partial results.
 * @sessions:    open files that are attached to a VM now, on the whole host.
 */
#define KES_FEATURE_HARVEST	(1ULL << 0)	/* KES_HARVEST by table walk */
#define KES_FEATURE_CLEAR_DIRTY	(1ULL << 1)	/* KES_HARVEST_CLEAR_DIRTY */
#define KES_FEATURE_SAMPLE	(1ULL << 2)	/* KES_SAMPLE_SET; since 1.1 */
#define KES_FEATURE_NOTIFIER	(1ULL << 3)	/* KES_SOURCE_NOTIFIER; since 1.2 */
#define KES_FEATURE_KEEP_YOUNG	(1ULL << 4)	/* KES_HARVEST_KEEP_YOUNG; since 1.3 */
#define KES_FEATURE_PATCHED_KVM	(1ULL << 5)	/* KVM has the patch that makes samples
						 * cheap; nothing else differs;
						 * since 1.4 */

#define KES_FORMAT_EPT		1
#define KES_FORMAT_NPT		2

struct kes_info {
	__u32 abi_version;
	__u32 entry_format;
	__u64 features;
	__u32 chunk_pages;
	__u32 sessions;
	__u64 reserved[5];
};

/*
 * KES_ATTACH: binds this session to a VM. Needs CAP_SYS_ADMIN.
 *
 * @vm_fd: a descriptor of the caller that refers to a KVM VM ("kvm-vm"), as
 *         pidfd_getfd(2) takes it from the VMM. It may be closed afterwards:
 *         the session holds the VM itself, which does not keep the VMM's
 *         memory or process alive.
 * @flags: must be zero.
 *
 *   EPERM       no CAP_SYS_ADMIN
 *   EBADF       vm_fd is not open
 *   ENODEV      vm_fd is not a KVM VM
 *   EISCONN     this session is attached already
 *   EACCES      the guest has private memory (SNP, TDX and the like)
 *   EUCLEAN     the module's self-check found that it does not know this
 *               kernel; the kernel log says what did not fit. See STATISTICS
 */
struct kes_attach {
	__s32 vm_fd;
	__u32 flags;
	__u64 reserved[3];
};

/*
 * KES_DETACH (no argument): unbinds; ENOTCONN when nothing is attached.
 */

/*
 * KES_GET_MEMSLOTS: the guest's memory as KVM knows it.
 *
 * @slots:    in: pointer to @capacity entries; may be 0 when @capacity is 0.
 * @capacity: in: how many entries fit.
 * @count:    out: how many slots the VM has. When it is above @capacity
 *            nothing is written to @slots and the call succeeds: call again.
 * @generation: out: changes whenever the set of slots changes.
 *
 * Slots of KVM itself (APIC page, TSS, identity map) and of system management
 * mode are left out. The slots are sorted by address.
 */
#define KES_SLOT_READONLY	(1U << 0)	/* KVM_MEM_READONLY: a ROM */
#define KES_SLOT_DIRTY_LOG	(1U << 1)	/* dirty logging is on */

struct kes_memslot {
	__u64 gfn_start;
	__u64 page_count;
	__u64 hva;		/* address of the first byte in the VMM */
	__u32 id;
	__u32 flags;		/* KES_SLOT_* */
};

struct kes_memslots {
	__u64 slots;
	__u32 capacity;
	__u32 count;
	__u64 generation;
	__u64 reserved[2];
};

/*
 * KES_HARVEST: one pass over the second-level tables of a range of GFNs.
 *
 * Most guests are served by reading and clearing the bits in the tables
 * themselves (KES_SOURCE_TABLES). Where those do not tell the truth, KVM is
 * asked as well, by its own MMU notifier (KES_SOURCE_NOTIFIER):
 *
 * - CPUs whose EPT keeps no accessed bits, or kvm_intel.eptad=0. KVM finds out
 *   about accesses by faults. The tables tell which pages were accessed, KVM
 *   clears. Each page costs the guest a fault once it was cleared. No @dirty.
 * - Guests that run guests of their own, by nested paging. KVM shadows the
 *   tables of these; the module reads the shadows' accessed bits where one entry
 *   maps a page, and KVM tells the rest and clears. @accessed and @levels are
 *   complete; the other bitmaps tell what the tables of the guest itself say.
 * - On Intel up to Linux 6.12 nothing tells what nested guests access that run
 *   without nested paging: each page that they have mapped is reported as
 *   accessed, and as dirty if they may write to it, whatever is cleared.
 * - kvm.tdp_mmu=N, or EPT or NPT not in use: KVM shadows the guest itself, and
 *   is asked for each page that is mapped, which costs much more than reading
 *   a table. @mapped and @on_nodes are zero. No @dirty.
 *
 * So a page can be accessed without being mapped: its place must be asked for
 * elsewhere, as by move_pages(2). Memory that the VMM maps twice for the guest
 * may be reported at the one address of both that is asked first.
 *
 * in:
 * @gfn_start, @gfn_count: the range. Any alignment; at most KES_MAX_PAGES.
 *             Holes are allowed: what is not mapped reads as zero.
 * @accessed:  bitmap pointer or 0: the hardware's accessed bit, or KVM's word.
 * @dirty:     bitmap pointer or 0: the hardware's dirty bit.
 * @mapped:    bitmap pointer or 0: the page is mapped for the guest. A page
 *             that is resident in the VMM but that the guest did not touch
 *             since KVM last unmapped it reads as zero.
 * @on_nodes:  bitmap pointer or 0: mapped, and the frame lies on a NUMA node of
 *             @nodes. Says nothing of a frame that is no memory: a device's
 *             registers, mapped for the guest.
 * @levels:    pointer or 0: one byte (KES_LEVEL_*) for each 2 MiB of guest
 *             physical space that the range touches, that is for each value of
 *             gfn >> 9 from gfn_start >> 9 on: the largest mapping found in it.
 *             Within a 2M or 1G mapping one bit of the hardware stands for all
 *             pages, and the bitmaps repeat it; it is cleared when the range
 *             covers the mapping's last page.
 * @nodes:     pointer to a bitmap of NUMA nodes, needed with @on_nodes.
 * @nodes_bits: length of @nodes in bits, at most 1024 (MAX_NUMNODES).
 * @flags:     KES_HARVEST_*.
 *
 * out, also when only part of the range was done:
 * @gfn_next:  first GFN that was not walked; gfn_start + gfn_count when all
 *             was. A signal or @budget_ns ends a harvest early, with success,
 *             after at least one chunk. Call again with the rest.
 * @stats:     what this call did.
 *
 *   EOPNOTSUPP  @dirty or CLEAR_DIRTY is asked for where nothing tells it (see
 *               above); without both the call works. Or KEEP_YOUNG is, and the
 *               kernel can not note it (no KES_FEATURE_KEEP_YOUNG)
 *   EUCLEAN     KVM's structures are not laid out as this module knows them;
 *               nothing was read on a guess. The kernel log says which
 *   EACCES      as for KES_ATTACH, when the VM became private later
 *
 * Page reclaim, and DAMON, find out by the same accessed bits which pages the host
 * can do without. Who clears them and keeps it to himself makes a page that is
 * used now and then look like one that never is: a host that swaps, or demotes by
 * itself, will choose worse. KEEP_YOUNG notes each access for them in struct page.
 * Each entry that is cleared then costs a look at that, and mmu_lock is taken for
 * reading, as for CLEAR_DIRTY.
 */
#define KES_HARVEST_CLEAR_ACCESSED (1U << 0)	/* read and clear accessed */
#define KES_HARVEST_CLEAR_DIRTY	(1U << 1)	/* read and clear dirty; the page
						 * is marked dirty for the host
						 * first, so no data is lost */
#define KES_HARVEST_FLUSH	(1U << 2)	/* one flush of the guest's TLBs at
						 * the end, if this session cleared
						 * bits since its last flush: until
						 * then a cached translation can
						 * hide accesses */
#define KES_HARVEST_KEEP_YOUNG	(1U << 3)	/* tell the host's page reclaim
						 * and idle page tracking of the
						 * accesses whose bits are cleared
						 * in tables; since 1.3 */

#define KES_MAX_PAGES		(1ULL << 34)	/* 64 TiB */

#define KES_LEVEL_NONE		0		/* nothing is mapped here */
#define KES_LEVEL_4K		1
#define KES_LEVEL_2M		2
#define KES_LEVEL_1G		3

#define KES_SOURCE_TABLES	(1U << 0)	/* the tables themselves */
#define KES_SOURCE_NOTIFIER	(1U << 1)	/* KVM's MMU notifier */

/* Counts in pages of 4 KiB unless said otherwise. */
struct kes_harvest_stats {
	__u64 mapped_4k;	/* pages mapped by 4 KiB entries */
	__u64 mapped_2m;	/* pages mapped by 2 MiB entries */
	__u64 mapped_1g;	/* pages mapped by 1 GiB entries */
	__u64 accessed;		/* pages with the accessed bit */
	__u64 dirty;		/* pages with the dirty bit, if asked for */
	__u64 on_nodes;		/* pages on @nodes, if asked for */
	__u64 entries_read;	/* leaf and non-leaf entries looked at, and
				 * pages that KVM was asked about */
	__u64 entries_cleared;	/* entries in which a bit was cleared; by KVM:
				 * pages whose entries it was told to clear */
	__u64 time_ns;		/* spent walking and flushing */
	__u32 roots;		/* root tables walked, the most in one chunk */
	__u32 flushes;		/* TLB flushes of the whole VM */
	__u32 chunks;		/* RCU read sections used, several a chunk */
	__u32 sources;		/* KES_SOURCE_*: who served this call; since 1.2 */
};

struct kes_harvest {
	__u64 gfn_start;
	__u64 gfn_count;
	__u64 accessed;
	__u64 dirty;
	__u64 mapped;
	__u64 on_nodes;
	__u64 levels;
	__u64 nodes;
	__u32 nodes_bits;
	__u32 flags;
	__u64 budget_ns;	/* 0: no limit */
	__u64 gfn_next;
	__u64 reserved[4];
	struct kes_harvest_stats stats;
};

/*
 * KES_SAMPLE_SET: starts, changes or stops sampling. Since ABI 1.1.
 *
 * The module takes away the permissions of a few mapped entries, drawn at
 * random so that each page has the same chance. The next access to one of them
 * faults, is recorded, and gets its permissions back from KVM. An entry that
 * nobody accesses gets them back after a while (at most about 100 ms).
 *
 * @access:    KES_ACCESS_*, or-ed: which accesses to record. KES_ACCESS_WRITE
 *             alone takes away writing only, and reads cost nothing. All other
 *             sets take away everything: then the guest also pays for accesses
 *             that are not recorded.
 * @freq_hz:   faults a second that the guest pays, at most KES_MAX_FREQ_HZ. In
 *             any 100 ms there are at most freq_hz / 5 of them (but two always
 *             may be), also after a pause. An access that several vCPUs do at
 *             the same time counts once, and each of them pays. A guest that
 *             accesses few of its mapped pages, or rarely, pays less; so does
 *             one with few pages mapped in large slots, if to find them would
 *             take more than half of a CPU. 0 stops; then only @flags and
 *             @reserved, and the limits of the others, are looked at.
 * @ring_records: how many records can wait to be read, rounded up to a power
 *             of two, at most KES_MAX_RING_RECORDS. 0: 16384, or as it is.
 *             While sampling runs it can not change.
 * @flags:     must be zero.
 *
 * Access types and frequency may change while sampling runs: records that were
 * not read stay. Starting anew drops them, and sets the statistics to zero. So
 * does KES_DETACH. Stopping keeps them.
 *
 * KVM maps a page that was sampled for reading or executing as writable and
 * dirty where it may be, without the guest having written to it: harvests with
 * @dirty, and dirty logs, see a few pages too many. None too few.
 *
 *   EBUSY       another session samples this VM (there can be one only); the
 *               kernel log says so as well
 *   EOPNOTSUPP  the VM's tables have no accessed bits: KVM itself takes
 *               permissions away there, and the two could not be told apart. Or
 *               the kernel is one for real time, up to 6.12 (PREEMPT_RT)
 *   ENXIO       KVM shadows this VM's page tables (kvm.tdp_mmu=N, or EPT or NPT
 *               not in use): there are no tables to take permissions from
 *   EUCLEAN, EACCES  as for KES_HARVEST
 *
 * SAMPLES
 *
 * read(2) returns as many whole records as there are and fit, one at least. It
 * waits for the first one, unless O_NONBLOCK is set, and up to 20 ms longer: the
 * module wakes readers in batches, or when the ring is half full. Records are in
 * the order of their times. When they are not read soon enough, new ones are lost
 * and counted: a guest never waits for a reader.
 *
 *   EAGAIN      nothing to read now, and O_NONBLOCK is set
 *   EINVAL      the buffer is smaller than a record
 *   ENODATA     nothing to read, and sampling is off
 *   ESRCH       nothing to read, and the VM's process has exited
 *   EINTR       a signal came first
 *
 * poll(2) reports POLLIN when there are records, and POLLHUP when no more will
 * come: sampling is off, or the VM's process has exited.
 *
 * Accesses of nested guests, of system management mode, and by others than the
 * guest's CPUs (the VMM, devices) are not sampled.
 */
#define KES_ACCESS_READ		(1U << 0)
#define KES_ACCESS_WRITE	(1U << 1)	/* also of what is read as well */
#define KES_ACCESS_EXEC		(1U << 2)	/* an instruction was fetched */

#define KES_MAX_FREQ_HZ		50000U
#define KES_MAX_RING_RECORDS	(1U << 20)

struct kes_sample_set {
	__u32 access;
	__u32 freq_hz;
	__u32 ring_records;
	__u32 flags;
	__u64 reserved[3];
};

/*
 * A record.
 *
 * @gfn:     the page, also within a huge mapping.
 * @time_ns: CLOCK_MONOTONIC.
 * @vcpu:    the VMM's number of the vCPU.
 * @access:  one of KES_ACCESS_*.
 * @level:   KES_LEVEL_*: the size of the mapping when it was drawn.
 * @flags:   KES_SAMPLE_*.
 */
#define KES_SAMPLE_WALK		(1U << 0)	/* the CPU walked the guest's own
						 * page tables; with EPT that
						 * counts as a write */

struct kes_sample {
	__u64 gfn;
	__u64 time_ns;
	__u32 vcpu;
	__u8 access;
	__u8 level;
	__u8 flags;
	__u8 reserved;
};

/*
 * KES_SAMPLE_STATS: what sampling did since it was started. All zero before.
 * Since ABI 1.1.
 *
 * Each entry that was armed (lost permissions) was accessed, or released, or is
 * still armed: armed = samples + dropped + unwanted + released + armed_now.
 */
struct kes_sample_stats {
	__u64 samples;		/* records made */
	__u64 dropped;		/* records lost because nobody read */
	__u64 unwanted;		/* faults of accesses that were not asked for */
	__u64 armed;		/* entries */
	__u64 released;		/* entries that nobody accessed in time */
	__u64 flushes;		/* TLB flushes of the whole VM */
	__u32 armed_now;	/* entries */
	__u32 unread;		/* records */
	__u32 hold_us;		/* for how long entries stay armed now */
	__u32 freq_hz;		/* as set; 0: sampling is off */
	__u64 reserved[4];
};

#define KES_GET_INFO		_IOR(KES_IOC_MAGIC, 0x00, struct kes_info)
#define KES_ATTACH		_IOW(KES_IOC_MAGIC, 0x01, struct kes_attach)
#define KES_DETACH		_IO(KES_IOC_MAGIC, 0x02)
#define KES_GET_MEMSLOTS	_IOWR(KES_IOC_MAGIC, 0x03, struct kes_memslots)
#define KES_HARVEST		_IOWR(KES_IOC_MAGIC, 0x04, struct kes_harvest)
#define KES_SAMPLE_SET		_IOW(KES_IOC_MAGIC, 0x05, struct kes_sample_set)
#define KES_SAMPLE_STATS	_IOR(KES_IOC_MAGIC, 0x06, struct kes_sample_stats)

/*
 * THE INTERFACE OF 2019
 *
 * Programs written for the kvm-ept-sample of 2019 run unchanged. New ones are
 * better off with the calls above: they name the vCPU and the time of an access,
 * can wait, and are told what went wrong. Since ABI 1.2.
 *
 * The numbers are plain, and the rules at the top of this file do not hold: the
 * structures have pointers and sizes of the caller's. 32-bit programs have all but
 * KES_2019_GET_MEMSLOTS, which is ENOTTY for them.
 *
 * A session is bound by KES_2019_INIT or by KES_ATTACH, never by both. After INIT,
 * KES_ATTACH fails with EISCONN, KES_DETACH and KES_SAMPLE_SET fail with EBUSY,
 * and the other KES_ calls work as always. After KES_ATTACH, INIT fails with
 * EISCONN and the other calls below with ENOTCONN.
 *
 * KES_2019_INIT (argument: a pid): binds the session to the VM of a process, given
 * by its number, or that of one of its threads, in the caller's pid namespace. If
 * it has several VMs, to that with the lowest descriptor, and the kernel log says
 * so. Needs CAP_SYS_ADMIN, and the right to open /proc/PID/mem for reading, which
 * is the right to trace the process (ptrace(2), PTRACE_MODE_ATTACH_FSCREDS).
 *
 *   EPERM       no CAP_SYS_ADMIN
 *   EISCONN     this session is bound already
 *   ESRCH       there is no such process
 *   EACCES      the caller may not trace it (a security module can say it with
 *               another errno); or as for KES_ATTACH
 *   ENODEV      the process has no VM; kernel threads have none
 *
 * KES_2019_SET_PROT (argument: KES_2019_*, or-ed): which accesses to sample. After
 * INIT: all. None is allowed, and stops.
 *
 *   EINVAL      another bit is set
 *
 * KES_2019_SET_FREQ (argument: Hz): samples a second, as @freq_hz of
 * KES_SAMPLE_SET. 0, as after INIT, stops. More than KES_MAX_FREQ_HZ is taken for
 * that. The ring has its default size.
 *
 * Sampling runs while there is a type of access and a frequency, set in any order.
 * Both may change while it runs; what was not read then stays. It is lost when
 * sampling starts anew after a stop.
 *
 *   EBUSY, EOPNOTSUPP, ENXIO, EUCLEAN, EACCES  both calls, as for KES_SAMPLE_SET
 *
 * KES_2019_GET_MEMSLOTS (argument: pointer to struct kes_2019_memslots): fills in
 * up to @capacity of the slots that KES_GET_MEMSLOTS would list, in its order, and
 * in @count how many it filled in. As many as @capacity: there may be more.
 *
 * KES_2019_DEINIT (no argument): ends sampling and unbinds, as does closing the
 * file. INIT may follow.
 *
 * read(2) returns as many whole samples as there are and fit: little-endian 32-bit
 * numbers, the GFN in bits 0 to 28, and one of KES_2019_* in bits 29 to 31. When
 * there is none it returns 0. It never waits, whatever O_NONBLOCK says, and has no
 * error but EFAULT, also after DEINIT and after the VM's process exited. The calls
 * above tell that with ESRCH. poll(2) always reports POLLIN and POLLOUT.
 *
 * Samples of pages from KES_2019_GFNS on (2 TiB) count as dropped; see
 * KES_SAMPLE_STATS.
 *
 *   ENOTCONN    all but INIT: the session is not bound by INIT
 */
#define KES_2019_INIT		1200
#define KES_2019_SET_PROT	1201
#define KES_2019_SET_FREQ	1202
#define KES_2019_GET_MEMSLOTS	1203
#define KES_2019_DEINIT		1204

#define KES_2019_READ		(1U << 0)
#define KES_2019_WRITE		(1U << 1)
#define KES_2019_EXEC		(1U << 2)

#define KES_2019_XWR_SHIFT	29
#define KES_2019_GFNS		(1ULL << KES_2019_XWR_SHIFT)

struct kes_2019_memslot {
	__u64 gpa;			/* bytes */
	__u64 hva;
	__kernel_size_t page_count;
};

struct kes_2019_memslots {
	struct kes_2019_memslot *memslots;
	__kernel_size_t capacity;
	__kernel_size_t count;
};

#endif /* _UAPI_KVM_EPT_SAMPLE_H */
