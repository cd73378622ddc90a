//! Frames: `[len u32][kind u8][fields][payload]`, little endian, `len` counting what follows it.
//!
//! Pure: bytes in, frames out. Parsing borrows from the receive buffer and never panics, whatever the bytes are.

use crate::handle::Refusal;

/// Bytes of the length field.
pub(crate) const LEN_BYTES: usize = 4;

/// Longer texts (a panic message, say) are cut.
const TEXT_BYTES_MAX: usize = 16 << 10;

const CALL: u8 = 1;
const REPLY: u8 = 2;
const REFUSED: u8 = 3;
const FAILED: u8 = 4;
const PING: u8 = 5;
const GOODBYE: u8 = 6;
const CANCEL: u8 = 7;
const STREAM: u8 = 8;
const ITEM: u8 = 9;
const CREDIT: u8 = 10;
const RECEIPT: u8 = 11;

/// A parsed frame; payloads borrow from the receive buffer.
#[derive(Debug, PartialEq)]
pub(crate) enum Frame<'a> {
    /// A message for an actor.
    Call(CallHead, &'a [u8]),
    /// The answer of the handler.
    Reply(u64, &'a [u8]),
    /// The message was not accepted, the asker still owns it.
    Refused(u64, Refusal),
    /// The message was accepted but there is no answer.
    Failed(u64, RemoteFailure),
    /// Nobody waits for the answer of that call any more.
    Cancel(u64),
    /// An item of the stream that answers the call.
    Item(u64, &'a [u8]),
    /// The asker has room for so much more of the stream.
    Credit(u64, Window),
    /// Says only that the sender lives.
    Ping,
    /// The sender shuts down in good order.
    Goodbye(&'a str),
}

/// Whom a message is for and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallHead {
    /// Pairs the answer with the call; 0 for a `tell`, which has none.
    pub(crate) call: u64,
    pub(crate) actor: u64,
    pub(crate) incarnation: u64,
    /// The process that the address names; 0 for any.
    pub(crate) process: u64,
    /// Hash of `WireMessage::NAME`.
    pub(crate) message: u64,
    /// What is left until the deadline; 0 for none. Durations, so that clocks need not agree.
    pub(crate) deadline_us: u64,
    pub(crate) want: Want,
}

/// What the sender of a message waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// It told.
    Nothing,
    /// It told, and wants to know that the handler has the message.
    Receipt,
    /// It asked.
    Answer,
    /// It asked for a stream, and has room for so much of it.
    Stream(Window),
}

/// Room for a part of a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) items: u32,
    pub(crate) bytes: u32,
}

/// Why an accepted message got no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RemoteFailure {
    Expired,
    Stopped,
    Panicked(String),
    NoReply,
    Codec(String),
    /// The handler's own error, for a caller that does not know its type.
    Handler(String),
}

/// Bytes that are no frame. The connection cannot go on after one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("frame of {bytes} bytes, {max} are allowed")]
    TooLong { bytes: usize, max: usize },
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    #[error("frame of kind {kind} is cut short at {bytes} bytes")]
    Short { kind: u8, bytes: usize },
    #[error("frame of kind {kind} has an invalid field: {what}")]
    Invalid { kind: u8, what: &'static str },
}

/// Splits the first frame off `buf`: its body and the bytes it takes in all, or `None` while it is incomplete.
pub(crate) fn split(buf: &[u8], max: usize) -> Result<Option<(&[u8], usize)>, FrameError> {
    let Some(len) = buf.first_chunk::<LEN_BYTES>() else { return Ok(None) };
    let bytes = u32::from_le_bytes(*len) as usize;
    if bytes > max {
        return Err(FrameError::TooLong { bytes, max });
    }
    let end = LEN_BYTES + bytes;
    Ok(buf.get(LEN_BYTES..end).map(|body| (body, end)))
}

/// Parses the body of one frame.
pub(crate) fn parse(body: &[u8]) -> Result<Frame<'_>, FrameError> {
    let Some((&kind, rest)) = body.split_first() else { return Err(FrameError::Short { kind: 0, bytes: 0 }) };
    let mut fields = Fields { kind, rest };
    Ok(match kind {
        CALL | STREAM | RECEIPT => Frame::Call(fields.head()?, fields.rest),
        CANCEL => Frame::Cancel(fields.u64()?),
        ITEM => Frame::Item(fields.u64()?, fields.rest),
        CREDIT => Frame::Credit(fields.u64()?, fields.window()?),
        REPLY => Frame::Reply(fields.u64()?, fields.rest),
        REFUSED => {
            let call = fields.u64()?;
            let code = fields.u8()?;
            let text = fields.text()?;
            let refusal =
                Refusal::from_code(code, text).ok_or(FrameError::Invalid { kind, what: "reason" })?;
            Frame::Refused(call, refusal)
        }
        FAILED => {
            let call = fields.u64()?;
            let code = fields.u8()?;
            let text = fields.text()?;
            let failure =
                RemoteFailure::from_code(code, text).ok_or(FrameError::Invalid { kind, what: "failure" })?;
            Frame::Failed(call, failure)
        }
        PING => Frame::Ping,
        GOODBYE => Frame::Goodbye(fields.text()?),
        other => return Err(FrameError::UnknownKind(other)),
    })
}

