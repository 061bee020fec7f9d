"""Killed and resumed runs: whether their results are byte-identical, the work lost, the cost of storing results. One JSON entry per run.

    python examples/digits.py runs/digits
    python -m benchmarks.reliability.resume kills --weights runs/digits/weights.safetensors --data runs/digits/digits.npz
    python -m benchmarks.reliability.resume cost  --weights runs/digits/weights.safetensors --data runs/digits/digits.npz

kills   100 runs of `anybit calibrate`, each with an empty cache, killed with SIGKILL at random moments up to three times, then run
        to the end. For each kill: the stage, the number of results that the process had reused, and the lost work, as the seconds since
        its last event. The run's files are compared with those of a run that was never killed.
cost    processor seconds of hashing, packing and writing, and of the rest of a run with an empty cache.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import anybit
from anybit.files.cache import Cache, entries
from anybit.loops import reconstruction
from anybit.roads import keys, polish
from benchmarks.studies.study import ROOT, Entries, parser

NETWORK = f"{ROOT / 'examples/digits.py'}:network"
MEASURED = ("stages", "environment")
FILES = ("scheme.json", "model.safetensors", "candidates.json", "candidates.safetensors")


class Run:
    """One run with its own folder, cache, log and output."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, *more: str):
        self.folder, self.log, self.started = folder, folder / "log.jsonl", 0
        options = ["--model", NETWORK, "--weights", arguments.weights, "--data", arguments.data]
        options += ["--samples", "128", "--steps", "60", "--candidate-steps", "20", "--budget", "3bit", "--threads", "1", "--quiet"]
        options += ["--output", str(folder / "run"), "--log", str(self.log), *more]
        self.command = [sys.executable, "-m", "anybit", "calibrate", *options]
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state")}

    def start(self) -> subprocess.Popen:
        self.started += 1
        return subprocess.Popen(self.command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self) -> str:
        """Run to the end and return stderr."""
        process = self.start()
        errors = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(f"{' '.join(self.command)} ended with {process.returncode}: {errors}")
        return errors

    def events(self) -> list[dict[str, Any]]:
        """Read the events of the last process; none before it has started."""
        rows, begun = [], 0
        for line in self.log.read_text().splitlines() if self.log.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:  # truncated by the kill
                continue
            begun += row["event"] == "begins"
            rows = [row] if row["event"] == "begins" else [*rows, row]
        return rows if begun == self.started else []

    def contents(self) -> dict[str, bytes]:
        """Read the finished run's files, without times and memory."""
        files = {name: (self.folder / "run" / name).read_bytes() for name in FILES}
        report = json.loads((self.folder / "run" / "report.json").read_text())
        return files | {"report.json": json.dumps({key: value for key, value in report.items() if key not in MEASURED}).encode()}


def killed_at(run: Run, events: int, seconds: float) -> dict[str, Any] | None:
    """Kill the run `seconds` after its event number `events`, not counting reused results; return None if it ended before."""
    process = run.start()
    while process.poll() is None and len(_computed(run.events())) < events:
        time.sleep(0.02)
    try:
        process.communicate(timeout=seconds)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        at = time.time()
        process.communicate()
    log = run.events()
    recalled = sum(row["event"] == "recalled" for row in log)
    return {"stage": _stage(log), "recalled": recalled, "lost_seconds": at - _seconds(log[-1]["time"])}


def _computed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in events if row["event"] != "recalled"]


