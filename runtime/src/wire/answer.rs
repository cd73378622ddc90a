//! The way back for the answer of a call that came over the wire.

use std::sync::Arc;

use bincode::Encode;

use super::codec::encode_into;
use super::conn::Conn;
use super::frame::{self, RemoteFailure};
use crate::handle::Refusal;

/// Answers one call. Dropping it answers nothing: `crate::mailbox` sees to that.
pub(crate) struct RemoteAnswer {
    pub(crate) conn: Arc<Conn>,
    pub(crate) call: u64,
}

impl RemoteAnswer {
    pub(crate) fn reply<T: Encode>(self, value: &T) {
        let sent = self.conn.send_answer(|out| {
            frame::begin_reply(out, self.call);
            encode_into(value, out)
        });
        if let Err(why) = sent {
            self.fail(&RemoteFailure::Codec(format!("the reply cannot be sent: {why}")));
        }
    }

    pub(crate) fn refuse(self, reason: &Refusal) {
        self.conn.send_note(|out| frame::write_refused(out, self.call, reason));
    }

    pub(crate) fn fail(self, failure: &RemoteFailure) {
        self.conn.send_note(|out| frame::write_failed(out, self.call, failure));
    }
}
