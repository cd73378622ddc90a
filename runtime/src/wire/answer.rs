//! The way back for the answer of a call that came over the wire.

use std::sync::Arc;

use bincode::Encode;

use super::calls::Served;
use super::codec::encode_into;
use super::conn::Conn;
use super::frame::{self, RemoteFailure, Want};
use crate::handle::Refusal;
use crate::objects::scope;

/// Answers one call. Dropping it answers nothing: `crate::mailbox` sees to that.
pub(crate) struct RemoteAnswer {
    conn: Arc<Conn>,
    call: u64,
    want: Want,
    served: Arc<Served>,
    answered: bool,
}

impl RemoteAnswer {
    pub(super) fn new(conn: Arc<Conn>, call: u64, want: Want, served: Arc<Served>) -> Self {
        Self { conn, call, want, served, answered: false }
    }

    /// What the asker waits for.
    pub(crate) fn want(&self) -> Want {
        self.want
    }

    /// Whether the asker still waits, and has room for items.
    pub(crate) fn served(&self) -> &Served {
        &self.served
    }

    pub(crate) fn reply<T: Encode>(mut self, value: &T) {
        if self.served.is_cancelled() {
            return;
        }
        let sent = self.conn.send_answer(Some(self.call), |out| {
            frame::begin_reply(out, self.call);
            scope::sent_to_one(|| encode_into(value, out))
        });
        match sent {
            Ok(()) => self.answered = true,
            Err(why) => self.fail(&RemoteFailure::Codec(format!("the reply cannot be sent: {why}"))),
        }
    }

    /// Sends an item of a stream, for which there is room. Waits while the connection is busy.
    pub(crate) async fn item<T: Encode>(&self, item: &T) -> Result<(), RemoteFailure> {
        self.conn.has_room().await;
        let mut bytes = 0;
        let sent = self.conn.send_answer(None, |out| {
            frame::begin_item(out, self.call);
            let head = out.len();
            scope::sent_to_one(|| encode_into(item, out))?;
            bytes = out.len() - head;
            Ok(())
        });
        sent.map_err(|why| RemoteFailure::Codec(format!("an item cannot be sent: {why}")))?;
        self.served.spend(bytes);
        Ok(())
    }

    pub(crate) fn refuse(mut self, reason: &Refusal) {
        self.answered = true;
        self.conn.send_note(Some(self.call), |out| frame::write_refused(out, self.call, reason));
    }

    pub(crate) fn fail(mut self, failure: &RemoteFailure) {
        self.answered = true;
        if !self.served.is_cancelled() {
            self.conn.send_note(Some(self.call), |out| frame::write_failed(out, self.call, failure));
        }
    }
}

impl Drop for RemoteAnswer {
    fn drop(&mut self) {
        if !self.answered {
            self.conn.no_longer_serves(self.call);
        }
    }
}
