"""The params table of a spectrum file: one value per spectrum and column, in any of the shapes found.

Design: pandas stores the *names* of its columns as pickles in HDF5 attributes. Unpickling runs code, so the
names are taken from the opcodes of the pickle by a stack machine that knows lists of strings and nothing
else; anything more makes those columns unreadable, with the reason, and leaves the others alone. Column
order and presence are never assumed.

Four shapes are understood, all below ``dataset/params``: a pandas "table" (group with a compound dataset
``table``), a pandas "fixed" frame (``axis0``, ``block0_items``, ``block0_values``, …), a plain compound
dataset, a group of one-dimensional datasets.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from moefast.spectra.stored import find, gaps_of, lacking_filter

__all__ = [
    "ParamColumn",
    "create_params_table",
    "index_column",
    "names_from_pickle",
    "owners_of_params",
    "param_columns",
    "read_columns",
]

_STRING_OPCODES = frozenset(
    {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
_MARK = object()


@dataclass(frozen=True)
class ParamColumn:
    """Where one column lies.

    Attributes
    ----------
    dataset : str
        Full name of the HDF5 dataset.
    field : str or None
        Field of a compound dataset.
    position : int or None
        Column of a two-dimensional dataset or field.
    n_rows : int
        Number of rows stored.
    stored_as : str
        What pandas noted as the type, "" where it did not ("bool", "datetime64[ns]", "bytes8", …).
    problem : str
        Why the column cannot be read; "" if it can.
    """

    dataset: str
    field: str | None = None
    position: int | None = None
    n_rows: int = 0
    stored_as: str = ""
    problem: str = ""


def _opcodes(data: bytes) -> list[tuple[pickletools.OpcodeInfo, Any]]:
    """Opcodes and arguments of a pickle; nothing is executed."""
    with warnings.catch_warnings():
        # A damaged escape sequence in a string is refused or read, never announced.
        warnings.simplefilter("ignore", DeprecationWarning)
        return [(opcode, argument) for opcode, argument, _ in pickletools.genops(data)]


def names_from_pickle(data: bytes) -> list[str]:
    """Names in a pickled list of strings, read from its opcodes without unpickling.

    Parameters
    ----------
    data : bytes
        A pickle of any protocol.

    Raises
    ------
    ValueError
        If the pickle holds anything other than one list of strings.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument in _opcodes(bytes(data)):
            name = opcode.name
            slot = argument if isinstance(argument, int) else -1
            if name in _STRING_OPCODES:
                stack.append(argument)
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name in {"LIST", "APPENDS"}:
                mark = len(stack) - 1 - stack[::-1].index(_MARK)
                items = stack[mark + 1 :]
                del stack[mark:]
                if name == "LIST":
                    stack.append(items)
                else:
                    stack[-1].extend(items)
            elif name == "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            elif name in {"PUT", "BINPUT", "LONG_BINPUT"}:
                memo[slot] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in {"GET", "BINGET", "LONG_BINGET"}:
                stack.append(memo[slot])
            elif name == "STOP":
                break
            elif name not in {"PROTO", "FRAME"}:
                raise ValueError(f"opcode {name} has no place in a list of names")
    except (IndexError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError("malformed pickle") from error
    if len(stack) != 1 or not isinstance(stack[0], list) or not all(isinstance(x, str) for x in stack[0]):
        raise ValueError("not one list of strings")
    return stack[0]


def _attribute_text(owner: Any, name: str) -> str:
    value = _attribute_bytes(owner, name)
    return "" if value is None else value.decode("utf-8", errors="replace")


def _attribute_bytes(owner: Any, name: str) -> bytes | None:
    if name not in owner.attrs:
        return None
    value = owner.attrs[name]
    if isinstance(value, bytes):
        return bytes(value)
    return value.encode("utf-8", errors="surrogatepass") if isinstance(value, str) else None


def _one_dimensional(dtype: np.dtype) -> str:
    readable = dtype.kind in "biufS" or h5py.check_string_dtype(dtype) is not None
    return "" if readable else f"has type {dtype}, neither a number nor text"


_PLACE = "/dataset/params"


def _cannot_be_read(dataset: h5py.Dataset) -> str:
    return lacking_filter(dataset) or (
        "has rows that were never written" if gaps_of(dataset) is not None else ""
    )


def _table_columns(table: h5py.Dataset, path: str, group: h5py.Group | None) -> dict[str, ParamColumn]:
    columns: dict[str, ParamColumn] = {}
    incomplete = _cannot_be_read(table)
    n_rows = table.shape[0] if table.ndim else 0
    is_pandas = group is not None and ("pandas_type" in group.attrs or "index_cols" in group.attrs)
    for field in table.dtype.names or ():
        if is_pandas and field == "index":
            continue
        dtype = table.dtype[field]
        stored_as = _attribute_text(table, f"{field}_dtype")
        problem = incomplete or _one_dimensional(dtype.base)
        if "category" in _attribute_text(table, f"{field}_meta"):
            problem = "is a pandas category, stored as codes whose meaning lies elsewhere"
        names: list[str] | None = None
        kind = _attribute_bytes(table, f"{field}_kind")
        if kind is not None:
            try:
                names = names_from_pickle(kind)
            except ValueError as error:
                if dtype.shape:
                    problem = f"has column names that cannot be read safely ({error})"
        width = int(np.prod(dtype.shape)) if dtype.shape else 1
        if dtype.shape and names is None:
            problem = problem or "has several values per row and no column names"
        elif names is not None and len(names) != width:
            problem = problem or f"has {width} columns but {len(names)} names"
            names = None
        if len(dtype.shape) > 1:
            problem = problem or f"has values of shape {dtype.shape}"
        if names is None or problem:
            for name in names or [field]:
                columns[name] = ParamColumn(path, field, None, n_rows, stored_as, problem)
            continue
        for position, name in enumerate(names):
            columns[name] = ParamColumn(
                path, field, position if dtype.shape else None, n_rows, stored_as, problem
            )
    return columns


def _fixed_columns(group: h5py.Group) -> dict[str, ParamColumn]:
    columns: dict[str, ParamColumn] = {}
    block = 0
    while f"block{block}_items" in group:
        items, values = group[f"block{block}_items"], find(group, f"block{block}_values")
        label = f"block{block}_values"
        block += 1
        if items.dtype.kind != "S" or not isinstance(values, h5py.Dataset):
            problem = "has column names that are not plain strings"
            columns[label] = ParamColumn(f"{_PLACE}/{label}", problem=problem)
            continue
        names = [name.decode("utf-8", errors="replace") for name in np.atleast_1d(items[()])]
        problem = _cannot_be_read(values) or _one_dimensional(values.dtype)
        shape = values.shape
        stored_as = _attribute_text(values, "value_type")
        if not problem and not (len(shape) == 2 and shape[1] == len(names)):
            problem = f"has shape {shape} for {len(names)} columns"
        n_rows = shape[0] if shape and not problem else 0
        for position, name in enumerate(names):
            columns[name] = ParamColumn(f"{_PLACE}/{label}", None, position, n_rows, stored_as, problem)
    return columns


def param_columns(file: h5py.File) -> dict[str, ParamColumn]:
    """Columns of the params table of an open file, by name; empty where the file has none.

    Raises
    ------
    InputError
        If the file names a table, or a part of it, that cannot be opened.
    """
    node = find(file, _PLACE)
    if isinstance(node, h5py.Dataset):
        return _table_columns(node, _PLACE, None) if node.dtype.names else {}
    if not isinstance(node, h5py.Group):
        return {}
    table = find(node, "table")
    if isinstance(table, h5py.Dataset) and table.dtype.names:
        return _table_columns(table, f"{_PLACE}/table", node)
    if find(node, "block0_items") is not None:
        return _fixed_columns(node)
    children = {name: find(node, name) for name in node}
    return {
        name: ParamColumn(
            f"{_PLACE}/{name}",
            None,
            None,
            child.shape[0],
            "",
            _cannot_be_read(child) or _one_dimensional(child.dtype),
        )
        for name, child in children.items()
        if isinstance(child, h5py.Dataset) and child.ndim == 1 and not child.dtype.names
    }


def owners_of_params(file: h5py.File) -> list[Any]:
    """The params table of an open file, and the datasets directly in it."""
    node = find(file, _PLACE)
    if node is None:
        return []
    inner = [find(node, name) for name in node] if isinstance(node, h5py.Group) else []
    return [node, *(item for item in inner if isinstance(item, h5py.Dataset))]


def index_column(file: h5py.File) -> ParamColumn | None:
    """Where pandas keeps the index of the params table; None if there is none, or it holds no numbers."""
    node = find(file, _PLACE)
    if not isinstance(node, h5py.Group) or "pandas_type" not in node.attrs:
        return None
    table, axis = find(node, "table"), find(node, "axis1")
    if isinstance(table, h5py.Dataset) and "index" in (table.dtype.names or ()):
        column = ParamColumn(f"{_PLACE}/table", "index", None, len(table))
        return column if table.dtype["index"].kind in "iu" else None
    if isinstance(axis, h5py.Dataset) and axis.ndim == 1 and axis.dtype.kind in "iu":
        return ParamColumn(f"{_PLACE}/axis1", None, None, len(axis))
    return None


def _as_seen(values: np.ndarray, stored_as: str) -> np.ndarray:
    """Values in the type that their writer meant, native byte order."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace") if values.size else values.astype("U1")
    if values.dtype.kind == "O":
        # Strings of variable length, which is how h5py writes text.
        text = [
            value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values
        ]
        return np.array(text, dtype=str) if text else np.empty(0, "U1")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if stored_as == "bool":
        return values.astype(bool)
    if stored_as.startswith("datetime64") and values.dtype == np.int64:
        return values.view(stored_as if "[" in stored_as else "datetime64[ns]")
    return values


def read_columns(
    file: h5py.File, columns: Mapping[str, ParamColumn], start: int, stop: int
) -> dict[str, np.ndarray]:
    """Rows `start` to `stop` of readable columns, each an array of shape (stop - start,)."""
    # One read for all fields of a table: each costs half a millisecond, however few rows there are.
    wanted: dict[str, list[str]] = {}
    for column in columns.values():
        fields = wanted.setdefault(column.dataset, [])
        if column.field is not None and column.field not in fields:
            fields.append(column.field)
    blocks = {}
    for name, fields in wanted.items():
        dataset = file[name]
        blocks[name] = (dataset.fields(fields) if fields else dataset)[start:stop]
    out = {}
    for name, column in columns.items():
        values = blocks[column.dataset]
        if column.field is not None:
            # A column of a table is no view that keeps the whole of it in memory.
            values = np.ascontiguousarray(values[column.field])
        if column.position is not None:
            values = np.ascontiguousarray(values[:, column.position])
        out[name] = _as_seen(values, column.stored_as)
    return out


def _pickled_names(names: Sequence[str]) -> np.bytes_:
    """Spell out the protocol-0 pickle of a list of names, which is what pandas wants to find."""
    items = "".join(f"V{name}\na" for name in names)
    return np.bytes_(f"(l{items}.".encode("raw_unicode_escape"))


def _pandas_type(dtype: np.dtype) -> str:
    return f"bytes{8 * dtype.itemsize}" if dtype.kind == "S" else dtype.name


def _set_attribute(owner: Any, name: str, value: Any) -> None:
    if isinstance(value, str):
        # PyTables gives back text only for fixed-length UTF-8; ASCII comes back as bytes and is unpickled
        # where it ends in a full stop.
        owner.attrs.create(name, value.encode(), dtype=h5py.string_dtype("utf-8", len(value.encode())))
    else:
        owner.attrs[name] = value


def create_params_table(file: h5py.File, n_rows: int, columns: Mapping[str, np.dtype]) -> h5py.Dataset:
    """Create ``dataset/params`` as a table that pandas and PyTables read, one field per column.

    Parameters
    ----------
    file : h5py.File
        Open for writing.
    n_rows : int
        Number of rows.
    columns : mapping of str to dtype
        Names and types (numbers, bool or fixed-length byte strings) of the columns.

    Returns
    -------
    h5py.Dataset
        The compound dataset, with the index filled in.
    """
    names = list(columns)
    stored = {name: np.dtype("u1") if columns[name].kind == "b" else columns[name] for name in names}
    row = np.dtype([("index", "<i8"), *((name, stored[name]) for name in names)])
    for group_name in ("/", "dataset", "dataset/params"):
        group = file.require_group(group_name)
        group.attrs["CLASS"] = np.bytes_("GROUP")
        group.attrs["TITLE"] = np.bytes_("")
        group.attrs["VERSION"] = np.bytes_("1.0")
    file.attrs["PYTABLES_FORMAT_VERSION"] = np.bytes_("2.1")

    # PyTables takes a compound dataset for a table only if it is chunked.
    chunk = min(n_rows, max(1, (1 << 18) // row.itemsize))
    table = group.create_dataset("table", (n_rows,), row, chunks=(chunk,), maxshape=(None,))
    attributes: dict[str, Any] = {
        "CLASS": np.bytes_("TABLE"),
        "TITLE": np.bytes_(""),
        "VERSION": np.bytes_("2.7"),
        "NROWS": np.int64(n_rows),
        "index_kind": "integer",
    }
    for position, name in enumerate(row.names or ()):
        attributes[f"FIELD_{position}_NAME"] = np.bytes_(name.encode())
    for name in names:
        attributes[f"{name}_dtype"] = _pandas_type(columns[name])
        attributes[f"{name}_kind"] = _pickled_names([name])
        attributes[f"{name}_meta"] = np.bytes_("N.")
    for key, value in attributes.items():
        _set_attribute(table, key, value)
    for start in range(0, n_rows, chunk):
        stop = min(start + chunk, n_rows)
        rows = np.zeros(stop - start, row)
        rows["index"] = np.arange(start, stop)
        table[start:stop] = rows

    group_attributes: dict[str, Any] = {
        "pandas_type": "frame_table",
        "pandas_version": "0.15.2",
        "table_type": "appendable_frame",
        "encoding": "UTF-8",
        "errors": "strict",
        "nan_rep": "nan",
        "levels": np.int64(1),
        "info": np.bytes_("(dp0\n."),
        "index_cols": np.bytes_("(l(I0\nVindex\nta."),
        "data_columns": _pickled_names(names),
        "values_cols": _pickled_names(names),
        "non_index_axes": np.bytes_(b"(l(I1\n" + bytes(_pickled_names(names))[:-1] + b"ta."),
    }
    for key, value in group_attributes.items():
        _set_attribute(group, key, value)
    return table
