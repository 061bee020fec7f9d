"""Every test has a state and a cache folder of its own, one thread, and the quick settings below."""

import functools
import resource
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


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
    import numpy as np
    from commands import SCRIPT
    from networks import Chain, make, pictures

    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(SCRIPT)
    x = pictures(24).numpy()
    with torch.no_grad():
        y = make(Chain)(pictures(24)).argmax(1).numpy()
    np.savez("x.npz", x=x, y=y)
    np.savez("unlabelled.npz", x=x)
    np.savez("empty.npz", x=x[:0])
    np.savez("one.npz", x=x[:1])
    np.savez("wide.npz", x=np.zeros((24, 4, 8, 8), np.float32), y=y)
    np.savez("vectors.npz", x=np.zeros((24, 4), np.float32))
    np.savez("nan.npz", x=np.where(np.arange(24)[:, None, None, None] == 9, np.nan, x).astype(np.float32))
    np.savez("labels.npz", x=x, y=y + 100)
    return tmp_path
