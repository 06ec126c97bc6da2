"""Layouts of spectrum files, each in a file that knows one survey; recognised by content, never by name."""
