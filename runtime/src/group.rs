//! Groups of ranks and their views.
