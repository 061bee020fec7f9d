"""The machine and versions recorded with a run, and the clock of its stages."""

import ctypes
import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any

import torch

import anybit
from anybit.progress import tell


@cache
def code_version() -> str:
    """Return the SHA-256 of anybit's version and source: results of other code are not reused."""
    whole = hashlib.sha256(anybit.__version__.encode())
    for file in sorted(Path(anybit.__file__).parent.rglob("*.py")):
        whole.update(file.read_bytes())
    return whole.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """Describe everything else on which the last bits of a result depend: PyTorch, its threads, the processor's features, and the
    device."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(), "device": kind}


def own_folder(variable: str, default: str) -> Path | None:
    """Return anybit's folder in the user folder that `variable` names, or in `default` of the home folder; None without a home."""
    if named := os.environ.get(variable):
        return Path(named) / "anybit"
    try:
        return Path.home() / default / "anybit"
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None


@dataclass
class StageClock:
    """Seconds and peak memory of each stage, in order."""

    stages: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        _reset_peak()
        tell("stage begins", stage=name)
        start = time.perf_counter()
        yield
        self.stages.append({"stage": name, "seconds": time.perf_counter() - start, "peak_bytes": peak_memory()})
        tell("stage ends", **self.stages[-1])


def _reset_peak() -> None:
    """Reset the high-water mark on Linux; elsewhere the peak is that of the process so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the process's peak resident bytes since the last reset."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(*more: str) -> dict[str, Any]:
    """Describe the machine and the versions of packages, including `more`, so that numbers can be interpreted later."""
    packages = {name: _version(name) for name in ("anybit", "torch", "numpy", "scipy", "safetensors", *more)}
    return {
        "python": platform.python_version(),
        "packages": packages,
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
        },
    }


@cache
def _version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


_silent, _silenced = Lock(), 0


@contextmanager
def without_c_output() -> Iterator[None]:
    """Silence the output of compiled code through C's `stdout`, in all threads. Python's own output is not affected.

    HiGHS prints notes on some problems regardless of its options, but stdout is for results. Without glibc, it still prints.
    """
    pointer, null = _c_stdout()
    if pointer is None:
        yield
        return
    global _silenced
    with _silent:
        _silenced += 1
        if _silenced == 1:
            pointer.value, null.value = null.value, pointer.value
    try:
        yield
    finally:
        with _silent:
            _silenced -= 1
            if _silenced == 0:
                pointer.value, null.value = null.value, pointer.value


@cache
def _c_stdout() -> tuple[Any, Any]:
    """Return (the location of C's `stdout`, a file that discards everything), or (None, None)."""
    if platform.libc_ver()[0] != "glibc":
        return None, None
    library = ctypes.CDLL(None)
    library.fopen.restype = ctypes.c_void_p
    null = library.fopen(os.devnull.encode(), b"w")
    return (ctypes.c_void_p.in_dll(library, "stdout"), ctypes.c_void_p(null)) if null else (None, None)
