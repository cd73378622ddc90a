//! Panics as the cause of an actor's end: message, place and backtrace, as the thread that panics sees them.
//!
//! The hook is the one global thing of the runtime, so only a worker process installs it. Without it a panic is known by
//! its message alone. It ends nothing: whoever catches the panic does.

use std::any::Any;
use std::backtrace::Backtrace;
use std::cell::RefCell;
use std::fmt;
use std::panic::PanicHookInfo;
use std::sync::Once;

/// Frames of a backtrace that are kept, and bytes.
const FRAMES_MAX: usize = 32;
const BACKTRACE_BYTES_MAX: usize = 4096;

/// A panic that was caught.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Panic {
    /// Its message.
    pub message: String,
    /// File and line, where the process watches for that.
    pub location: Option<String>,
    /// Frames, innermost first, where the process watches for that.
    pub backtrace: Option<String>,
}

impl Panic {
    /// What is known of a panic that was caught on this thread just now.
    pub fn caught(payload: &(dyn Any + Send)) -> Self {
        caught(payload)
    }
}

impl From<String> for Panic {
    /// One of which only the message is known.
    fn from(message: String) -> Self {
        Self { message, location: None, backtrace: None }
    }
}

impl From<&str> for Panic {
    fn from(message: &str) -> Self {
        message.to_owned().into()
    }
}

impl fmt::Display for Panic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

thread_local! {
    /// The last panic of this thread, until somebody catches it here.
    static LAST: RefCell<Option<Panic>> = const { RefCell::new(None) };
}

/// From now on panics of this process are known with place and backtrace. What was done about them before is still done.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            note(info);
            before(info);
        }));
    });
}

fn note(info: &PanicHookInfo<'_>) {
    let panic = Panic {
        message: message(info.payload()),
        location: info.location().map(|at| format!("{}:{}", at.file(), at.line())),
        backtrace: Some(trimmed(&Backtrace::force_capture().to_string())),
    };
    // A thread that is being torn down has no place for it any more.
    let _ = LAST.try_with(|last| last.try_borrow_mut().map(|mut last| *last = Some(panic)));
}

/// What is known of a panic that was caught on this thread.
pub(crate) fn caught(payload: &(dyn Any + Send)) -> Panic {
    let message = message(payload);
    let last = LAST.try_with(|last| last.try_borrow_mut().ok().and_then(|mut last| last.take()));
    // An earlier one may have been caught by somebody else.
    last.ok().flatten().filter(|panic| panic.message == message).unwrap_or_else(|| message.into())
}

/// The text of a panic.
pub(crate) fn message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

/// The frames between the machinery of the panic and that of the thread.
fn trimmed(backtrace: &str) -> String {
    let mut frames: Vec<String> = Vec::new();
    for line in backtrace.lines() {
        match line.trim_start().split_once(": ") {
            Some((number, name)) if number.bytes().all(|b| b.is_ascii_digit()) => {
                frames.push(name.to_owned())
            }
            _ => {
                if let Some(frame) = frames.last_mut() {
                    frame.push(' ');
                    frame.push_str(line.trim_start());
                }
            }
        }
    }
    let mut own = &frames[..];
    if let Some(at) = own.iter().position(|frame| frame.contains("rust_begin_unwind")) {
        own = &own[at + 1..];
    }
    let of_the_panic = ["core::panicking::", "core::option::", "core::result::"];
    while own.first().is_some_and(|frame| of_the_panic.iter().any(|of| frame.starts_with(of))) {
        own = &own[1..];
    }
    if let Some(at) = own.iter().position(|frame| frame.contains("__rust_begin_short_backtrace")) {
        own = &own[..at];
    }
    let mut text = own[..own.len().min(FRAMES_MAX)].join("\n");
    if text.len() > BACKTRACE_BYTES_MAX {
        text.truncate(text.floor_char_boundary(BACKTRACE_BYTES_MAX));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[inline(never)]
    fn deep_down(text: &str) {
        panic!("{text}");
    }

    #[test]
    fn a_panic_is_known_with_its_place_and_only_to_its_own_catcher() {
        watch();
        let payload = catch_unwind(|| deep_down("out of cheese")).unwrap_err();
        let panic = caught(&*payload);
        assert_eq!(panic.message, "out of cheese");
        assert!(panic.location.is_some_and(|at| at.contains("panics.rs:")));
        let frames = panic.backtrace.unwrap();
        assert!(frames.lines().next().is_some_and(|frame| frame.contains("deep_down")), "{frames}");
        assert!(frames.len() <= BACKTRACE_BYTES_MAX);
        // One that nobody asked about is not taken for the next one, which had no hook.
        let _ = catch_unwind(|| deep_down("earlier"));
        let payload = catch_unwind(|| std::panic::resume_unwind(Box::new("later"))).unwrap_err();
        assert_eq!(caught(&*payload), Panic::from("later"));
    }
}
