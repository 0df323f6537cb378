//! The clock and the randomness of the thread that a simulation runs on. Everything in this binary
//! asks the operating system for them by two functions of the C library, which are defined here: a
//! thread that simulates gets simulated answers, every other thread the real ones. So map orders,
//! `rand::rng()`, new UUIDs, tokio's timers and its `select!` depend on the seed alone.
//!
//! Invariant: on a thread that simulates, nothing but `set_time` moves the clock.

use std::cell::{Cell, RefCell};
use std::panic;
use std::sync::Once;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

/// When every simulation begins, since the Unix epoch and since the machine was started.
const START: Duration = Duration::from_secs(1_700_000_000);

thread_local! {
    static NOW_NS: Cell<Option<u64>> = const { Cell::new(None) };
    static RANDOM: RefCell<Option<StdRng>> = const { RefCell::new(None) };
    static PANICKED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// While this lives, its thread has a simulated clock and seeded randomness. To be made on a fresh
/// thread, since some randomness is drawn once per thread.
pub struct Simulated(());

impl Simulated {
    pub fn start(seed: u64) -> Simulated {
        static HOOK: Once = Once::new();
        HOOK.call_once(remember_panics);
        RANDOM.set(Some(StdRng::seed_from_u64(seed ^ 0x5eed_0f05)));
        let simulated = Simulated(());
        simulated.set_time(Duration::ZERO);
        simulated
    }

    /// Time since the simulation began.
    pub fn set_time(&self, time: Duration) {
        let now = START + time;
        NOW_NS.set(Some(u64::try_from(now.as_nanos()).unwrap()));
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        NOW_NS.set(None);
        RANDOM.set(None);
    }
}

/// What panicked in a task of this simulation, where the runtime would keep it to itself.
pub fn take_panic() -> Option<String> {
    PANICKED.take()
}

fn remember_panics() {
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if NOW_NS.get().is_some() {
            PANICKED.set(Some(info.to_string()));
        }
        default(info);
    }));
}

/// Replaces the C library's.
///
/// # Safety
/// As `clock_gettime(2)`: `time` may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(
    clock: libc::clockid_t,
    time: *mut libc::timespec,
) -> libc::c_int {
    match NOW_NS.try_with(Cell::get) {
        Ok(Some(now)) => {
            let now = Duration::from_nanos(now);
            // SAFETY: the caller says that it may be written to.
            unsafe {
                (*time).tv_sec = now.as_secs() as libc::time_t;
                (*time).tv_nsec = now.subsec_nanos().into();
            }
            0
        }
        // SAFETY: the same call, made to the kernel itself.
        _ => unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as libc::c_int },
    }
}

/// Replaces the C library's.
///
/// # Safety
/// As `getrandom(2)`: `size` bytes from `buffer` on may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(
    buffer: *mut libc::c_void,
    size: libc::size_t,
    flags: libc::c_uint,
) -> libc::ssize_t {
    let simulated = RANDOM.try_with(|random| {
        let mut random = random.try_borrow_mut().ok()?;
        let random = random.as_mut()?;
        for at in 0..size {
            // SAFETY: within the buffer that the caller gave.
            unsafe { *buffer.cast::<u8>().add(at) = random.next_u32() as u8 };
        }
        Some(size as libc::ssize_t)
    });
    match simulated {
        Ok(Some(written)) => written,
        // SAFETY: the same call, made to the kernel itself.
        _ => unsafe { libc::syscall(libc::SYS_getrandom, buffer, size, flags) as libc::ssize_t },
    }
}