struct Fields<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn head(&mut self) -> Result<CallHead, FrameError> {
        let mut head = CallHead {
            call: self.u64()?,
            actor: self.u64()?,
            incarnation: self.u64()?,
            process: self.u64()?,
            message: self.u64()?,
            deadline_us: self.u64()?,
            want: Want::Nothing,
        };
        head.want = match (self.kind, head.call) {
            (CALL, 0) => Want::Nothing,
            (CALL, _) => Want::Answer,
            (_, 0) => return Err(FrameError::Invalid { kind: self.kind, what: "call number" }),
            (STREAM, _) => Want::Stream(self.window()?),
            (_, _) => Want::Receipt,
        };
        Ok(head)
    }

    fn window(&mut self) -> Result<Window, FrameError> {
        Ok(Window { items: self.u32()?, bytes: self.u32()? })
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<4>() else { return Err(self.short()) };
        self.rest = rest;
        Ok(u32::from_le_bytes(*head))
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<8>() else { return Err(self.short()) };
        self.rest = rest;
        Ok(u64::from_le_bytes(*head))
    }

    fn u8(&mut self) -> Result<u8, FrameError> {
        let Some((&head, rest)) = self.rest.split_first() else { return Err(self.short()) };
        self.rest = rest;
        Ok(head)
    }

    fn text(&mut self) -> Result<&'a str, FrameError> {
        std::str::from_utf8(self.rest).map_err(|_| FrameError::Invalid { kind: self.kind, what: "text" })
    }

    fn short(&self) -> FrameError {
        FrameError::Short { kind: self.kind, bytes: self.rest.len() }
    }
}

impl RemoteFailure {
    fn code(&self) -> (u8, &str) {
        match self {
            Self::Expired => (1, ""),
            Self::Stopped => (2, ""),
            Self::Panicked(message) => (3, message),
            Self::NoReply => (4, ""),
            Self::Codec(message) => (5, message),
            Self::Handler(message) => (6, message),
        }
    }

    fn from_code(code: u8, text: &str) -> Option<Self> {
        Some(match code {
            1 => Self::Expired,
            2 => Self::Stopped,
            3 => Self::Panicked(text.to_owned()),
            4 => Self::NoReply,
            5 => Self::Codec(text.to_owned()),
            6 => Self::Handler(text.to_owned()),
            _ => return None,
        })
    }
}

/// Starts a frame in an empty buffer; `finish` writes its length.
fn begin(out: &mut Vec<u8>, kind: u8) {
    out.clear();
    out.extend_from_slice(&[0; LEN_BYTES]);
    out.push(kind);
}

/// Writes the length of the frame that fills `out`. A frame longer than `u32` is cut off by the limit check before it
/// is sent, so saturating is enough.
pub(crate) fn finish(out: &mut [u8]) {
    let len = u32::try_from(out.len() - LEN_BYTES).unwrap_or(u32::MAX);
    out[..LEN_BYTES].copy_from_slice(&len.to_le_bytes());
}

/// Starts a call frame; the payload is appended after it, then `finish`.
pub(crate) fn begin_call(out: &mut Vec<u8>, head: &CallHead) {
    let (kind, call) = match head.want {
        Want::Nothing => (CALL, 0),
        Want::Answer => (CALL, head.call),
        Want::Receipt => (RECEIPT, head.call),
        Want::Stream(_) => (STREAM, head.call),
    };
    begin(out, kind);
    for field in [call, head.actor, head.incarnation, head.process, head.message, head.deadline_us] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    if let Want::Stream(window) = head.want {
        write_window(out, window);
    }
}

fn write_window(out: &mut Vec<u8>, window: Window) {
    out.extend_from_slice(&window.items.to_le_bytes());
    out.extend_from_slice(&window.bytes.to_le_bytes());
}

/// Starts an item frame; the payload is appended after it, then `finish`.
pub(crate) fn begin_item(out: &mut Vec<u8>, call: u64) {
    begin(out, ITEM);
    out.extend_from_slice(&call.to_le_bytes());
}

/// A whole cancel frame.
pub(crate) fn write_cancel(out: &mut Vec<u8>, call: u64) {
    begin(out, CANCEL);
    out.extend_from_slice(&call.to_le_bytes());
    finish(out);
}

/// A whole credit frame.
pub(crate) fn write_credit(out: &mut Vec<u8>, call: u64, window: Window) {
    begin(out, CREDIT);
    out.extend_from_slice(&call.to_le_bytes());
    write_window(out, window);
    finish(out);
}

