"""What a file names is given, or it is an error; what was never written is no data."""

import errno
import os

import h5py
import numpy as np
import pytest

from moefast.benchmarks.faults.case import run
from moefast.core.errors import InputError
from moefast.core.watched import interrupt_behind
from moefast.kernels import PROJECT_ROWS
from moefast.predicting.files import predict
from moefast.spectra import rows as rows_module
from moefast.spectra.endless_texts import refuse_endless_heaps
from moefast.spectra.quality import Flag
from moefast.spectra.shard import Shard
from moefast.spectra.spectrum_set import open_spectra

ARRAYS = ("flux", "error", "mask", "noisy")
ROWS, PIXELS = 40, 30


def spectra(path, **extra):
    rng = np.random.default_rng(5)
    with h5py.File(path, "w") as file:
        values = {
            "flux": rng.normal(1, 0.1, (ROWS, PIXELS)).astype("f4"),
            "error": rng.uniform(0.1, 0.2, (ROWS, PIXELS)).astype("f4"),
        } | extra
        for name, value in values.items():
            file[f"dataset/arrays/{name}/value"] = value
        file["spectrumdataset/wave"] = np.linspace(7100, 8850, PIXELS)
        file["dataset/params/log_g"] = np.linspace(1, 5, ROWS)
    return values


def replace(path, name, make):
    """Put something else under a name."""
    with h5py.File(path, "r+") as file:
        del file[name]
        make(file)


@pytest.mark.parametrize("name", ["mask/value", "mask", "noisy/value", "noisy"])
@pytest.mark.parametrize("link", [h5py.SoftLink("/gone"), h5py.ExternalLink("gone.h5", "/gone")])
def test_a_link_that_leads_nowhere_is_an_error(name, link, tmp_path):
    path = tmp_path / "s.h5"
    spectra(path, mask=np.ones((ROWS, PIXELS), "u1"), noisy=np.ones((ROWS, PIXELS), "f4"))
    replace(path, f"dataset/arrays/{name}", lambda f: f.__setitem__(f"dataset/arrays/{name}", link))
    with pytest.raises(InputError, match=f"dataset/arrays/{name} is named in the file"):
        Shard(path)


@pytest.mark.parametrize(
    "name", ["dataset/params", "dataset/params/log_g", "spectrumdataset/wave", "dataset"]
)
def test_so_is_one_elsewhere(name, tmp_path):
    path = tmp_path / "s.h5"
    spectra(path)
    replace(path, name, lambda f: f.__setitem__(name, h5py.SoftLink("/gone")))
    with pytest.raises(InputError, match="is named in the file"):
        Shard(path)


def test_a_mask_that_is_damaged_is_an_error(tmp_path):
    path = tmp_path / "s.h5"
    spectra(path, mask=np.ones((ROWS, PIXELS), "u1"))
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file["dataset/arrays/mask/value"].id).addr
    data = bytearray(path.read_bytes())
    data[address : address + 16] = b"\xff" * 16
    path.write_bytes(data)
    with pytest.raises(InputError, match="mask/value is named in the file"):
        Shard(path)


def test_a_mask_group_without_values_is_an_error(tmp_path):
    path = tmp_path / "s.h5"
    spectra(path, mask=np.ones((ROWS, PIXELS), "u1"))
    replace(path, "dataset/arrays/mask/value", lambda f: None)
    with pytest.raises(InputError, match="mask/value is missing"):
        Shard(path)


@pytest.mark.parametrize("name", ["nask", "mas", "m\x61s\xeb"])
def test_a_name_that_is_damaged_is_not_taken_for_absence(name, tmp_path):
    path = tmp_path / "x.h5"
    spectra(path, mask=np.zeros((ROWS, PIXELS), "u1"))
    with h5py.File(path, "r+") as file:
        file.move("dataset/arrays/mask", f"dataset/arrays/{name}")
    with pytest.raises(InputError, match="expected 'mask', from which the name differs"):
        Shard(path)
    with h5py.File(path, "r+") as file:
        file.move(f"dataset/arrays/{name}", "dataset/arrays/sky")
    assert Shard(path).arrays == ("flux", "error")


