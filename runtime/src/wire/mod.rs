//! Frames, codec and handshake between processes.
