"""Numbers and tables as plain text."""

import pytest

from moefast.core.text import counted


@pytest.mark.parametrize(
    ("n", "words", "text"),
    [
        (0, ("star",), "0 stars"),
        (1, ("star",), "1 star"),
        (2, ("star",), "2 stars"),
        (1, ("spectrum",), "1 spectrum"),
        (12_000, ("spectrum",), "12,000 spectra"),
        (1, ("good spectrum", "good spectra"), "1 good spectrum"),
        (3, ("good spectrum", "good spectra"), "3 good spectra"),
    ],
)
def test_one_thing_is_not_said_as_several(n, words, text):
    assert counted(n, *words) == text