def test_no_mask_is_no_mask(tmp_path):
    spectra(tmp_path / "s.h5")
    assert Shard(tmp_path / "s.h5").arrays == ("flux", "error")


@pytest.mark.parametrize("chunks", [None, (7, PIXELS), (8, 10)])
@pytest.mark.parametrize("target", ["/dataset/arrays/flux/value", "/elsewhere/under another name"])
@pytest.mark.parametrize("whole_group", [False, True])
def test_arrays_of_another_file_are_read_from_it(chunks, target, whole_group, tmp_path):
    path, other = tmp_path / "s.h5", tmp_path / "deep" / "other.h5"
    other.parent.mkdir()
    values = spectra(path)
    flux = np.arange(ROWS * PIXELS, dtype="f4").reshape(ROWS, PIXELS)
    with h5py.File(other, "w") as file:
        file["something first"] = np.zeros(5000)
        group = file.create_group("flux")
        group.create_dataset("value", data=flux, chunks=chunks)
        file[target] = group["value"]
    name = "dataset/arrays/flux" + ("" if whole_group else "/value")
    source = "/flux" if whole_group else target
    replace(path, name, lambda f: f.__setitem__(name, h5py.ExternalLink("deep/other.h5", source)))
    shard = Shard(path)
    np.testing.assert_array_equal(shard.read("flux", 0, ROWS), flux)
    np.testing.assert_array_equal(shard.read("error", 0, ROWS), values["error"])
    before = shard.fingerprint()
    with h5py.File(other, "r+") as file:
        file["flux/value"][0] += 1
    assert Shard(path).fingerprint() != before


def test_params_of_another_file_are_read_from_it(tmp_path):
    path, other = tmp_path / "s.h5", tmp_path / "other.h5"
    spectra(path)
    with h5py.File(other, "w") as file:
        file["p/log_g"] = np.full(ROWS, 4.5)
    replace(
        path, "dataset/params", lambda f: f.__setitem__("dataset/params", h5py.ExternalLink("other.h5", "/p"))
    )
    np.testing.assert_array_equal(Shard(path).params(["log_g"])["log_g"], np.full(ROWS, 4.5))


@pytest.mark.parametrize("chunks", [(8, PIXELS), (8, 10)])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}])
@pytest.mark.parametrize("name", ["flux", "error", "mask"])
def test_chunks_never_written_hold_no_data(name, chunks, options, tmp_path):
    path = tmp_path / "s.h5"
    values = spectra(path, mask=np.zeros((ROWS, PIXELS), "u1"))

    def partly(file):
        dataset = file.create_dataset(f"dataset/arrays/{name}/value", (ROWS, PIXELS), values[name].dtype,
                                      chunks=chunks, fillvalue=1, **options)  # fmt: skip
        dataset[:16] = values[name][:16]
        dataset[32:, : chunks[1]] = values[name][32:, : chunks[1]]

    replace(path, f"dataset/arrays/{name}/value", partly)
    read = Shard(path).read(name, 3, ROWS)
    expected = values[name][3:].astype(read.dtype)
    absent = np.zeros((ROWS, PIXELS), bool)
    absent[16:32] = True
    absent[32:, chunks[1] :] = True
    expected[absent[3:]] = True if name == "mask" else np.nan
    np.testing.assert_array_equal(read, expected)


