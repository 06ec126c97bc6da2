"""The elements of the synthesis: masses, ionisation energies, solar abundances, partition functions.

Sources: solar abundances log N(X)/N(H) + 12 from Asplund, Grevesse, Sauval & Scott (2009, ARA&A 47,
481); partition functions log10 U at theta = 5040 K / T = 0.2, 0.4, ..., 2.0 from Gray (2005, "The
Observation and Analysis of Stellar Photospheres", table D.2, said to be good to 1 %); ionisation
energies from the NIST atomic spectra database.
"""

from __future__ import annotations

import numpy as np

THETA = np.round(np.arange(0.2, 2.01, 0.2), 1)

# name mass chi[eV] solar | log U I at THETA | log U II at THETA
_TABLE = """
H  1.008 13.598 12.00 | .368 .303 .301 .301 .301 .301 .301 .301 .301 .301 | 0 0 0 0 0 0 0 0 0 0
He 4.003 24.587 10.93 | 0 0 0 0 0 0 0 0 0 0 | .301 .301 .301 .301 .301 .301 .301 .301 .301 .301
C 12.011 11.260 8.43 | 1.163 1.037 .994 .975 .964 .958 .954 .951 .950 .948 | .853 .782 .775 .774 .773 .772 .771 .770 .769 .767
N 14.007 14.534 7.83 | 1.060 .729 .645 .616 .606 .603 .602 .602 .602 .602 | 1.073 .993 .965 .953 .946 .942 .939 .937 .934 .932
O 15.999 13.618 8.69 | 1.095 .991 .964 .953 .947 .944 .941 .939 .937 .935 | .895 .655 .614 .604 .602 .602 .602 .602 .602 .602
Na 22.990 5.139 6.24 | 4.316 1.043 .493 .357 .320 .309 .307 .306 .306 .306 | 0 0 0 0 0 0 0 0 0 0
Mg 24.305 7.646 7.60 | 2.839 .478 .110 .027 .007 .002 .001 .001 .001 0 | .537 .326 .304 .301 .301 .301 .301 .301 .301 .301
Al 26.982 5.986 6.45 | 2.208 .973 .806 .774 .768 .767 .766 .764 .762 .760 | .488 .053 .006 0 0 0 0 0 0 0
Si 28.086 8.152 7.51 | 1.521 1.111 1.030 .996 .976 .961 .949 .940 .932 .925 | .900 .778 .764 .759 .755 .750 .746 .741 .736 .731
P 30.974 10.487 5.41 | 1.010 .886 .755 .684 .645 .624 .613 .607 .604 .603 | 1.091 1.027 .984 .956 .936 .921 .909 .898 .889 .881
S 32.06 10.360 7.12 | 1.153 1.036 .990 .965 .949 .937 .929 .921 .915 .910 | .967 .792 .688 .640 .618 .608 .604 .603 .602 .602
K 39.098 4.341 5.03 | 4.647 1.329 .642 .429 .351 .320 .308 .303 .302 .302 | 0 0 0 0 0 0 0 0 0 0
Ca 40.078 6.113 6.34 | 5.238 1.332 .465 .181 .073 .028 .010 .003 .001 0 | .825 .658 .483 .391 .344 .320 .309 .304 .302 .301
Sc 44.956 6.561 3.15 | 4.674 2.078 1.422 1.181 1.077 1.027 1.002 .989 .982 .977 | 1.911 1.595 1.483 1.413 1.362 1.322 1.290 1.265 1.244 1.227
Ti 47.867 6.828 4.95 | 4.159 2.333 1.818 1.596 1.480 1.411 1.367 1.337 1.316 1.300 | 2.237 1.995 1.872 1.797 1.746 1.708 1.678 1.653 1.632 1.613
V 50.942 6.746 3.93 | 4.497 2.408 1.945 1.770 1.681 1.625 1.584 1.552 1.525 1.502 | 2.355 2.023 1.832 1.720 1.648 1.597 1.560 1.531 1.507 1.487
Cr 51.996 6.767 5.64 | 4.284 1.977 1.380 1.141 1.022 .956 .917 .892 .875 .865 | 1.981 1.489 1.125 .944 .856 .813 .793 .784 .781 .780
Mn 54.938 7.434 5.43 | 4.804 1.640 1.037 .865 .808 .788 .781 .779 .778 .778 | 2.056 1.319 1.052 .940 .889 .866 .855 .850 .848 .848
Fe 55.845 7.902 7.50 | 3.760 2.049 1.664 1.519 1.446 1.402 1.372 1.350 1.332 1.317 | 2.307 1.881 1.749 1.682 1.638 1.604 1.575 1.549 1.525 1.504
Co 58.933 7.881 4.99 | 3.431 2.012 1.716 1.598 1.529 1.478 1.437 1.402 1.371 1.344 | 2.017 1.714 1.606 1.531 1.470 1.418 1.373 1.334 1.300 1.269
Ni 58.693 7.640 6.22 | 2.779 1.753 1.577 1.521 1.490 1.467 1.447 1.428 1.410 1.394 | 1.659 1.386 1.215 1.108 1.037 .988 .953 .927 .908 .893
Rb 85.468 4.177 2.52 | 6.046 1.963 .890 .518 .378 .325 .307 .303 .304 .305 | .003 0 0 0 0 0 0 0 0 0
Sr 87.62 5.695 2.87 | 5.005 1.441 .548 .229 .098 .041 .016 .005 .001 0 | 1.115 .658 .462 .375 .334 .315 .306 .303 .301 .301
Y 88.906 6.217 2.21 | 1.716 1.704 1.379 1.183 1.073 1.011 .975 .953 .939 .929 | 1.784 1.521 1.370 1.272 1.201 1.144 1.097 1.055 1.017 .982
Zr 91.224 6.634 2.58 | 3.289 2.170 1.814 1.630 1.513 1.430 1.366 1.315 1.273 1.237 | 2.367 2.002 1.849 1.744 1.662 1.593 1.534 1.483 1.438 1.398
Ba 137.327 5.212 2.18 | 3.036 1.842 1.096 .672 .419 .264 .166 .103 .062 .037 | 1.585 .932 .791 .699 .623 .558 .504 .460 .424 .396
"""  # noqa: E501 - one element per line is easier to check against the source
# Ni II at theta 0.8 is 1.198 in the copy consulted, which breaks the sequence: taken as 1.108.

