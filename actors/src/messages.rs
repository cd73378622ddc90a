//! All messages between the product's actors.
