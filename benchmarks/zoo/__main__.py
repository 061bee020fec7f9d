"""Public networks of torchvision, timm and transformers with random weights, each taken from `inspect` to a file that has run.

    python -m benchmarks.zoo [PATTERN ...] --images FOLDER [--steps inspect] [--retry] [--stale]

Each network goes through `inspect`, `calibrate --pipeline light` at W8A8 and W4A8, `export`, `verify` and a run of the file, in its own
process, on one thread and with limits on time and memory. Weights are random, without constants (lively.py); images are real (--images, or
scikit-learn's digits); texts differ in length. An entry records failures, and whether each is an AnybitError or a crash.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anybit.environment import code_version
from benchmarks.studies.study import Entries, parser
from benchmarks.zoo import timm_table, torchvision_table, transformers_table
from benchmarks.zoo.inputs import Source
from benchmarks.zoo.network import ZooNetwork

NETWORKS: dict[str, ZooNetwork] = {
    f"{library}:{name}": network
    for library, table in (("torchvision", torchvision_table), ("timm", timm_table), ("transformers", transformers_table))
    for name, network in table.NETWORKS.items()
}
WAITING = 4
"""Limit of the elapsed time, as a multiple of the limit on processor time."""

PACKAGES = ("torchvision", "timm", "transformers", "onnx", "onnxruntime", "onnxscript")


def child(name: str, source: Source, all_steps: bool, limits: tuple[int, int], file: str) -> None:
    """Run one network's steps in this process; write its entry to `file` after each. `limits` are processor seconds and bytes."""
    from benchmarks.zoo.steps import run_steps

    os.setsid()  # so that its child processes can be ended with it
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.environ["XDG_STATE_HOME"] = os.path.dirname(file)
    resource.setrlimit(resource.RLIMIT_CPU, (limits[0], limits[0] + 5))
    resource.setrlimit(resource.RLIMIT_AS, (limits[1], limits[1]))

    def keep(entry: Mapping[str, Any]) -> None:
        Path(file + ".new").write_text(json.dumps(entry))
        os.replace(file + ".new", file)

    run_steps(NETWORKS[name], source, all_steps, keep)


def measured(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one network's steps in a separate process."""
    source = Source(arguments.images, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "entry.json"
        limits = arguments.limit, arguments.memory * 2**30
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(name, source, arguments.steps == "all", limits, str(file))
        )
        process.start()
        process.join(WAITING * arguments.limit)  # others may share the machine
        ended = process.is_alive()
        if ended and process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        ended |= process.exitcode == -signal.SIGXCPU
        entry = json.loads(file.read_text()) if file.is_file() else {"seconds": {}, "failures": [], "running": "build"}
    if (running := entry.pop("running", None)) is not None:
        why = f"no end within {arguments.limit} s of processor time" if ended else f"the process ended with exit status {process.exitcode}"
        entry["failures"].append({"step": running, "kind": "limit" if ended else "crash", "class": "", "message": why, "place": ""})
    return entry | {"seed": arguments.seed, "code": code_version()[:12]}


def chosen(arguments: argparse.Namespace) -> list[str]:
    """Return the networks that match a pattern, in the order of the patterns; without patterns, all."""
    patterns = [name if "*" in name or name in NETWORKS else f"*{name}*" for name in arguments.patterns] or ["*"]
    return list(dict.fromkeys(name for pattern in patterns for name in fnmatch.filter(NETWORKS, pattern)))


def preload() -> None:
    """Import shared libraries once; a first export fills the exporter's registries."""
    import timm
    import torchvision
    import transformers

    import anybit.exports.verbs

    for package in (timm, torchvision):
        assert package
    transformers.logging.set_verbosity_error()
    for module in (anybit.calibrate, anybit.inspect, anybit.export, transformers.PreTrainedModel):
        assert module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),), dynamo=True, verbose=False)


def main() -> None:
    """Run the networks that are not yet in the results."""
    options = parser(__doc__)
    options.add_argument("patterns", nargs="*", help="parts of names, or shell patterns: torchvision:*, *bert*")
    options.add_argument("--images", type=Path, help="a folder of images; without it, scikit-learn's digits, upsampled")
    options.add_argument("--steps", choices=("all", "inspect"), default="all")
    options.add_argument("--retry", action="store_true", help="rerun networks that failed")
    options.add_argument("--stale", action="store_true", help="rerun networks that were measured with other code of anybit")
    options.add_argument("--limit", type=int, default=240, help="limit of processor seconds per network")
    options.add_argument("--memory", type=int, default=12, help="limit of address space per network, in GiB")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    results = Entries(arguments, "zoo" if arguments.steps == "all" else "zoo_inspect", *PACKAGES)
    names, code = chosen(arguments), code_version()[:12]
    again = {
        name
        for name, entry in results.entries.items()
        if (arguments.retry and entry["failures"]) or (arguments.stale and entry["code"] != code)
    }
    preload()
    for name in names:
        start = time.perf_counter()
        results.measured(name, partial(measured, name, arguments), again=name in again)
        if time.perf_counter() - start > 0.1:
            print("   ", outcome(results.entries[name]), flush=True)


def outcome(entry: Mapping[str, Any]) -> str:
    """Describe the result in a line."""
    failure = entry["failures"][0] if entry["failures"] else None
    if failure is None:
        return "passed all steps"
    return f"{failure['step']}: {failure['kind']}: {failure['class']}: {failure['message'][:200]} [{failure['place']}]"


if __name__ == "__main__":
    main()
