"""The soft gate: features, networks."""
