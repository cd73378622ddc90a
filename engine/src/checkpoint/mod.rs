//! Hugging Face checkpoint directories: what is in them, and whether it is what the model needs.
