"""The frozen protocol: one ruler for every model, so that every number is comparable with every other."""
