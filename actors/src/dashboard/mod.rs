//! The dashboard: the cluster's one HTTP server for people and tools, by default on 127.0.0.1:8265 as Ray's is.
//!
//! It owns the listener and decides who comes in. What it serves are the routes of other parts, each added with
//! [`Dashboard::with`]; it knows none of them, and never answers for one.

mod door;
mod server;

pub use server::{Dashboard, DashboardArgs, DashboardServer, refuse, url};
