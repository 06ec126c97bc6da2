"""What this machine has, what moefast will use, and why not more."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from moefast.backend import cpu_count, cpu_name, cuda_devices, physical_memory, resolve_backend
from moefast.core.errors import BackendError, DisagreementError, MoefastError
from moefast.core.version import __version__

__all__ = ["examine", "format_text"]

PACKAGES = (
    "numpy",
    "scipy",
    "numba",
    "numba-cuda",
    "h5py",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "astropy",
    "pyarrow",
    "click",
)
OPTIONAL = {"numba-cuda", "onnxruntime", "onnxruntime-gpu"}
"""Needed for a GPU only, or one instead of the other."""


def why_no_kernels() -> str:
    """Why the CUDA kernels cannot be launched here, in words; empty if they can."""
    from moefast.kernels.cuda.trial import require_kernels

    try:
        require_kernels()
    except BackendError as error:
        return str(error)
    return ""


def compare_with_cpu(mixtures: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What the GPU gives for each mixture beside the CPU, in words, and problems: numbers that are others."""
    from moefast.predicting.engines import open_engine

    words: dict[str, str] = {}
    problems: list[str] = []
    for name, mixture in mixtures.items():
        try:
            engine, _ = open_engine(mixture, "cuda")
            words[name] = engine.checked or "not compared with the CPU: ONNX Runtime computes it"
        except DisagreementError as error:
            words[name] = str(error)
            problems.append(f"model {name}: {error}")
        except BackendError as error:
            words[name] = f"not compared with the CPU: {error}"
    return words, problems


def installed_packages() -> tuple[dict[str, str], list[str]]:
    """Versions of the packages that there are, and problems: those that are missing or in each other's way."""
    versions: dict[str, str] = {}
    problems: list[str] = []
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in OPTIONAL:
                problems.append(f"package {name} is not installed; reinstall moefast")
    if {"onnxruntime", "onnxruntime-gpu"} <= versions.keys():
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one"
        )
    if not {"onnxruntime", "onnxruntime-gpu"} & versions.keys():
        problems.append("neither onnxruntime-gpu nor onnxruntime is installed; reinstall moefast")
    return versions, problems


def onnx_providers() -> tuple[list[str], list[str]]:
    """Where ONNX Runtime can compute, and problems."""
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers()), []
    except ImportError as error:
        return [], [f"onnxruntime does not import ({error})"]


def known_families() -> tuple[list[str], list[str]]:
    """Families of experts that can be fitted, and problems."""
    try:
        from moefast.experts.protocol import fitted_in_bins
        from moefast.fitting.options import WHOLE

        return [*WHOLE, *sorted(fitted_in_bins())], []
    except Exception as error:  # Whatever a package of others does when it is imported.
        words = f"an installed package with experts cannot be imported: {type(error).__name__}: {error}"
        return [], [words]


def examine() -> dict[str, Any]:
    """Facts for `moefast doctor`, JSON-ready; `problems` is empty if everything works."""
    from moefast.core.compiled import cache_place
    from moefast.kernels.cpu import centre

    versions, problems = installed_packages()
    devices, reason = cuda_devices()
    providers, no_providers = onnx_providers()
    problems += no_providers
    models: dict[str, dict[str, Any]] = {}
    checks: dict[str, str] = {}
    chosen = resolve_backend("auto")
    try:
        from moefast.model import SHIPPED, Model, shipped_path
        from moefast.predicting.engines import open_engine

        shipped = {}
        for name in SHIPPED:
            model = shipped[name] = Model.load(shipped_path(name))
            models[name] = {
                "recipe": model.manifest["recipe"],
                "fitted_on": f"{model.manifest['training']['n_spectra']:,} spectra",
                "pixels": model.mixture.n_pixels,
                "wave": [float(model.mixture.wave[0]), float(model.mixture.wave[-1])],
                "sha256": model.hash,
            }
        # A device alone is not enough: what the first prediction would find out is found out here.
        _, chosen = open_engine(shipped[SHIPPED[0]].mixture, "auto")
        if devices:
            checks, wrong = compare_with_cpu({name: model.mixture for name, model in shipped.items()})
            problems += wrong
    except MoefastError as error:
        problems.append(str(error))
    families, no_families = known_families()
    return {
        "compiled_code": cache_place(centre),
        "moefast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cpu_count(),
        "memory_bytes": physical_memory(),
        "cuda_devices": devices,
        "why_no_cuda": reason,
        "why_no_cuda_kernels": why_no_kernels(),
        "onnxruntime_providers": providers,
        "backend": chosen.name,
        "backend_device": chosen.device,
        "backend_reason": chosen.reason,
        "compared_with_cpu": checks,
        "packages": versions,
        "shipped_models": models,
        "families": families,
        "problems": [*problems, *no_families],
    }


def format_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    gpu = ", ".join(facts["cuda_devices"]) or f"none: {facts['why_no_cuda']}"
    memory = f", {facts['memory_bytes'] / 2**30:.0f} GiB memory" if facts["memory_bytes"] else ""
    lines = [
        f"moefast {facts['moefast']}, Python {facts['python']}, {facts['platform']}",
        f"  CPU      {facts['cpu']}, {facts['cores']} cores{memory}",
        f"  GPU      {gpu}",
        f"  kernels  {facts['why_no_cuda_kernels'] or 'the CUDA kernels can be used'}",
        "  compiled "
        + (facts["compiled_code"] or "code is kept nowhere: every run takes 20 s more; set NUMBA_CACHE_DIR"),
        f"  backend  auto will use {facts['backend']} ({facts['backend_device']}): {facts['backend_reason']}",
        "  packages " + ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
    ]
    lines.append("  families " + ", ".join(facts["families"]) + ": what --families of moefast fit knows")
    for name, model in facts["shipped_models"].items():
        low, high = model["wave"]
        lines.append(
            f"  model    {name}: {model['recipe']}, fitted on {model['fitted_on']}, "
            f"{model['pixels']} pixels {low:.1f}-{high:.1f} Å, sha256 {model['sha256'][:12]}…"
        )
    lines += [f"  on GPU   {name}: {words}" for name, words in facts["compared_with_cpu"].items()]
    lines += [f"  problem  {problem}" for problem in facts["problems"]] or ["  no problems found"]
    return "\n".join(lines)
