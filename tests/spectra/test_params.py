"""The params table, as pandas and others write it; names are read without unpickling."""

from __future__ import annotations

import os
import pickle

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moefast.core.errors import InputError
from moefast.spectra import Shard
from moefast.spectra.params import names_from_pickle, param_columns

N = 9


def frame(n=N):
    """Some 35 columns as a full simulation has them: mostly all-NaN floats, integers, one-byte strings."""
    rng = np.random.default_rng(3)
    columns = {
        name: rng.random(n) for name in ("T_eff", "log_g", "M_H", "a_M", "C_M", "mag", "redshift", "snr")
    }
    columns |= {f"empty_{k}": np.full(n, np.nan) for k in range(20)}
    columns |= {
        "id": np.arange(n) * 7,
        "random_seed": rng.integers(0, 2**31, n),
        "small": np.arange(n, dtype="i2"),
    }
    columns |= {"float32": rng.random(n).astype("f4"), "clouded": np.arange(n) % 2 == 0}
    columns |= {"interp_param": ["a"] * n, "target": [f"star {k}" for k in range(n)]}
    return pd.DataFrame(columns)


def add_spectra(path, n=N):
    with h5py.File(path, "a") as file:
        for array in ("flux", "error"):
            file[f"dataset/arrays/{array}/value"] = np.ones((n, 4))
        file["spectrumdataset/wave"] = np.arange(4.0)
    return Shard(path)


def check(shard, expected, absent=()):
    found = shard.params()
    assert set(found) == set(expected.columns) - set(absent)
    for name, values in found.items():
        if expected[name].dtype.kind in "biuf":
            np.testing.assert_array_equal(values, expected[name].to_numpy(), err_msg=name)
            assert values.dtype.isnative
        else:
            assert values.dtype.kind == "U"
            assert list(values) == list(expected[name])


@pytest.mark.parametrize("data_columns", [None, ["log_g", "target", "id"], True])
def test_pandas_tables(tmp_path, data_columns):
    expected = frame()
    path = tmp_path / "a.h5"
    expected.to_hdf(path, key="dataset/params", format="table", data_columns=data_columns)
    shard = add_spectra(path)
    assert not shard.unreadable
    check(shard, expected)
    part = shard.params(["target", "log_g", "clouded"], 2, 5)
    assert list(part) == ["target", "log_g", "clouded"]
    assert part["clouded"].dtype == bool
    assert list(part["target"]) == ["star 2", "star 3", "star 4"]


def test_pandas_tables_that_were_appended_to(tmp_path):
    expected = frame()
    path = tmp_path / "a.h5"
    with pd.HDFStore(path, "w") as store:
        store.append("dataset/params", expected[:5], format="table")
        store.append("dataset/params", expected[5:], format="table")
    check(add_spectra(path), expected)


@pytest.mark.filterwarnings("ignore::pandas.errors.PerformanceWarning")
def test_pandas_fixed_frames(tmp_path):
    expected = frame()
    expected.to_hdf(tmp_path / "a.h5", key="dataset/params", format="fixed")
    shard = add_spectra(tmp_path / "a.h5")
    # Text is a pickle in this format, whatever it holds.
    check(shard, expected, absent=["interp_param", "target"])
    assert set(shard.unreadable) == {"interp_param", "target"}
    with pytest.raises(InputError, match="column 'target' has type object"):
        shard.params(["target"])


def test_categories_are_refused_rather_than_read_as_codes(tmp_path):
    table = pd.DataFrame({"log_g": np.arange(N) * 1.0, "arm": pd.Categorical(["mr", "b", "mr"] * 3)})
    table.to_hdf(tmp_path / "a.h5", key="dataset/params", format="table", data_columns=["arm"])
    shard = add_spectra(tmp_path / "a.h5")
    assert shard.columns == ("log_g",)
    with pytest.raises(InputError, match="category"):
        shard.params(["arm"])


def test_times(tmp_path):
    times = pd.date_range("2026-01-01", periods=N, freq="s")
    pd.DataFrame({"log_g": np.ones(N), "time": times}).to_hdf(
        tmp_path / "a.h5", key="dataset/params", format="table"
    )
    np.testing.assert_array_equal(add_spectra(tmp_path / "a.h5").params(["time"])["time"], times.to_numpy())


def test_plain_compound_and_loose_columns(tmp_path):
    table = np.zeros(N, [("log_g", ">f8"), ("id", ">i4"), ("name", "S4"), ("three", "f4", (3,))])
    table["log_g"], table["id"], table["name"] = np.arange(N), np.arange(N), b"abc"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["dataset/params"] = table
    shard = add_spectra(tmp_path / "a.h5")
    assert set(shard.columns) == {"log_g", "id", "name"}
    assert "several values per row" in shard.unreadable["three"]
    assert list(shard.params()["name"]) == ["abc"] * N
    with h5py.File(tmp_path / "b.h5", "w") as file:
        for name in ("log_g", "id"):
            file[f"dataset/params/{name}"] = table[name]
    shard = add_spectra(tmp_path / "b.h5")
    assert set(shard.columns) == {"log_g", "id"}
    np.testing.assert_array_equal(shard.params()["log_g"], np.arange(N))
    assert shard.params()["log_g"].dtype.isnative