def test_a_chunk_whose_place_is_damaged_is_an_error(tmp_path):
    """It is counted among the chunks, and HDF5 reads zeros where it should be."""
    path = tmp_path / "x.h5"
    spectra(path)
    with h5py.File(path, "r+") as file:
        values = file["dataset/arrays/error/value"][()]
        del file["dataset/arrays/error/value"]
        file.create_dataset("dataset/arrays/error/value", data=values, chunks=(20, 10), compression="gzip")
    content = path.read_bytes()
    # Its place in the tree of chunks: row 20, pixel 10, byte 0 of a value.
    place = b"".join(value.to_bytes(8, "little") for value in (20, 10, 0))
    assert content.count(place) == 1
    # That of another chunk.
    path.write_bytes(content.replace(place, bytes(24)))
    with pytest.raises(
        InputError, match=r"a chunk lies at \(0, 0\), which is no place, or that of another one"
    ):
        Shard(path)
    path.write_bytes(
        content.replace(
            place, (20).to_bytes(8, "little") + (10 + 10 * 2**24).to_bytes(8, "little") + bytes(8)
        )
    )
    with h5py.File(path) as file:
        assert (file["dataset/arrays/error/value"][20:, 10:20] == 0).all()
    with pytest.raises(InputError, match=r"arrays/error/value: a chunk lies at \(20, 167772170\)"):
        Shard(path)


@pytest.mark.parametrize("chunks", [None, (8, PIXELS)])
def test_an_array_never_written_at_all_is_an_error(chunks, tmp_path):
    path = tmp_path / "s.h5"
    spectra(path)
    name = "dataset/arrays/flux/value"
    replace(path, name, lambda f: f.create_dataset(name, (ROWS, PIXELS), "f4", chunks=chunks))
    with pytest.raises(InputError, match="never written"):
        Shard(path)


def test_labels_never_written_are_none(tmp_path):
    path = tmp_path / "s.h5"
    spectra(path)
    name = "dataset/params/log_g"

    def partly(file):
        file.create_dataset(name, (ROWS,), "f8", chunks=(10,))[:20] = 1

    replace(path, name, partly)
    shard = Shard(path)
    assert shard.columns == ()
    assert "never written" in shard.unreadable["log_g"]


def virtual(path, sources, rows=ROWS):
    layout = h5py.VirtualLayout((rows, PIXELS), "f4")
    for k, source in enumerate(sources):
        span = rows // len(sources)
        layout[k * span : (k + 1) * span] = h5py.VirtualSource(source, "flux", (span, PIXELS))
    name = "dataset/arrays/flux/value"
    replace(path, name, lambda f: f.create_virtual_dataset(name, layout, fillvalue=1))


@pytest.fixture
def parts(tmp_path):
    """A file whose flux is made of four others."""
    spectra(tmp_path / "s.h5")
    flux = np.random.default_rng(8).normal(1, 0.1, (ROWS, PIXELS)).astype("f4")
    for k in range(4):
        with h5py.File(tmp_path / f"part{k}.h5", "w") as file:
            file["flux"] = flux[10 * k : 10 * k + 10]
    virtual(tmp_path / "s.h5", [f"part{k}.h5" for k in range(4)])
    return tmp_path, flux


def test_virtual_datasets_are_read(parts):
    folder, flux = parts
    np.testing.assert_array_equal(Shard(folder / "s.h5").read("flux", 0, ROWS), flux)


@pytest.mark.parametrize("harm", ["gone", "no dataset", "unwritten"])
def test_sources_of_virtual_datasets_that_are_missing_hold_no_data(harm, parts):
    folder, flux = parts
    source = folder / "part2.h5"
    source.unlink()
    if harm != "gone":
        with h5py.File(source, "w") as file:
            if harm == "unwritten":
                file.create_dataset("flux", (10, PIXELS), "f4", chunks=(5, PIXELS))[:5] = 1
    read = Shard(folder / "s.h5").read("flux", 0, ROWS)
    assert np.isnan(read[20:30]).all()
    flux[20:30] = np.nan
    np.testing.assert_array_equal(read, flux)


@pytest.mark.parametrize("harm", ["short", "not HDF5"])
def test_sources_that_are_damaged_are_an_error(harm, parts):
    folder, flux = parts
    (folder / "part2.h5").write_bytes(b"no")
    if harm == "short":
        with h5py.File(folder / "part2.h5", "w") as file:
            file["flux"] = flux[20:25]
    with pytest.raises(InputError, match="cannot be read"):
        Shard(folder / "s.h5").read("flux", 0, ROWS)


