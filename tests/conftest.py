"""Every test has a state and a cache folder of its own, one thread unless OMP_NUM_THREADS says otherwise, and the quick settings below."""

import functools
import gc
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
torch.set_num_threads(THREADS)


def pytest_collection_finish():
    """Take what is imported by now, a million objects, out of the garbage collector's sight, which would walk over them all the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def without_openvino():
    """Its threads outlive it and end the process where a later test bounds memory; its own test runs it in another process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_registry_of_operators():
    """The exporter makes it anew for each network, from the source of five hundred functions: most of the time of a small export."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError, AttributeError):  # internals: without them tests are slower
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell that runs the suite in the background has Ctrl-C ignored, which processes started by tests would inherit."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def nobodys_home(tmp_path_factory):
    """Before any test has its own: what fixtures of the session write goes here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        yield


@pytest.fixture(autouse=True)
def own_home(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def own_threads():
    """A command that a test runs in this process may set their number."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def full_disk():
    """A block in which no file of this process grows beyond a kilobyte, as if the disk were full."""

    @contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


QUICK = {
    "samples": 40, "batch_size": 16, "weight_bits": (2, 4, 8), "activation_bits": (4, 8),
    "steps": 6, "candidate_steps": 3, "alternatives": 2,
}  # fmt: skip


@pytest.fixture
def quick():
    """Settings of a calibrate run that takes a second."""
    return dict(QUICK)


@pytest.fixture(scope="session")
def calibrated():
    """One finished run for tests that only read it: (float model, its inputs, Result at 4 bits)."""
    from networks import Residual, make, pictures

    import anybit

    model, inputs = make(Residual), pictures(40)
    return model, inputs, anybit.calibrate(model, inputs, "4bit", **QUICK)


@pytest.fixture
def run_folder(calibrated, tmp_path):
    """That run, saved to a folder of the test's own."""
    return calibrated[2].save(tmp_path / "run")


@pytest.fixture(scope="session")
def exported_file(calibrated, tmp_path_factory):
    """That run's ONNX file, for tests that only read it."""
    import anybit

    model, data, result = calibrated
    here = tmp_path_factory.mktemp("exported")
    anybit.export(result.save(here / "run"), here / "net.onnx", model=model, data=data)
    return here / "net.onnx"


@pytest.fixture
def exported_run(exported_file, run_folder, calibrated, tmp_path):
    """(run folder, its ONNX file, float model, its inputs), the folder and the file being the test's own."""
    model, data, _ = calibrated
    return run_folder, Path(shutil.copy(exported_file, tmp_path)), model, data


@pytest.fixture(scope="session")
def folders(calibrated, tmp_path_factory):
    """Run folders of every road, for tests that only read them: calibrate twice, grow, train, search, extract."""
    import anybit

    model, inputs, result = calibrated
    labelled = (inputs, model(inputs).argmax(1))
    here = tmp_path_factory.mktemp("roads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(here / "state"))
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        trained = {"epochs": 2, "batch_size": 16, "test": labelled}
        supernet = anybit.train(model, labelled, bits=(2, 8), held_out=0.3, bn_images=16, **trained)
        search = anybit.search(supernet, labelled, "5bit", evaluations=12)
        runs = {
            "calibrated": result,
            "seeded": anybit.calibrate(model, inputs, "3bit", **QUICK, seed=1),
            "grown": anybit.grow(model, labelled, "4bit", **trained),
            "supernet": supernet,
            "search": search,
        }
        saved = {name: run.save(here / name) for name, run in runs.items()}
        saved["subnet"] = anybit.extract(saved["search"], "5bit", model=model).save(here / "subnet")
    return saved


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model script and arrays."""
    from commands import write_inputs

    monkeypatch.chdir(tmp_path)
    write_inputs()
    return tmp_path
