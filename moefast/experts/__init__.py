"""Experts: linear ones with the sufficient statistics that they come from, trees, a convolutional network."""
