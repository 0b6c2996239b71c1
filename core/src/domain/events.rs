// SPDX-License-Identifier: MIT OR Apache-2.0
//! libvirt's events: that something happened to a domain. What it was does not
//! matter, as whoever is told looks at libvirt as a whole.
//!
//! The virt crate has no domain events, so this file calls libvirt itself. All
//! of it runs in one thread, with a connection of its own: libvirt has one event
//! loop for a whole process.

use std::ffi::{c_char, c_int, c_ulonglong, c_void};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::thread;
use std::time::Duration;

use log::{debug, info, warn};
use virt::connect::Connect;
use virt::{error, event, sys};

use super::{LibvirtError, call_error, open, silence};

/// A connection whose other end is silent for this long is given up.
const KEEPALIVE_S: i32 = 5;
const KEEPALIVES: u32 = 3;

/// How often the loop looks whether its connection still lives.
const LOOK_MS: c_int = 1000;

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_secs(2);

type Notify = Box<dyn Fn() + Send>;

/// Calls `notify`, from a thread of its own and for as long as the process
/// lives, whenever something happened to any domain, and whenever a connection
/// was made: what happened before it is not known. Call it once.
pub fn watch(uri: &str, notify: impl Fn() + Send + 'static) -> io::Result<()> {
    let (uri, notify): (_, Notify) = (uri.to_owned(), Box::new(notify));
    thread::Builder::new().name("libvirt-events".into()).spawn(move || run(&uri, &notify)).map(drop)
}

fn run(uri: &str, notify: &Notify) {
    silence();
    // Before the connection is made: that is what makes it able to deliver.
    if let Err(error) = event::event_register_default_impl() {
        warn!("libvirt's events can not be had, its state is polled: {}", error.message());
        return;
    }
    // Wakes the loop, which otherwise sleeps until something happens.
    if let Err(error) = event::event_add_timeout(LOOK_MS, |_, _| {}, ptr::null_mut()) {
        warn!("libvirt's events can not be had, its state is polled: {}", error.message());
        return;
    }
    loop {
        match follow(uri, notify) {
            Ok(()) => info!("libvirt at {uri} went away; waiting for it"),
            Err(error) => debug!("no events from libvirt: {error}"),
        }
        thread::sleep(RETRY);
    }
}

/// Delivers events until the connection breaks.
fn follow(uri: &str, notify: &Notify) -> Result<(), LibvirtError> {
    let connection = open(uri, true)?;
    // libvirt's test driver has no keepalive, and no need for one.
    let _ = connection.set_keep_alive(KEEPALIVE_S, KEEPALIVES);
    let registered = register(&connection, notify);
    if registered.is_empty() {
        return Err(call_error(uri, "tell its events", &error::Error::last_error()));
    }
    debug!("{} kinds of event from libvirt at {uri}", registered.len());
    notify();
    while connection.is_alive().unwrap_or(false) {
        event::event_run_default_impl().map_err(|error| call_error(uri, "run its event loop", &error))?;
    }
    deregister(&connection, &registered);
    Ok(())
}

/// Asks for all kinds of event; those that this libvirt does not know are left
/// to polling. `notify` is lent until [`deregister`].
fn register(connection: &Connect, notify: &Notify) -> Vec<c_int> {
    let opaque = ptr::from_ref(notify).cast_mut().cast::<c_void>();
    callbacks()
        .into_iter()
        .filter_map(|(id, callback)| {
            // SAFETY: the connection is open; `callback` has the signature that
            // libvirt documents for `id` (see `callbacks`); `opaque` points to a
            // Notify that outlives the registration, as `run` owns it until the
            // process ends; nothing is to be freed.
            let registered = unsafe {
                let (connection, all) = (connection.as_ptr(), ptr::null_mut());
                sys::virConnectDomainEventRegisterAny(connection, all, id as c_int, callback, opaque, None)
            };
            (registered >= 0).then_some(registered)
        })
        .collect()
}

