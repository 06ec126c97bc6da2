"""The version of moefast, for everything that says by which it was made."""

__all__ = ["__version__"]

__version__ = "0.1.0"
