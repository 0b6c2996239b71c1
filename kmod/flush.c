// SPDX-License-Identifier: GPL-2.0-only
/*
 * Flushing the TLBs of a guest: no vCPU goes on with a translation, or with a
 * cached upper level of one, that it read before the call. Never sleeps; must
 * be called with interrupts on.
 */
#include <linux/cpumask.h>
#include <linux/smp.h>

#include "compat.h"
#include "flush.h"
#include "patched.h"
#include "trace.h"

#ifdef KES_COMPAT_FLUSH_EXPORTED

static void flush_tlbs(struct kvm *kvm)
{
	kvm_flush_remote_tlbs(kvm);
}

#else

/* Being interrupted is all that is asked: a vCPU flushes when it enters again. */
static void leave_guest(void *unused)
{
}

/*
 * What KVM does for a request with KVM_REQUEST_WAIT: leave the request with
 * each vCPU, then interrupt those that may be in the guest, and wait for them.
 */
static void flush_tlbs(struct kvm *kvm)
{
	struct kvm_vcpu *vcpu;
	cpumask_var_t running;
	unsigned long i;
	bool some;
	int me;

	some = zalloc_cpumask_var(&running, GFP_NOWAIT | __GFP_NOWARN);
	me = get_cpu();
	kvm_for_each_vcpu(i, vcpu, kvm) {
		int cpu;

		kvm_make_request(KVM_REQ_TLB_FLUSH, vcpu);
		/* Full barrier: the request is seen before the mode is read. */
		if (kvm_vcpu_exiting_guest_mode(vcpu) == OUTSIDE_GUEST_MODE)
			continue;
		cpu = READ_ONCE(vcpu->cpu);
		if (some && cpu != -1 && cpu != me)
			__cpumask_set_cpu(cpu, running);
	}
	/* Without memory for the mask: all CPUs, which is slow and as right. */
	smp_call_function_many(some ? running : cpu_online_mask, leave_guest, NULL, true);
	put_cpu();
	free_cpumask_var(running);
}

#endif

void kes_flush_tlbs(struct kvm *kvm)
{
	trace_kes_flush(kvm);
	if (kes_patched)
		kes_patched->flush(kvm);
	else
		flush_tlbs(kvm);
}