/// Starts a reply frame; the payload is appended after it, then `finish`.
pub(crate) fn begin_reply(out: &mut Vec<u8>, call: u64) {
    begin(out, REPLY);
    out.extend_from_slice(&call.to_le_bytes());
}

/// A whole refusal frame.
pub(crate) fn write_refused(out: &mut Vec<u8>, call: u64, refusal: &Refusal) {
    let (code, text) = refusal.code();
    begin(out, REFUSED);
    write_coded(out, call, code, text);
}

/// A whole failure frame.
pub(crate) fn write_failed(out: &mut Vec<u8>, call: u64, failure: &RemoteFailure) {
    let (code, text) = failure.code();
    begin(out, FAILED);
    write_coded(out, call, code, text);
}

fn write_coded(out: &mut Vec<u8>, call: u64, code: u8, text: &str) {
    out.extend_from_slice(&call.to_le_bytes());
    out.push(code);
    let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
    out.extend_from_slice(text.as_bytes());
    finish(out);
}

/// A whole ping frame.
pub(crate) fn write_ping(out: &mut Vec<u8>) {
    begin(out, PING);
    finish(out);
}

/// A whole goodbye frame.
pub(crate) fn write_goodbye(out: &mut Vec<u8>, why: &str) {
    begin(out, GOODBYE);
    out.extend_from_slice(why.as_bytes());
    finish(out);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX: usize = 1 << 16;

    fn head() -> impl Strategy<Value = CallHead> {
        let want = prop_oneof![
            Just(Want::Nothing),
            Just(Want::Receipt),
            Just(Want::Answer),
            any::<[u32; 2]>().prop_map(|[items, bytes]| Want::Stream(Window { items, bytes })),
        ];
        let fields = any::<[u64; 5]>();
        (fields, 1..u64::MAX, want).prop_map(
            |([actor, incarnation, process, message, deadline_us], call, want)| {
                let call = if want == Want::Nothing { 0 } else { call };
                CallHead { call, actor, incarnation, process, message, deadline_us, want }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// Whatever arrives, parsing neither panics nor reads beyond the frame.
        #[test]
        fn any_bytes_are_a_frame_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..13) {
            if let Some(first) = bytes.get_mut(LEN_BYTES) {
                *first = kind;
            }
            if let Ok(Some((body, used))) = split(&bytes, MAX) {
                prop_assert!(used <= bytes.len() && body.len() + LEN_BYTES == used);
                let _ = parse(body);
            }
            let _ = parse(&bytes);
        }

        /// A call comes out as it went in, wherever the stream is cut, and its length is checked before it is awaited.
        #[test]
        fn a_call_survives_the_wire(head in head(), payload in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut bytes = Vec::new();
            begin_call(&mut bytes, &head);
            bytes.extend_from_slice(&payload);
            finish(&mut bytes);
            for cut in 0..bytes.len() {
                prop_assert_eq!(split(&bytes[..cut], MAX), Ok(None));
            }
            let next = bytes.len();
            bytes.extend_from_slice(b"next frame");
            let (body, used) = split(&bytes, MAX).unwrap().unwrap();
            prop_assert_eq!(used, next);
            prop_assert_eq!(parse(body), Ok(Frame::Call(head, &payload[..])));
            let too_long = FrameError::TooLong { bytes: next - LEN_BYTES, max: 10 };
            prop_assert_eq!(split(&bytes[..LEN_BYTES], 10), Err(too_long));
        }
    }

    #[test]
    fn answers_survive_the_wire() {
        let mut bytes = Vec::new();
        let mut check = |expected: Frame<'_>, write: &dyn Fn(&mut Vec<u8>)| {
            write(&mut bytes);
            let (body, used) = split(&bytes, MAX).unwrap().unwrap();
            assert_eq!(used, bytes.len());
            assert_eq!(parse(body), Ok(expected));
        };
        for refusal in [Refusal::MailboxFull, Refusal::WrongIncarnation, Refusal::Unreachable("down".into())]
        {
            check(Frame::Refused(7, refusal.clone()), &|out| write_refused(out, 7, &refusal));
        }
        for failure in [RemoteFailure::Expired, RemoteFailure::NoReply, RemoteFailure::Panicked("π".into())]
        {
            check(Frame::Failed(8, failure.clone()), &|out| write_failed(out, 8, &failure));
        }
        check(Frame::Cancel(7), &|out| write_cancel(out, 7));
        let window = Window { items: 3, bytes: u32::MAX };
        check(Frame::Credit(7, window), &|out| write_credit(out, 7, window));
        check(Frame::Ping, &write_ping);
        check(Frame::Goodbye("done"), &|out| write_goodbye(out, "done"));
        check(Frame::Reply(9, b""), &|out| {
            begin_reply(out, 9);
            finish(out);
        });
    }
}
