"""Milestones: their marks, and what evaluations say about each."""
