"""Fixtures: a state and a cache folder for each test, one thread unless OMP_NUM_THREADS is set, quick settings, shared runs."""

import functools
import gc
import json
import os
import resource
import shutil
import signal
import sys
from collections import OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

from anybit.files.cache import Entry
from anybit.onnx import graphs

gc.disable()  # until all modules are imported: a third of that time
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1))
torch.set_num_threads(THREADS)


def pytest_collection_finish():
    """Exempt the million objects imported so far from garbage collection, which would traverse them repeatedly."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(5000, 20, 20)  # a whole collection costs a fifth of a second by the end; there is memory enough for fewer


@pytest.fixture(autouse=True, scope="session")
def without_openvino():
    """Hide openvino: its threads outlive it and kill the process when a later test limits memory. Its own test uses another process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_registry_of_operators():
    """Let the exporter do only once what it repeats for each network, which takes most of the time of a small export."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError, AttributeError):  # internals: without them tests are slower
            from torch._export import utils
            from torch._ops import OperatorBase
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            # Compiles 500 functions.
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
            # Looks up all operators, for each of some fifty namespaces.
            patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
            patch.setattr(OperatorBase, "py_impl", without_annotations(OperatorBase.py_impl))
        yield


def without_annotations(py_impl):
    """Return PyTorch's registration of kernels without the evaluation of annotations; an export calls it 12,000 times."""

    def register(operator, key):
        def registered(kernel):
            if not isinstance(key, torch._C.DispatchKey) or key == torch._C.DispatchKey.Python or key in operator.py_kernels:
                return py_impl(operator, key)(kernel)
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
            return kernel

        return registered

    return register


class SharedGraphs(OrderedDict):
    """Exported graphs in memory and in a folder that all worker processes share."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def __contains__(self, key):
        if not super().__contains__(key) and (self.folder / key).is_file():
            with safetensors.safe_open(self.folder / key, "pt") as file:
                super().__setitem__(key, Entry(json.loads(file.metadata()["record"]), {"graph": file.get_tensor("graph")}))
        return super().__contains__(key)

    def __setitem__(self, key, entry):
        super().__setitem__(key, entry)
        if not (self.folder / key).exists():
            draft = self.folder / f"{key}.{os.getpid()}"
            with suppress(OSError, safetensors.SafetensorError):  # in a test whose disk is full
                safetensors.torch.save_file(dict(entry.tensors), draft, {"record": json.dumps(entry.record)})
                draft.replace(self.folder / key)

    def pop(self, key, default=None):
        (self.folder / key).unlink(missing_ok=True)
        return super().pop(key, default)


@pytest.fixture(autouse=True, scope="session")
def shared_graphs(tmp_path_factory):
    """Export each network once in all worker processes, except in `tests/onnx/test_graphs.py`, which tests the cache."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graphs"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_recent", SharedGraphs(folder))
        yield


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Restore Ctrl-C, which a shell that runs the suite in the background ignores, for the processes that tests start."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def session_home(tmp_path_factory):
    """Set a home folder for session fixtures, which run before any test has its own."""
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
    """Restore the number of threads: a command that a test runs in this process may set it."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def full_disk():
    """Inside the block, limit every file of this process to 1 kB, as on a full disk."""

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
    """Settings of a calibrate run that takes about a second."""
    return dict(QUICK)


@pytest.fixture(scope="session")
def calibrated():
    """One finished run, read only: (float model, its inputs, Result at 4 bits)."""
    from networks import Residual, images, make

    import anybit

    model, inputs = make(Residual), images(40)
    return model, inputs, anybit.calibrate(model, inputs, "4bit", **QUICK)


@pytest.fixture
def run_folder(calibrated, tmp_path):
    """That run, saved to a folder of this test."""
    return calibrated[2].save(tmp_path / "run")


@pytest.fixture(scope="session")
def exported_file(calibrated, tmp_path_factory):
    """That run's ONNX file, read only."""
    import anybit

    model, data, result = calibrated
    here = tmp_path_factory.mktemp("exported")
    anybit.export(result.save(here / "run"), here / "net.onnx", model=model, data=data)
    return here / "net.onnx"


@pytest.fixture
def exported_run(exported_file, run_folder, calibrated, tmp_path):
    """(run folder, its ONNX file, float model, its inputs); this test may change folder and file."""
    model, data, _ = calibrated
    return run_folder, Path(shutil.copy(exported_file, tmp_path)), model, data


@pytest.fixture(scope="session")
def folders(calibrated, tmp_path_factory):
    """Run folders of every road, read only: calibrate twice, grow, train, search, extract."""
    import anybit

    model, inputs, result = calibrated
    labelled = (inputs, model(inputs).argmax(1))
    here = tmp_path_factory.mktemp("roads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(here / "state"))
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        trained = {"epochs": 2, "batch_size": 16, "test": labelled}
        supernet = anybit.train(model, labelled, bits=(2, 8), held_out=0.3, bn_images=16, **trained)
        search = anybit.search(supernet, labelled, "5bit", evaluations=12, rounds=1)
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
