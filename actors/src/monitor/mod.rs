//! What people look at: the figures of a serving cluster over time, its expert maps, recordings of its steps, and the
//! page that shows them.
//!
//! [`Watcher`] asks ingresses and EPLB actors once a second and keeps ten minutes; `history`, `trace` and `exposition` are
//! pure. It decides nothing and is never on the path of a request; what the page may order goes through [`http`].

mod exposition;
mod history;
pub mod http;
pub(crate) mod page;
pub mod report;
pub mod timeline;
mod together;
pub mod trace;
mod watcher;

pub use history::{Balance, Line, Sample};
pub use together::Served;
pub use watcher::{Seen, Watcher};
