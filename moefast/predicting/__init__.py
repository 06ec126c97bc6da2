"""Streaming prediction: blocks of spectra in, rows of a table out."""