_rows = [[part.split() for part in line.split("|")] for line in _TABLE.strip().splitlines()]
NAMES: tuple[str, ...] = tuple(row[0][0] for row in _rows)
MASSES = np.array([float(row[0][1]) for row in _rows])
IONISATION_EV = np.array([float(row[0][2]) for row in _rows])
SOLAR = np.array([float(row[0][3]) for row in _rows])
LOG_U = np.array([[[float(u) for u in part] for part in row[1:]] for row in _rows])  # (element, stage, theta)

ATOMIC_NUMBERS = dict(
    H=1, He=2, C=6, N=7, O=8, Na=11, Mg=12, Al=13, Si=14, P=15, S=16, K=19, Ca=20, Sc=21, Ti=22, V=23,
    Cr=24, Mn=25, Fe=26, Co=27, Ni=28, Rb=37, Sr=38, Y=39, Zr=40, Ba=56,
)  # fmt: skip
ALPHA_ELEMENTS = ("O", "Mg", "Si", "S", "Ca", "Ti")
INDEX = {name: i for i, name in enumerate(NAMES)}


def abundances(m_h: float, a_m: float, c_m: float) -> np.ndarray:
    """Number of atoms per hydrogen atom, array of shape (n_elements,).

    Parameters
    ----------
    m_h : float
        [M/H], dex: all elements beyond helium.
    a_m : float
        [a/M], dex: O, Mg, Si, S, Ca, Ti on top of it.
    c_m : float
        [C/M], dex: carbon on top of it.
    """
    log_n = SOLAR - 12.0
    log_n[2:] += m_h
    log_n[[INDEX[name] for name in ALPHA_ELEMENTS]] += a_m
    log_n[INDEX["C"]] += c_m
    return 10.0**log_n


def partition_functions(temperature: np.ndarray) -> np.ndarray:
    """U(T), shape (n_depths, n_elements, 2); log U is linear in theta between the table's points."""
    theta = np.clip(5040.0 / np.asarray(temperature), THETA[0], THETA[-1])
    j = np.clip(((theta - 0.2) / 0.2).astype(int), 0, len(THETA) - 2)
    x = (theta - THETA[j]) / 0.2
    return 10.0 ** np.moveaxis(LOG_U[:, :, j] * (1 - x) + LOG_U[:, :, j + 1] * x, 2, 0)