# -- names -----------------------------------------------------------------------------------------------------

names_lists = st.lists(st.text(max_size=12), max_size=8)


@given(names_lists, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_names_of_any_protocol(names, protocol):
    assert names_from_pickle(pickle.dumps(names, protocol)) == names


@given(names_lists)
def test_repeated_names_come_from_the_memo(names):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert names_from_pickle(pickle.dumps(names + names, protocol)) == names + names


def test_names_of_python_2():
    assert names_from_pickle(b"(lp1\nS'T_eff'\np2\naS'log_g'\np3\na.") == ["T_eff", "log_g"]
    assert names_from_pickle(b"\x80\x02]q\x01(U\x05T_effq\x02U\x05log_gq\x03e.") == ["T_eff", "log_g"]


class Hostile:
    def __repr__(self):
        # Tests are named after it; an address would be another name in every process.
        return "Hostile()"

    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize(
    "value",
    [
        Hostile(),
        [Hostile()],
        ["a", Hostile()],
        ["a", 1],
        ("a",),
        "a",
        {"a": 1},
        [["a"]],
        [b"a"],
        None,
        [np.str_("a")],
    ],
    ids=repr,
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_anything_but_a_list_of_strings_is_refused(tmp_path, monkeypatch, value, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"list of strings|list of names"):
        names_from_pickle(pickle.dumps(value, protocol))
    assert not (tmp_path / "hostile").exists()


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_garbage_is_refused_or_a_list_of_strings(data):
    try:
        names = names_from_pickle(data)
    except ValueError:
        return
    assert all(isinstance(name, str) for name in names)


@given(names_lists, st.integers(0, 200), st.integers(0, 255), st.integers(0, 5))
@settings(max_examples=300)
def test_damaged_pickles_are_refused_or_a_list_of_strings(names, position, value, protocol):
    data = bytearray(pickle.dumps(names, protocol))
    data[position % len(data)] = value
    test_garbage_is_refused_or_a_list_of_strings.hypothesis.inner_test(bytes(data))


def test_a_hostile_attribute_costs_its_own_columns_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = frame()
    path = tmp_path / "a.h5"
    expected.to_hdf(path, key="dataset/params", format="table")
    with h5py.File(path, "r+") as file:
        table = file["dataset/params/table"]
        field = next(f for f in table.dtype.names if table.dtype[f].base == np.dtype("i8") and f != "index")
        table.attrs[f"{field}_kind"] = np.bytes_(pickle.dumps([Hostile()], 0))
    shard = add_spectra(path)
    assert not (tmp_path / "hostile").exists()
    assert set(shard.unreadable) == {field}
    assert "cannot be read safely" in shard.unreadable[field]
    check(shard, expected, absent=["id", "random_seed"])
    with pytest.raises(InputError, match="no column 'id'"):
        shard.params(["id"])


def test_fewer_names_than_columns(tmp_path):
    path = tmp_path / "a.h5"
    frame().to_hdf(path, key="dataset/params", format="table")
    with h5py.File(path, "r+") as file:
        table = file["dataset/params/table"]
        field = next(f for f in table.dtype.names if table.dtype[f].shape == (28,))
        table.attrs[f"{field}_kind"] = np.bytes_(pickle.dumps(["T_eff"], 0))
    assert "28 columns but 1 names" in add_spectra(path).unreadable[field]


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,9}", fullmatch=True).filter(lambda name: name != "index"),
            st.sampled_from(["f8", "f4", "i8", "i4", "u1", "?", "U"]),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda column: column[0],
    ),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_of_pandas(tmp_path, columns, n, random):
    data = {}
    for name, kind in columns:
        if kind == "U":
            data[name] = [
                "".join(random.choice("abcé ") for _ in range(random.randint(1, 5))) for _ in range(n)
            ]
            data[name] = [text.strip() or "x" for text in data[name]]
        elif kind.startswith("f"):
            data[name] = np.array([random.choice([np.nan, random.random()]) for _ in range(n)], kind)
        else:
            data[name] = np.array([random.randint(0, 1) for _ in range(n)]).astype(kind)
    expected = pd.DataFrame(data)
    path = tmp_path / "any.h5"
    path.unlink(missing_ok=True)
    own = [name for name, _ in columns if random.random() < 0.3]
    expected.to_hdf(path, key="dataset/params", format="table", data_columns=own)
    check(add_spectra(path, n), expected)


def test_no_params(tmp_path):
    shard = add_spectra(tmp_path / "a.h5")
    assert shard.columns == ()
    assert shard.params() == {}
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        assert param_columns(file) == {}
        file["dataset/params"] = np.ones(N)
        assert param_columns(file) == {}
