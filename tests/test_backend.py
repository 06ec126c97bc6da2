"""The choice of backend: said aloud, never a silent fallback."""

from __future__ import annotations

import ctypes
import os

import pytest
from click.testing import CliRunner

from moefast import backend, doctor
from moefast.backend import cuda_devices, resolve_backend, resolve_kernels, use_device
from moefast.cli import cli
from moefast.core.errors import BackendError
from moefast.predicting import engines
from moefast.predicting.files import predict
from moefast.protocol.evaluate import evaluate
from moefast.spectra import read_table


def _offer(monkeypatch, devices, reason=""):
    monkeypatch.setattr(backend, "cuda_devices", lambda: (devices, reason))
    monkeypatch.setattr(doctor, "cuda_devices", lambda: (devices, reason))


@pytest.fixture
def no_gpu(monkeypatch):
    _offer(monkeypatch, [], "no NVIDIA driver (libcuda.so.1 not found)")


@pytest.fixture
def broken_gpu(monkeypatch):
    """A driver that offers a device which the kernels cannot use."""
    _offer(monkeypatch, ["Fake H100"])

    def refuse():
        raise BackendError("backend cuda: no usable CUDA device (the driver is too old)")

    # First, for it imports the other module's function, and would keep the stand-in for good.
    monkeypatch.setattr("moefast.kernels.cuda.trial.require_device", refuse)
    monkeypatch.setattr("moefast.kernels.cuda.device.require_device", refuse)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu():
    auto = resolve_backend("auto")
    assert auto.name == "cpu"
    assert "no NVIDIA driver" in auto.reason
    assert auto.device == resolve_backend("cpu").device
    assert "cores" in auto.device
    with pytest.raises(BackendError, match=r"--backend cuda: no NVIDIA driver .*; use --backend cpu"):
        resolve_backend("cuda")


def test_with_a_gpu(monkeypatch):
    _offer(monkeypatch, ["First", "Second"])
    assert resolve_backend("auto").device == "First"
    assert resolve_backend("auto").name == resolve_backend("cuda").name == "cuda"
    assert resolve_backend("cpu").name == "cpu"


def test_unknown_backend():
    with pytest.raises(BackendError, match="'tpu' is unknown; choose one of auto, cpu, cuda"):
        resolve_backend("tpu")


class _Driver:
    """A CUDA driver as far as it is asked."""

    def __init__(self, start=0, count=0, names=()):
        self.start, self.count, self.names = start, count, names
        self.started, self.shown = False, list(names)

    def cuInit(self, _):
        # It reads the variable once, when it starts.
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not self.started and chosen is not None:
            numbers = [int(number) for number in chosen.split(",") if number]
            self.names = [self.shown[number] for number in numbers if number < len(self.shown)]
            if not self.names:
                return 100
        self.started = True
        return self.start

    def cuDeviceGetCount(self, out):
        if not self.started:
            return 3
        out._obj.value = len(self.names)
        return self.count

    def cuDeviceGet(self, out, index):
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, text, size, device):
        text.value = self.names[device.value].encode()
        return 0


@pytest.mark.parametrize(
    ("driver", "names", "reason"),
    [
        (_Driver(start=999), [], "does not start (cuInit error 999)"),
        (_Driver(start=100), [], "offers no device"),
        (_Driver(), [], "offers no device"),
        (_Driver(count=3, names=["x"]), [], "offers no device"),
        (_Driver(names=["NVIDIA H100", "NVIDIA A100"]), ["NVIDIA H100", "NVIDIA A100"], ""),
    ],
)
def test_what_the_driver_says(driver, names, reason, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    found, why = cuda_devices()
    assert found == names
    assert reason in why
    assert bool(why) != bool(found)


@pytest.fixture
def three_gpus(monkeypatch):
    driver = _Driver(names=["GPU A", "GPU B", "GPU C"])
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    # Set first, so that what the code sets is taken back.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    return driver


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("shown", "number", "name", "left"),
    [(None, 1, "GPU B", "1"), ("2,0", 0, "GPU C", "2"), ("2, 0", 1, "GPU A", "0")],
)
def test_the_device_chosen_is_the_only_one_that_the_driver_shows(shown, number, name, left, monkeypatch):
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    use_device(number)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    assert cuda_devices() == ([name], "")
    assert resolve_backend("auto").device == name


