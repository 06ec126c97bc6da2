"""moefast: surface gravities for millions of faint stellar spectra."""

__version__ = "0.1.0"
