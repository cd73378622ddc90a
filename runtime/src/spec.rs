//! What users ask the cluster for: actor specs, resources, restart policies.
