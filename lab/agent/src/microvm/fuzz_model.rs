// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fuzzer's model of the module: which errnos a call may end with, from the
//! header and from what is known of the session and its VM.

use std::collections::BTreeSet;

use ept_virt_core::uapi::{self, MAX_FREQ_HZ, MAX_PAGES, MAX_RING_RECORDS};
use libc::{
    EAGAIN, EBADF, EBUSY, EFAULT, EINTR, EINVAL, EISCONN, ENODATA, ENODEV, ENOTCONN, ENOTTY, EOPNOTSUPP,
    ESRCH,
};

use super::abi::HARVEST_FLAGS;
use super::fuzz_steps::{Buffer, Call, HarvestStep, SetStep, Target};
use super::fuzz_world::Life;
use super::places::Place;

/// What a session is, for the length of a call.
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub attached: bool,
    /// The attached VM's, at one moment of the call.
    pub life: Life,
    /// The size of the ring while sampling runs.
    pub ring: Option<u32>,
    pub may_have_records: bool,
    pub nonblock: bool,
    /// Of the VM that the call names.
    pub target_life: Life,
    /// The kernel can note for its page reclaim what was accessed.
    pub keeps_young: bool,
}

/// Errnos that are right; 0 is success.
pub type Allowed = BTreeSet<i32>;

fn only(errno: i32) -> Allowed {
    BTreeSet::from([errno])
}

/// What a call may end with.
pub fn allowed(call: &Call, place: Place, view: &View) -> Allowed {
    let errno = match *call {
        Call::Number(_) => ENOTTY,
        Call::Poll => 0,
        Call::Info => written(place),
        Call::Attach { .. } if !place.readable() => EFAULT,
        Call::Attach { flags, reserved, .. } if flags != 0 || reserved != 0 => EINVAL,
        Call::Attach { .. } if view.attached => EISCONN,
        Call::Attach { target, .. } => return attach(target, view),
        Call::Detach => if_attached(view, 0),
        Call::Stats => if_attached(view, written(place)),
        Call::Memslots { .. } | Call::Harvest(_) if !place.writable() => EFAULT,
        Call::Set(_) if !place.readable() => EFAULT,
        Call::Memslots { .. } | Call::Harvest(_) | Call::Set(_) if !view.attached => ENOTCONN,
        Call::Memslots { .. } | Call::Harvest(_) | Call::Set(_) if view.life == Life::Dead => ESRCH,
        Call::Memslots { capacity, slots, reserved } => return memslots(capacity, slots, reserved, view),
        Call::Harvest(ref step) => return or_gone(harvest(step, view.keeps_young), view),
        Call::Set(ref step) => return or_gone(set(step, view), view),
        Call::Read { bytes } => return read(bytes, place, view),
    };
    only(errno)
}

fn written(place: Place) -> i32 {
    if place.writable() { 0 } else { EFAULT }
}

fn if_attached(view: &View, errno: i32) -> i32 {
    if view.attached { errno } else { ENOTCONN }
}

/// While the VM's process dies, it may be gone for a part of the call.
fn or_gone(errno: i32, view: &View) -> Allowed {
    let mut allowed = only(errno);
    if view.life == Life::Dying {
        allowed.insert(ESRCH);
    }
    allowed
}

fn attach(target: Target, view: &View) -> Allowed {
    match target {
        Target::NoVm => only(ENODEV),
        Target::Number(_) => only(EBADF),
        Target::Vm(_) | Target::DeadVm => match view.target_life {
            Life::Alive => only(0),
            Life::Dying => BTreeSet::from([0, ESRCH]),
            Life::Dead => only(ESRCH),
        },
    }
}

fn memslots(capacity: u32, slots: Buffer, reserved: u64, view: &View) -> Allowed {
    if reserved != 0 {
        return or_gone(EINVAL, view);
    }
    let mut allowed = or_gone(0, view);
    // Whether something has to be written depends on how many slots there are.
    let nowhere = slots == Buffer::None || matches!(slots, Buffer::At(place) if !place.writable());
    if capacity > 0 && nowhere {
        allowed.insert(EFAULT);
    }
    allowed
}

