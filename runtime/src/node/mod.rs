//! The node agent: starts, watches and reaps worker processes.
