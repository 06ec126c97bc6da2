"""The ground floor: what every other room needs and what needs nothing of the house."""
