//! What one step computes: the flat tokens of its sequences.
