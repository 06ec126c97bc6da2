"""Checksums of FITS files: made, and compared.

Source: FITS standard 4.0, section 4.4.2.7 and appendix J. All words of four bytes of an HDU, its header with the card
CHECKSUM included, add up to -0 in the arithmetic of ones' complement; DATASUM is the sum of its data alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moefast.core.errors import InputError

__all__ = ["add_words", "encode_checksum", "refuse_wrong_checksums"]

_ONES = 0xFFFFFFFF
_PIECE = 1 << 22
_PUNCTUATION = frozenset([*range(0x3A, 0x41), *range(0x5B, 0x61)])
"""Characters between digits and letters, which no encoded checksum may hold."""


def add_words(total: int, data: bytes, at: int = 0) -> int:
    """Add the big-endian words of four bytes to a sum in ones' complement.

    Parameters
    ----------
    total : int
        Sum so far.
    data : bytes
        Need not end with a word.
    at : int
        How many bytes came before them.
    """
    data = bytes(at % 4) + data + bytes(-(at % 4 + len(data)) % 4)
    total += int(np.frombuffer(data, ">u4").sum(dtype=np.uint64))
    while total > _ONES:
        total = (total & _ONES) + (total >> 32)
    return total


def encode_checksum(value: int) -> bytes:
    """Sixteen letters and digits that add `value` to the sum of a header in place of sixteen zeros."""
    letters = bytearray(16)
    for i, byte in enumerate(value.to_bytes(4, "big")):
        quarter, remainder = divmod(byte, 4)
        four = [0x30 + quarter + remainder, *[0x30 + quarter] * 3]
        while _PUNCTUATION.intersection(four):
            for j in (0, 2):
                if _PUNCTUATION.intersection(four[j : j + 2]):
                    four[j] += 1
                    four[j + 1] -= 1
        letters[i::4] = bytes(four)
    # The card begins its value at the last byte of a word.
    return bytes(letters[-1:] + letters[:-1])


def refuse_wrong_checksums(path: Path, hdus: Any) -> None:
    """Compare the checksums of all HDUs that have any with what the file holds.

    Parameters
    ----------
    path : Path
        The file.
    hdus : astropy.io.fits.HDUList
        Opened from it.

    Raises
    ------
    InputError
        One does not fit.
    """
    with open(path, "rb") as file:
        for number, hdu in enumerate(hdus):
            kept = [name for name in ("CHECKSUM", "DATASUM") if name in hdu.header]
            if not kept:
                continue
            place = hdu.fileinfo()
            file.seek(place["hdrLoc"])
            left = place["datLoc"] + place["datSpan"] - place["hdrLoc"]
            total = 0
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                total = add_words(total, piece)
                left -= len(piece)
            if left or total != _ONES or len(kept) < 2:
                raise InputError(
                    f"{path}: the checksum of HDU {number} ({hdu.name or 'without a name'}) does not fit what the file "
                    "holds: damaged, or changed by a program that left the old CHECKSUM; copy or produce it again, or "
                    "write it with new checksums (astropy: writeto(…, checksum=True))"
                )