def test_series_of_sources_without_end(tmp_path):
    # As detectors write them: part-0, part-1, … are looked for when the file is read.
    path = tmp_path / "s.h5"
    values = spectra(path)
    for k in range(4):
        with h5py.File(tmp_path / f"part-{k}.h5", "w") as file:
            file["flux"] = values["flux"][10 * k : 10 * k + 10]
    name = "dataset/arrays/flux/value"

    def series(file):
        space = h5py.h5s.create_simple((ROWS, PIXELS), (h5py.h5s.UNLIMITED, PIXELS))
        space.select_hyperslab((0, 0), (h5py.h5s.UNLIMITED, 1), (10, 1), (10, PIXELS))
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_virtual(space, b"part-%b.h5", b"flux", h5py.h5s.create_simple((10, PIXELS)))
        h5py.h5d.create(file["dataset/arrays/flux"].id, b"value", h5py.h5t.NATIVE_FLOAT, space, creation)

    replace(path, name, series)
    np.testing.assert_array_equal(Shard(path).read("flux", 0, ROWS), values["flux"])
    (tmp_path / "part-2.h5").unlink()
    with pytest.raises(InputError, match="shape"):
        Shard(path)


@pytest.mark.parametrize("length", [None, 4 * 30 * 20])
def test_bytes_in_other_files_must_be_there(length, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "s.h5"
    values = spectra(path)
    name = "dataset/arrays/flux/value"
    replace(
        path,
        name,
        lambda f: f.create_dataset(
            name, (ROWS, PIXELS), "f4", external=[("flux.bin", 0, h5py.h5f.UNLIMITED)]
        ),
    )
    values["flux"].tofile("flux.bin")
    np.testing.assert_array_equal(Shard(path).read("flux", 0, ROWS), values["flux"])
    if length is None:
        (tmp_path / "flux.bin").unlink()
    else:
        (tmp_path / "flux.bin").write_bytes((tmp_path / "flux.bin").read_bytes()[:length])
    with pytest.raises(InputError, match=r"flux\.bin"):
        Shard(path)


def test_spectra_without_data_get_no_prediction(model, stars, tmp_path):
    path = stars.write(tmp_path / "s.h5")
    name = "dataset/arrays/flux/value"
    with h5py.File(path) as file:
        flux = file[name][:600]
    whole = predict(path, model, limit=600)

    def partly(file):
        n, p = file["dataset/arrays/error/value"].shape
        dataset = file.create_dataset(name, (n, p), "f4", chunks=(100, p), fillvalue=1)
        dataset[:200], dataset[300:600] = flux[:200], flux[300:600]

    replace(path, name, partly)
    columns = predict(path, model, limit=600).columns
    lost = np.zeros(600, bool)
    lost[200:300] = True
    assert len(columns["row"]) == 600 > PROJECT_ROWS
    assert np.isnan(columns["log_g"][lost]).all()
    assert (columns["flag"][lost] & np.uint32(Flag.NO_DATA)).all()
    np.testing.assert_array_equal(columns["log_g"][~lost], whole.columns["log_g"][~lost])
    assert len(open_spectra(path)) > 600


def test_a_damaged_type_is_an_error(tmp_path, monkeypatch):
    # Some flipped bits make h5py raise ValueError or TypeError when it is asked for a type.
    path = tmp_path / "s.h5"
    spectra(path)

    def refuse(*_):
        raise ValueError("Insufficient precision in available types")

    monkeypatch.setattr(h5py.Dataset, "dtype", property(refuse))
    with pytest.raises(InputError, match="damaged"):
        Shard(path)


# -- texts of variable length ------------------------------------------------------------------------------------------


@pytest.fixture
def texts(stars, tmp_path):
    """A file whose identifiers and attributes are texts of variable length, as h5py writes them."""
    path = stars.take(slice(0, 3)).write(tmp_path / "texts.h5", params=[])
    with h5py.File(path, "r+") as file:
        file.attrs["origin"] = "a survey"
        file["dataset/params/id"] = ["one", "two", "three"]
        file["dataset/params/log_g"] = [1.0, 2.0, 3.0]
    return path


def test_texts_of_variable_length_are_read(texts):
    spectra = open_spectra(texts)
    assert spectra.params(["id"])["id"].tolist() == ["one", "two", "three"]
    assert spectra.shards[0].attrs["origin"] == "a survey"


def test_a_collection_of_texts_without_end_is_an_error(texts, tmp_path):
    """HDF5 goes on for ever at an object of no size; nothing in the process could stop it."""
    content = texts.read_bytes()
    at = content.find(b"GCOL")
    assert at > 0

    def work():
        print(open_spectra(texts).params(["id"]))

    for length in (0, 2**64 - 16, 10**9):
        # The size of the first object, and its number, which 0 makes room that is left.
        changed = bytearray(content)
        changed[at + 16 : at + 18] = b"\0\0"
        changed[at + 24 : at + 32] = length.to_bytes(8, "little")
        texts.write_bytes(changed)
        ended = run(work, tmp_path / "log")
        assert ended.code == 3, ended.said
        assert f"texts.h5: texts of variable length, at byte {at}, are damaged" in ended.said


def test_numbers_are_not_looked_through_for_texts(texts):
    """What looks like a collection among the fluxes is none."""
    with h5py.File(texts, "r+") as file:
        dataset = file["dataset/arrays/flux/value"]
        dataset[0, :6] = np.frombuffer(b"GCOL\x01\0\0\0" + bytes([32]) + bytes(15), np.float32)
    assert open_spectra(texts).n_rows == 3
    with h5py.File(texts) as file, pytest.raises(InputError, match="are damaged"):
        refuse_endless_heaps(file)


class _Interrupt(BaseException):
    pass


def _behind(interrupt):
    try:
        raise SystemError("a function returned a result with an exception set") from interrupt
    except SystemError as error:
        return error


def test_an_interrupt_that_a_library_wraps_is_no_damage(texts, monkeypatch):
    """h5py gives its lock back in C: an interrupt there comes out as a SystemError."""

    def struck(*_):
        raise _behind(_Interrupt())

    monkeypatch.setattr("moefast.spectra.structure._find_wave", struck)
    with pytest.raises(_Interrupt):
        Shard(texts)
    monkeypatch.undo()
    shard = Shard(texts)
    monkeypatch.setattr(rows_module.RowReader, "fill", struck)
    with pytest.raises(_Interrupt):
        shard.read("flux", 0, 2)
    assert interrupt_behind(ValueError("damaged")) is None


def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    """Rows that are damaged are marked as lost in the table; those for which there was no memory must not be."""
    spectra(tmp_path / "x.h5")
    shard = Shard(tmp_path / "x.h5")

    def none_left(*_):
        raise MemoryError("none left")

    for name in ("_read_raw", "_read_slabs", "_read_chunks"):
        monkeypatch.setattr(rows_module.RowReader, name, none_left)
    monkeypatch.setattr("moefast.spectra.shard.read_columns", none_left)
    with pytest.raises(MemoryError, match="none left"):
        shard.read("flux", 0, 2)
    with pytest.raises(MemoryError, match="none left"):
        shard.params(["log_g"], 0, 2)


def test_a_file_that_was_only_read_is_closed_quietly(monkeypatch):
    """A shared disk that is gone refuses even that; Python would print the error of a finalizer."""
    handle = os.open(os.devnull, os.O_RDONLY)
    with monkeypatch.context() as patch:

        def refuse(_):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        patch.setattr(os, "close", refuse)
        rows_module._close(handle)
    rows_module._close(handle)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)