def _stage(events: list[dict[str, Any]]) -> str:
    """Return the run's stage at its last event; for polishing, its step."""
    last = next((row for row in reversed(events) if row["event"] in ("stage begins", "stage ends")), {"event": "", "stage": "start"})
    if last["event"] == "stage ends":
        return f"after {last['stage']}"
    steps = [row["step"] for row in events if row["event"] == "step"]
    order = ["ranges", "candidates", "sequential AdaQuant", "batch-norm tuning", "bias tuning", "the end"]
    return last["stage"] if last["stage"] != "polish" else f"polish: {order[len(steps)]}"


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def kills(arguments: argparse.Namespace, results: Entries) -> None:
    place = Path(tempfile.mkdtemp(prefix="anybit-kills-"))
    reference = Run(arguments, place / "reference", "--no-cache")
    reference.folder.mkdir()
    reference.finish()
    expected, events = reference.contents(), reference.events()
    times = [_seconds(row["time"]) - _seconds(events[0]["time"]) for row in events]
    units = [row["seconds"] for row in events if row["event"] == "unit"]

    def one(seed: int) -> dict[str, Any]:
        rng, run = random.Random(seed), Run(arguments, place / str(seed))
        run.folder.mkdir()
        killed = []
        for _ in range(rng.randint(1, 3)):
            moment = rng.uniform(0, times[-1])
            before = sum(at <= moment for at in times)
            kill = killed_at(run, before, moment - times[before - 1])
            if kill is None:
                break
            killed.append(kill)
        if not (run.folder / "run").is_dir():
            run.finish()
        different = [name for name, data in run.contents().items() if data != expected[name]]
        drafts = [path.name for path in run.folder.rglob("*.tmp")]
        recalled = sum(row["event"] == "recalled" for row in run.events())
        shutil.rmtree(run.folder)
        return {"kills": killed, "same_bytes": not different, "different": different, "finally_recalled": recalled, "left_behind": drafts}

    results.measured("reference", lambda: {"seconds": times[-1], "longest_unit_seconds": max(units), "events": len(events)})
    for seed in range(arguments.runs):
        results.measured(f"run {seed}", lambda seed=seed: one(seed))
    shutil.rmtree(place)
    runs = [entry for key, entry in results.entries.items() if key.startswith("run ")]
    stages = [kill["stage"] for entry in runs for kill in entry["kills"]]
    inside = sum("AdaQuant" in stage for stage in stages)
    same = sum(entry["same_bytes"] for entry in runs)
    print(f"{same} of {len(runs)} runs ended with the same bytes; {len(stages)} kills, {inside} of them inside AdaQuant")


def cost(arguments: argparse.Namespace, results: Entries) -> None:
    """Measure processor seconds of storing and hashing, and of the rest, in one run each."""
    spent, depth = [0.0], [0]

    def timed(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start, depth[0] = time.process_time(), depth[0] + 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                spent[0] += (time.process_time() - start) * (depth[0] == 0)

        setattr(owner, name, wrapped)

    for owner, names in {
        Cache: ("_keep",), keys: ("key_of_run", "to_tensors", "from_tensors"), polish: ("snapshot", "put_back"),
        reconstruction: ("snapshot", "put_back"),
    }.items():  # fmt: skip
        for name in names:
            timed(owner, name)

    def share(**settings: Any) -> dict[str, Any]:
        spent[0] = 0.0
        start = time.process_time()
        with tempfile.TemporaryDirectory() as place:
            anybit.calibrate(NETWORK, arguments.data, "3bit", weights=arguments.weights, cache=place, **settings)
            stored = sum(entry.bytes for entry in entries(Path(place)))
        seconds = time.process_time() - start
        return {"keeping_seconds": spent[0], "seconds": seconds, "percent": 100 * spent[0] / (seconds - spent[0]), "kept_bytes": stored}

    results.measured("digits, as killed", lambda: share(samples=128, steps=60, candidate_steps=20))
    results.measured("digits, defaults", lambda: share(samples=512))


STUDIES = {"kills": kills, "cost": cost}


def main() -> None:
    """Run one study."""
    options = parser(__doc__, STUDIES)
    options.add_argument("--weights", required=True)
    options.add_argument("--data", required=True)
    options.add_argument("--runs", type=int, default=100)
    arguments = options.parse_args()
    STUDIES[arguments.study](arguments, Entries(arguments, f"resume_{arguments.study}"))


if __name__ == "__main__":
    main()