@pytest.mark.usefixtures("three_gpus")
def test_a_device_that_is_not_there_is_told(monkeypatch):
    use_device(7)
    assert cuda_devices() == ([], "the NVIDIA driver offers no device with CUDA_VISIBLE_DEVICES=7")
    with pytest.raises(BackendError, match=r"--backend cuda: .*CUDA_VISIBLE_DEVICES=7"):
        resolve_backend("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    with pytest.raises(BackendError, match=r"--device 2: .*CUDA_VISIBLE_DEVICES=2,0 shows 2 of them"):
        use_device(2)


@pytest.mark.usefixtures("three_gpus")
def test_a_driver_that_has_started_keeps_its_devices():
    assert len(cuda_devices()[0]) == 3
    with pytest.raises(BackendError, match="--device 1: the NVIDIA driver has started"):
        use_device(1)


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize("command", ["predict", "evaluate", "fit", "bench", "doctor", "scenarios"])
def test_every_command_that_computes_takes_a_device(command, monkeypatch):
    asked = []

    def refuse(number):
        asked.append(number)
        raise BackendError("chosen")

    monkeypatch.setattr(backend, "use_device", refuse)
    needed = {"bench": [], "doctor": [], "fit": ["x.h5", "-o", "model"]}.get(command, ["x.h5"])
    done = CliRunner().invoke(cli, [command, *needed, "--device", "2"])
    assert asked == [2]
    assert done.exit_code == BackendError.exit_code
    assert "chosen" in done.stderr
    assert "CUDA_VISIBLE_DEVICES" in CliRunner().invoke(cli, [command, "--help"]).output


def test_no_driver(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert cuda_devices() == ([], "no NVIDIA driver (libcuda.so.1 not found)")


@pytest.mark.usefixtures("broken_gpu")
def test_auto_falls_back_and_says_so(stars_file, model, whole, tmp_path):
    summary = predict(stars_file, model, tmp_path / "t.h5", limit=100)
    attrs = read_table(tmp_path / "t.h5")[1]
    assert summary.backend == attrs["backend"] == "cpu"
    assert "Fake" not in summary.device
    for said in (summary.reason, attrs["backend_reason"]):
        assert "Fake H100 was found but cannot be used" in said
        assert "the driver is too old" in said
    assert evaluate(stars_file, model).run["backend"] == "cpu"


@pytest.mark.usefixtures("broken_gpu")
def test_cuda_asked_for_is_cuda_or_an_error(stars_file, model, tmp_path):
    with pytest.raises(BackendError, match="the driver is too old") as caught:
        predict(stars_file, model, tmp_path / "t.h5", backend="cuda")
    assert caught.value.exit_code == 7
    assert not (tmp_path / "t.h5").exists()
    with pytest.raises(BackendError, match="the driver is too old"):
        evaluate(stars_file, model, backend="cuda")


def test_a_device_without_the_packages(model, monkeypatch, stars_file):
    """The real kernels' code, on a machine whose driver claims a device, without the optional packages."""
    _offer(monkeypatch, ["Fake H100"])
    monkeypatch.setattr("moefast.kernels.cuda.device.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"numba-cuda is not installed; pip install 'moefast\[cuda\]'"):
        predict(stars_file, model, backend="cuda")
    found = predict(stars_file, model, limit=2)
    assert found.backend == "cpu"
    assert "numba-cuda is not installed" in found.reason


class _DriverError(Exception):
    """An error of the driver as Numba raises it."""

    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code


_CONTEXTS = {
    "full": (
        _DriverError(2, "Call to cuDevicePrimaryCtxRetain results in OUT_OF_MEMORY"),
        "end other programs",
    ),
    "full, as cuda.core says it": (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: no memory"), "end other programs"),
    "exclusive": (_DriverError(46, "results in CUDA_ERROR_DEVICE_UNAVAILABLE"), "exclusive mode"),
    "another context": (RuntimeError("Numba cannot operate on non-primary CUDA context 1"), "non-primary"),
}


@pytest.fixture(params=_CONTEXTS)
def refused_context(request, monkeypatch):
    """A device that the driver names, but does not let this process in."""
    numba_cuda = pytest.importorskip("numba.cuda")
    pytest.importorskip("numba_cuda")
    error, said = _CONTEXTS[request.param]

    def refuse(*_):
        raise error

    _offer(monkeypatch, ["Fake H100"])
    monkeypatch.setattr(numba_cuda, "current_context", refuse)
    return said


def test_a_context_that_cannot_be_made_is_a_reason_for_the_cpu(model, stars_file, refused_context):
    found = predict(stars_file, model, limit=2)
    assert found.backend == "cpu"
    assert "Fake H100 was found but cannot be used: backend cuda: no usable CUDA device" in found.reason
    assert refused_context in found.reason
    auto = resolve_kernels("auto")
    assert auto.name == "cpu"
    assert refused_context in auto.reason
    for ask in (lambda: predict(stars_file, model, backend="cuda"), lambda: resolve_kernels("cuda")):
        with pytest.raises(BackendError, match=f"no usable CUDA device.*{refused_context}.*use backend cpu"):
            ask()


def test_kernels_that_do_not_compile_are_a_reason_for_the_cpu(model, monkeypatch, stars_file):
    class Broken:
        def __init__(self, *_):
            raise RuntimeError("PTX was compiled with\n an unsupported toolchain")

    _offer(monkeypatch, ["Fake H100"])
    # First, for it imports the module, which would keep the other's stand-in for good.
    monkeypatch.setattr("moefast.kernels.cuda.scoring.CudaScorer", Broken)
    monkeypatch.setattr("moefast.kernels.cuda.device.require_device", lambda: None)
    expected = "the kernels do not run here .RuntimeError: PTX was compiled with an unsupported toolchain"
    with pytest.raises(BackendError, match=expected):
        predict(stars_file, model, backend="cuda")
    found = predict(stars_file, model, limit=2)
    assert found.backend == "cpu"
    assert "unsupported toolchain" in found.reason


def test_a_numpy_that_numba_cuda_does_not_know_is_named():
    from moefast.kernels.cuda.device import first_launch

    expected = r"does not fit numpy .*: pip install 'numpy<2\.5', or use backend cpu"
    with pytest.raises(BackendError, match=expected) as caught, first_launch():
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")
    assert "driver" not in str(caught.value)
    with (
        pytest.raises(BackendError, match=r"update the NVIDIA driver or .*, or use backend cpu"),
        first_launch(),
    ):
        raise AttributeError("'Linker' has no attribute 'add'")


def test_memory_that_is_full_at_the_first_launch_is_named():
    from moefast.kernels.cuda.device import first_launch

    with (
        pytest.raises(BackendError, match="memory is full: end other programs on it") as caught,
        first_launch(),
    ):
        raise _DriverError(2, "results in CUDA_ERROR_OUT_OF_MEMORY")
    assert "driver or pip" not in str(caught.value)


@pytest.mark.usefixtures("no_gpu")
def test_predict_without_a_gpu(stars_file, model):
    assert "no NVIDIA driver" in predict(stars_file, model, limit=2).reason
    assert predict(stars_file, model, limit=2, backend="cpu").reason == "as asked"
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        predict(stars_file, model, backend="cuda")


@pytest.mark.usefixtures("broken_gpu")
def test_doctor_finds_out_what_predict_would(model, monkeypatch):
    monkeypatch.setattr("moefast.model.shipped_path", lambda *_: model.path)
    facts = doctor.examine()
    assert facts["problems"] == []
    assert facts["cuda_devices"] == ["Fake H100"]
    assert facts["backend"] == "cpu"
    text = doctor.format_text(facts)
    assert "GPU      Fake H100" in text
    assert "kernels  backend cuda: no usable CUDA device (the driver is too old)" in text
    assert "auto will use cpu" in text
    assert "the driver is too old" in text


@pytest.mark.usefixtures("no_gpu")
def test_doctor_without_a_gpu(model, monkeypatch):
    monkeypatch.setattr("moefast.model.shipped_path", lambda *_: model.path)
    text = doctor.format_text(doctor.examine())
    assert "GPU      none: no NVIDIA driver" in text
    assert "kernels  backend cuda: " in text or "kernels  the CUDA kernels can be used" in text
    assert "no problems found" in text
    assert "phys-moe, fitted on 1,500 spectra, 1024 pixels 7100.9-8849.1 Å" in text


def test_doctor_names_problems(tmp_path, monkeypatch):
    monkeypatch.setattr("moefast.model.shipped_path", lambda *_: tmp_path)
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "a-package-that-is-not-there"))
    problems = " ".join(doctor.examine()["problems"])
    for words in ("a-package-that-is-not-there is not installed", "neither onnxruntime", "no manifest.json"):
        assert words in problems


@pytest.mark.gpu
def test_the_gpu_gives_the_numbers_of_the_cpu(stars_file, model, whole):
    if not cuda_devices()[0]:
        pytest.skip("no CUDA device")
    found = predict(stars_file, model, backend="cuda").columns
    assert abs(found["log_g"] - whole.columns["log_g"]).max() < 1e-4
    assert engines.resolve_backend("auto").name == "cuda"
