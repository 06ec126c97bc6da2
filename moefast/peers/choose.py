"""The peers by name. The command line, evaluations and benchmarks iterate over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moefast.core.errors import InputError
from moefast.peers.cannon import LABELLED, quadratic_of_set
from moefast.peers.full_spectrum import EmulatorModel
from moefast.peers.least_squares import SpectralModel

__all__ = ["PEERS", "Peer", "peer"]


@dataclass(frozen=True)
class Peer:
    """A method of others.

    Attributes
    ----------
    name : str
        As in `--peer`.
    what : str
        What it is, in one line.
    open : callable
        Name of a reference set -> its model of spectra.
    """

    name: str
    what: str
    open: Callable[[str], SpectralModel]


PEERS = {
    one.name: one
    for one in (
        Peer("chi2", "full-spectrum fit of the emulator, five labels and a scale", lambda _: EmulatorModel()),
        Peer(
            "cannon",
            f"quadratic model of {LABELLED} labelled stars with noise, fitted likewise",
            quadratic_of_set,
        ),
    )
}
"""By name."""


def peer(name: str) -> Peer:
    """The peer of that name.

    Raises
    ------
    InputError
    """
    if name not in PEERS:
        raise InputError(f"peer {name!r} is unknown; choose one of {', '.join(PEERS)}")
    return PEERS[name]
