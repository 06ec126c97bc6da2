"""What the physics allows: the R² that no model can exceed, by Fisher information and by Bayes."""
