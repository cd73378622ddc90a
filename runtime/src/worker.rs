//! A worker process: hosts the actors that the head creates on it.
