//! A ref to an object, as it is held and as it travels.

use std::fmt;
use std::sync::Arc;

use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};

use super::counts::Ticket;
use super::table::Table;
use super::{ObjectAddr, ObjectId, scope};

/// A ref to an object. It may be cloned, kept, and sent in messages and answers; the object is there for as long as
/// anybody has one. (OB-1)
///
/// A ref in an object that `put_value` put is kept by that object, and counts for itself once `get_value` read it. One that was
/// decoded from anything but a message or an object, from a file say, does not keep its object.
#[derive(Clone)]
pub struct ObjectRef {
    addr: Arc<ObjectAddr>,
    held: Option<Arc<Held>>,
}

/// Counts as one ref of this process until it is dropped.
struct Held {
    id: ObjectId,
    table: Arc<Table>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.table.dropped(self.id);
    }
}

impl ObjectRef {
    /// A ref that `table` has counted.
    pub(super) fn counted(addr: ObjectAddr, table: Arc<Table>) -> Self {
        let held = Held { id: addr.id, table };
        Self { addr: Arc::new(addr), held: Some(Arc::new(held)) }
    }

    /// Which object it is.
    pub fn id(&self) -> ObjectId {
        self.addr.id
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.addr.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.addr.bytes == 0
    }

    pub(super) fn addr(&self) -> &ObjectAddr {
        &self.addr
    }
}

impl fmt::Debug for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectRef({}, {} bytes)", self.addr.id, self.addr.bytes)
    }
}

impl PartialEq for ObjectRef {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for ObjectRef {}

impl Encode for ObjectRef {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        if self.held.is_some() && scope::is_put(self) {
            self.addr.encode(encoder)?;
            return None::<Ticket>.encode(encoder);
        }
        // Whoever sends a ref keeps the object until its receiver counts it (OB-1).
        let ticket = self.held.as_ref().and_then(|held| held.table.sent(held.id));
        // Of several receivers the first must not speak for the others: the sender waits out the time.
        let ticket = ticket.filter(|_| scope::goes_to_one());
        self.addr.encode(encoder)?;
        ticket.encode(encoder)
    }
}

impl<C> Decode<C> for ObjectRef {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let addr = ObjectAddr::decode(decoder)?;
        let ticket = Option::<Ticket>::decode(decoder)?;
        match scope::receiver() {
            Some((table, within)) if table.arrived(&addr, ticket, within) => Ok(Self::counted(addr, table)),
            Some(_) | None => Ok(Self { addr: Arc::new(addr), held: None }),
        }
    }
}

bincode::impl_borrow_decode!(ObjectRef);
