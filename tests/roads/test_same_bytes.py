"""The same seed on the same machine gives identical files, whatever the loader workers and the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from networks import Residual, images, make
from torch.utils.data import Dataset

import anybit

MEASURED = ("stages", "environment")  # times, memory, versions
TESTS = Path(__file__).parent.parent
SCRIPT = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/roads']
import random, torch
seed = int(sys.argv[2]); random.seed(seed); torch.manual_seed(seed)  # no generator but the run's own counts
from test_same_bytes import written
written(sys.argv[3])
"""


class Loaded(Dataset):
    """Labelled images loaded one by one, so that workers have something to do."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        return images(1, seed=index)[0], index % 5


def written(folder: str | Path, **changes) -> Path:
    """Save a run of all steps."""
    return anybit.calibrate(make(Residual), Loaded(), "4bit", cache=False, **{**QUICK, **changes}).save(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Map each file to its bytes; the report without machine measurements."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files["report.json"])
    files["report.json"] = json.dumps({key: value for key, value in report.items() if key not in MEASURED}).encode()
    return files


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run without workers, in this process."""
    before = torch.get_rng_state()
    files = contents(written(tmp_path_factory.mktemp("runs") / "alone"))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is unchanged
    return files


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_loader_workers_changes_no_byte(workers, alone, tmp_path):
    assert {"scheme.json", "model.safetensors", "report.json", "candidates.safetensors"} <= set(alone)
    assert contents(written(tmp_path / "run", workers=workers)) == alone


def test_another_process_and_hash_seed_change_no_byte(alone, tmp_path):
    started = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(TESTS.parent / "src")}
        started.append(subprocess.Popen([sys.executable, "-c", SCRIPT, str(TESTS), seed, str(tmp_path / seed)], env=environment))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == alone


def test_another_seed_changes_the_bytes(alone, tmp_path):
    assert contents(written(tmp_path / "run", seed=1))["model.safetensors"] != alone["model.safetensors"]
