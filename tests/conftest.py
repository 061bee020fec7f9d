"""Every test has a state and a cache folder of its own, one thread, and the quick settings below."""

import pytest
import torch

torch.set_num_threads(1)


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