fn harvest(step: &HarvestStep, keeps_young: bool) -> i32 {
    let asks = |buffer: Buffer| !matches!(buffer, Buffer::None | Buffer::At(Place::Null));
    let on_nodes = asks(step.buffers[3]);
    if step.flags & !HARVEST_FLAGS != 0
        || step.reserved != 0
        || step.gfn_count == 0
        || step.gfn_count > MAX_PAGES
        || step.gfn_start.checked_add(step.gfn_count).is_none()
        || step.nodes_bits > 1024
        || (on_nodes && !asks(step.nodes))
    {
        return EINVAL;
    }
    if step.flags & uapi::HARVEST_KEEP_YOUNG != 0 && !keeps_young {
        return EOPNOTSUPP;
    }
    let unreadable = matches!(step.nodes, Buffer::At(place) if !place.readable());
    if (on_nodes && step.nodes_bits > 0 && unreadable) || step.buffers.into_iter().any(Buffer::is_wrong) {
        return EFAULT;
    }
    0
}

fn set(step: &SetStep, view: &View) -> i32 {
    let wrong_ring = step.ring_records > 0
        && step.freq_hz > 0
        && view.ring.is_some_and(|size| step.ring_records.next_power_of_two() != size);
    if step.flags != 0
        || step.reserved != 0
        || step.access > 7
        || (step.freq_hz > 0 && step.access == 0)
        || step.freq_hz > MAX_FREQ_HZ
        || step.ring_records > MAX_RING_RECORDS
        || wrong_ring
    {
        return EINVAL;
    }
    0
}

/// Whether a SAMPLE_SET that is right begins to sample, which another sampler of
/// the VM may be in the way of.
pub fn begins(step: &SetStep, view: &View) -> bool {
    step.freq_hz > 0 && view.ring.is_none() && view.attached && set(step, view) == 0
}

/// With other samplers of the VM: whether one may, and whether one must have
/// been in the way.
pub fn with_other_samplers(allowed: &mut Allowed, may: bool, must: bool) {
    if may && allowed.contains(&0) {
        allowed.insert(EBUSY);
    }
    if must {
        allowed.remove(&0);
    }
}

fn read(bytes: usize, place: Place, view: &View) -> Allowed {
    if place.in_kernel() {
        return only(EFAULT);
    }
    let mut allowed = if bytes < size_of::<uapi::KesSample>() {
        only(EINVAL)
    } else {
        let mut allowed = match (view.ring, view.life) {
            (None, _) => only(ENODATA),
            (Some(_), Life::Alive) if view.nonblock => only(EAGAIN),
            (Some(_), Life::Alive) => only(EINTR),
            // The worker notices when it looks the next time.
            (Some(_), _) => BTreeSet::from([ESRCH, if view.nonblock { EAGAIN } else { EINTR }]),
        };
        if view.may_have_records || view.ring.is_some() {
            allowed.insert(written(place));
        }
        allowed
    };
    if matches!(place, Place::End | Place::NonCanonical) {
        allowed.insert(EFAULT);
    }
    allowed
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: View = View {
        attached: true,
        life: Life::Alive,
        ring: None,
        may_have_records: false,
        nonblock: true,
        target_life: Life::Alive,
        keeps_young: false,
    };

    #[test]
    fn predicts_by_the_header() {
        let attach = Call::Attach { target: Target::Vm(0), flags: 0, reserved: 0 };
        assert_eq!(allowed(&attach, Place::Good, &VIEW), only(EISCONN));
        assert_eq!(allowed(&attach, Place::Good, &View { attached: false, ..VIEW }), only(0));
        assert_eq!(allowed(&attach, Place::Kernel, &VIEW), only(EFAULT));
        assert_eq!(allowed(&Call::Stats, Place::Null, &View { attached: false, ..VIEW }), only(ENOTCONN));
        assert_eq!(allowed(&Call::Read { bytes: 24 }, Place::Good, &VIEW), only(ENODATA));
        let sampling = View { ring: Some(16), ..VIEW };
        assert!(!allowed(&Call::Read { bytes: 24 }, Place::Good, &sampling).contains(&ENODATA));
        let other_ring = SetStep { access: 1, freq_hz: 1, ring_records: 17, flags: 0, reserved: 0 };
        assert_eq!(allowed(&Call::Set(other_ring), Place::Good, &sampling), only(EINVAL));
        assert_eq!(allowed(&Call::Set(other_ring), Place::Good, &VIEW), only(0));
        let dead = View { life: Life::Dead, ..VIEW };
        assert_eq!(allowed(&Call::Set(other_ring), Place::Good, &dead), only(ESRCH));
    }
}