fn deregister(connection: &Connect, registered: &[c_int]) {
    for id in registered {
        // SAFETY: the connection is open, though perhaps broken, and `id` is one
        // that it gave out. A failure leaves nothing to do.
        unsafe { sys::virConnectDomainEventDeregisterAny(connection.as_ptr(), *id) };
    }
}

/// Kinds of event with their callbacks, whose signatures are those that libvirt
/// documents for each `virDomainEventID`.
fn callbacks() -> [(sys::virDomainEventID, sys::virConnectDomainEventGenericCallback); 9] {
    [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, erase(lifecycle as *const ())),
        (sys::VIR_DOMAIN_EVENT_ID_REBOOT, Some(plain)),
        (sys::VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE, erase(balloon as *const ())),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, erase(device as *const ())),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, erase(device as *const ())),
        (sys::VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, erase(iteration as *const ())),
        (sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, erase(job as *const ())),
        (sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, erase(metadata as *const ())),
        (sys::VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE, erase(memory_device as *const ())),
    ]
}

/// libvirt takes every callback as the general kind, and calls it as its own.
fn erase(callback: *const ()) -> sys::virConnectDomainEventGenericCallback {
    // SAFETY: pointers to functions all have one size, and the caller made this
    // one of a function. It is called only by libvirt, for the kind of event
    // that it has the signature of.
    Some(unsafe { std::mem::transmute::<*const (), unsafe extern "C" fn(Conn, Dom, *mut c_void)>(callback) })
}

type Conn = sys::virConnectPtr;
type Dom = sys::virDomainPtr;

/// Tells whoever watches. No panic goes on into libvirt's C.
///
/// # Safety
///
/// `opaque` is what [`register`] gave to libvirt.
unsafe fn tell(opaque: *mut c_void) {
    // SAFETY: by this function's contract a Notify that is still lent.
    let notify = unsafe { &*opaque.cast::<Notify>() };
    if catch_unwind(AssertUnwindSafe(notify)).is_err() {
        warn!("an event of libvirt was lost");
    }
}

unsafe extern "C" fn lifecycle(_: Conn, _: Dom, _: c_int, _: c_int, opaque: *mut c_void) -> c_int {
    // SAFETY: libvirt hands on what it was given.
    unsafe { tell(opaque) };
    0
}

unsafe extern "C" fn plain(_: Conn, _: Dom, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { tell(opaque) };
}

unsafe extern "C" fn balloon(_: Conn, _: Dom, _: c_ulonglong, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { tell(opaque) };
}

unsafe extern "C" fn device(_: Conn, _: Dom, _: *const c_char, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { tell(opaque) };
}

unsafe extern "C" fn iteration(_: Conn, _: Dom, _: c_int, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { tell(opaque) };
}

unsafe extern "C" fn job(_: Conn, _: Dom, _: sys::virTypedParameterPtr, _: c_int, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { tell(opaque) };
}

unsafe extern "C" fn metadata(_: Conn, _: Dom, _: c_int, _: *const c_char, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { tell(opaque) };
}

unsafe extern "C" fn memory_device(_: Conn, _: Dom, _: *const c_char, _: c_ulonglong, opaque: *mut c_void) {
    // SAFETY: as above.
    unsafe { tell(opaque) };
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use crate::domain::{DefinedDomain, Description};

    /// libvirt's test driver, in which all connections of a process see the same.
    const URI: &str = "test:///default";

    #[test]
    fn tells_of_a_changed_policy() {
        let (sender, receiver) = mpsc::channel();
        let notify = move || {
            let _ = sender.send(());
        };
        super::watch(URI, notify).unwrap();
        // The connection was made.
        receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        // Another test may use the same domain: what counts is that word comes.
        while receiver.try_recv().is_ok() {}
        let _alone = crate::domain::alone();
        let domain = DefinedDomain::find(URI, "test", false).unwrap();
        domain.set_policy(Some("<placement mode='off'/>"), Description::Live).unwrap();
        receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        domain.set_policy(None, Description::Live).unwrap();
    }
}
