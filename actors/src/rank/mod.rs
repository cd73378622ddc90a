//! A rank worker's actor and its step loop.
