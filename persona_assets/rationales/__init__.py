"""Arms, rationale writers, length matching and audits of training data."""
