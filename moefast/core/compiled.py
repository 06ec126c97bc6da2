"""Numba's `njit` with a cache that may be stale, damaged, unwritable or absent and never gives wrong code or an error.

Design: Numba keys a cached function on the source file of that function alone, although constants and functions of
other files are compiled into it; here the key is the content of all files that may be. Machine code is kept with its
SHA-256, and with the sources and types that it belongs to: two processes that compile a function at the same time for
different types give both codes the same name, and the index of one may come to stand beside the code of the other. What
cannot be read is removed and compiled again; what cannot be written is compiled in every process, which costs some
twenty seconds and nothing else.

Functions are compiled into those that call them. Left alone, a call goes to whichever copy of the callee a process has:
the one inside its caller, if it was read from the cache, or the one that was compiled before, which is optimised on its
own and sums in another order. Then the first run of a machine would have other last digits than the second.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import caching

__all__ = ["cache_place", "njit"]

_LOG = logging.getLogger(__name__)
_DIGEST = 32

_told: set[str] = set()


def _say(text: str) -> None:
    """Tell something once in a process."""
    if text not in _told:
        _told.add(text)
        _LOG.warning(text)


def _sources(function: Callable[..., Any]) -> str:
    """SHA-256 of what may be compiled into a function: the files beside it, and those of functions that it may call."""
    beside = Path(function.__code__.co_filename).absolute().parent.glob("*.py")
    files = {str(path) for path in beside} | _called(function, set())
    return hashlib.sha256("".join(map(_content, sorted(files))).encode()).hexdigest()


def _called(function: Callable[..., Any], files: set[str]) -> set[str]:
    """Files of the compiled functions that a module knows, and of those that theirs know."""
    file = os.path.abspath(function.__code__.co_filename)
    if file not in files:
        files.add(file)
        for value in list(function.__globals__.values()):
            if (other := getattr(value, "py_func", None)) is not None:
                _called(other, files)
    return files


@functools.cache
def _content(file: str) -> str:
    return os.path.basename(file) + hashlib.sha256(Path(file).read_bytes()).hexdigest()


class _InHome(caching.UserWideCacheLocator):
    """Numba's folder in the user's home."""

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> Any:
        """None without a home: its folder would be called `~`, in the working folder."""
        found = cls(py_func, py_file)
        return super().from_function(py_func, py_file) if os.path.isabs(found.get_cache_path()) else None


class _InTemporaryFolder(caching.UserWideCacheLocator):
    """A folder for temporary files that belongs to this user alone: where neither package nor home can be written."""

    def __init__(self, py_func: Callable[..., Any], py_file: str) -> None:
        super().__init__(py_func, py_file)
        user = os.getuid() if hasattr(os, "getuid") else "user"
        self._folder = os.path.join(tempfile.gettempdir(), f"moefast-compiled-{user}")
        self._cache_path = os.path.join(self._folder, self.get_suitable_cache_subpath(py_file))

    def ensure_cache_path(self) -> None:
        """Refuse a folder that somebody else made: machine code in it would be run."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._folder, 0o700)
        status = os.lstat(self._folder)
        mine = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
        if not (stat.S_ISDIR(status.st_mode) and mine):
            raise PermissionError(f"{self._folder} belongs to somebody else")
        super().ensure_cache_path()


class _Place(caching.CompileResultCacheImpl):
    """Where the code of a function is kept: NUMBA_CACHE_DIR, beside its source, in the home, with temporary files."""

    _locator_classes = [  # noqa: RUF012 - of the base class
        caching.UserProvidedCacheLocator,
        caching.InTreeCacheLocator,
        _InHome,
        _InTemporaryFolder,
    ]


class _Files(caching.IndexDataCacheFile):
    """Index and code of a function, each with its SHA-256; code with the sources and the types that it belongs to."""

    def save(self, key: Any, data: Any) -> None:
        """Keep the code for some types."""
        super().save(key, (self._source_stamp, key, data))

    def load(self, key: Any) -> Any:
        """The code for some types; None if there is none, or if what has its name is other code."""
        found = super().load(key)
        if found is None:
            return None
        stamp, compiled_for, data = found
        return data if (stamp, compiled_for) == (self._source_stamp, key) else None

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception as error:
            # Unpickling damaged bytes raises nearly anything.
            _LOG.info("%s is damaged (%s) and made again", self._index_path, error)
            with contextlib.suppress(OSError):
                os.unlink(self._index_path)
            return {}

    def _save_data(self, name: str, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(content).digest() + content)

    def _load_data(self, name: str) -> Any:
        content = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            raise OSError("the code is damaged")
        return caching.pickle.loads(content[_DIGEST:])


class _Cache(caching.FunctionCache):
    """Numba's cache of one function, for which no fault of the cache is an error."""

    _impl_class = _Place

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # Text, so that files of Numba's own keys are stale to us, and ours to Numba; "2" is the form of our files.
        stamp = "moefast 2 " + _sources(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for these types; None if it must be compiled."""
        found = None
        try:
            found = super().load_overload(sig, target_context)
        except Exception as error:
            _LOG.info("cached code of %s cannot be used (%s) and is made again", self._name, error)
        if found is None:
            _say("compiling for this machine, about 20 s; the next run will not need it")
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code for these types, if there is room."""
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _say(
                f"compiled code cannot be kept in {self._cache_path} ({error}): every run will compile it anew"
            )


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Numba's `njit`; `cache=True` keeps code as this module's head says.

    Parameters
    ----------
    **options
        Those of `numba.njit`.
    """
    cached = options.pop("cache", False)

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(forceinline=True, **options)(function)
        if cached:
            try:
                dispatcher._cache = _Cache(function)
            except (RuntimeError, OSError) as error:
                _LOG.info("no place for compiled code: %s", error)
                _say("compiled code can be kept nowhere, so every run takes 20 s more: set NUMBA_CACHE_DIR")
        return dispatcher

    return decorate


def cache_place(dispatcher: Any) -> str:
    """Folder that keeps the code of a function made by `njit`; "" if there is none."""
    return str(getattr(dispatcher._cache, "cache_path", None) or "")
