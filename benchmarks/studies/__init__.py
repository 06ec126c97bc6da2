"""Measurements behind decisions: what was tried beside what the recipes do."""
