//! Storage types of weights and their conversion to f32.
