"""Mutated files: reading each must raise a typed error, or give what its contents say.

    python -m benchmarks.reliability.hostile_files --cases 10000 --output benchmarks/results/hostile_files.json
    python -m benchmarks.reliability.hostile_files --replay 4711             (repeats one case and prints its error)

A case takes the files of one kind (of a run, a supernet, a cache, ...), mutates one of them, and reads them as the verbs do. In every
second case the checksums are recomputed, so that the parsers are tested and not only the hashes. Accepted outcomes:

    error     an AnybitError of one line that names the file or its faulty part
    same      the file loads with every number as written: the mutation changed nothing that matters
    edited    the file loads with other, valid contents; accepted only with recomputed checksums, or for kinds without checksums

Anything else fails: another exception, invalid numbers, a case that takes more than 10 seconds, or one that allocates more memory than
the process has plus LEEWAY (files here have a few thousand bytes).
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import nn

import anybit
from anybit.data.batches import Batch
from anybit.environment import _reset_peak, environment, peak_memory
from anybit.errors import AnybitError, InvalidFile
from anybit.files.cache import DIGEST_BYTES, RECORD, Cache, Entry, _serialized
from anybit.files.strict import DIGEST, digest_of, sha256_of
from anybit.loops.checkpoint import _digest, resume_checkpoint, save_checkpoint
from anybit.networks.candidates import apply_scheme
from anybit.networks.latency import LatencyTable, OperationFlow
from anybit.networks.observed import ObservedNetwork, observe_network
from anybit.networks.states import put_back, snapshot
from anybit.onnx import latency
from anybit.onnx.file import load as load_graph
from anybit.onnx.latency import load_table, save_table
from anybit.onnx.verification import _contents, _described
from anybit.reports.terminal import print_frontier, print_report
from anybit.roads.allocate import _table_from, check_saved
from anybit.roads.extract import _scheme_from
from anybit.roads.grow import make_trainee, observe_trainable
from anybit.roads.search import best_within
from anybit.roads.settings import CalibrateSettings, GrowSettings
from anybit.runs.candidates import read_candidates
from anybit.runs.report import TIMES, read_report
from anybit.runs.scheme_file import SchemeFile, packed_tensors, read_canonical, read_scheme
from anybit.runs.trusted import is_trusted
from anybit.scheme import Scheme
from anybit.sources.models import load_weights
from anybit.supernets.folder import read_supernet
from anybit.supernets.store import SupernetFile, slice_subnet
from benchmarks.reliability.mutations import BYTES, JSONS, TENSORS, Mutation, closed, opened

SECONDS = 10
LEEWAY = 256 * 2**20
"""Bytes of address space allowed beyond the process's own; allocating the size that a mutated file claims takes far more."""


class Tiny(nn.Module):
    """Two convolutions, a batch norm and a linear layer."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.fc = nn.Conv2d(width, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def calibrated_result(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return Tiny(width).eval()


NETWORK, INPUTS = calibrated_result(0), torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(1))
LABELLED = (INPUTS, torch.arange(24) % 3)
QUICK = {"samples": 24, "batch_size": 8, "weight_bits": (2, 4, 8), "activation_bits": (4, 8), "pipeline": "light"}
TRAINING = {"bits": (2, 4), "epochs": 1, "batch_size": 8, "held_out": 0.3, "bn_images": 8, "test": LABELLED}


class Unsound(Exception):
    """A file was loaded into an invalid value."""


# Kinds of files: how they are written and read, and how their checksums are recomputed


@dataclass(frozen=True)
class Kind:
    """A kind of files.

    files     the files to mutate;   read  reads them as the verbs do, and returns comparable values
    remake    recomputes checksums after a mutation;   guarded  whether a checksum covers everything that `read` returns
    """

    files: tuple[str, ...]
    read: Callable[[Path], Any]
    remake: Callable[[Path], None] = lambda folder: None
    guarded: bool = True


def numbers(tensors: dict[str, torch.Tensor]) -> str:
    return _digest("", tensors)


def check_finite(model: nn.Module) -> None:
    """Check that the network's numbers are finite, and that it runs."""
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values() if tensor.is_floating_point()):
        raise Unsound("a loaded tensor is not finite")
    with torch.no_grad():
        model(INPUTS[:2])


def read_run(folder: Path) -> Any:
    file = read_scheme(folder)
    canonical = read_canonical(folder, NETWORK, file)
    check_finite(canonical.model)
    return str(canonical.scheme), numbers(packed_tensors(canonical)), dict(canonical.edges), file.preprocessing, file.task


def read_reports(folder: Path) -> Any:
    report = read_report(folder)
    render(report)
    return json.dumps({key: value for key, value in report.items() if key not in TIMES})


def render(report: dict) -> None:
    """Render everything that verbs print of a report, and discard it."""
    with contextlib.redirect_stdout(io.StringIO()):
        if report.get("result"):
            print_report(report)
        if report.get("schemes") and report.get("ladder"):
            print_frontier([report])


def network_of(settings: Any) -> ObservedNetwork:
    return observe_network(NETWORK, Batch(INPUTS[:2]), settings.options)


def read_saved(folder: Path) -> Any:
    file = read_scheme(folder)
    candidates, saved = read_candidates(folder, {name: (record.rows, record.columns) for name, record in file.layers.items()})
    place = folder / "candidates.json"
    settings, table = CalibrateSettings.from_json(saved["settings"], f"{place}: settings"), _table_from(saved["table"], place)
    network = network_of(settings)
    check_saved(network, candidates, table, saved["choices"], place)
    highest = Scheme({name: options[-1] for name, options in network.choices.items()})
    check_finite(apply_scheme(network.prepared, highest, candidates))
    for name, options in network.choices.items():
        for precision in options:
            table.loss(name, precision)
    tensors = {f"{name} {bits}": part for (name, bits), one in candidates.weights.items() for part in (one.codes, one.scale)}
    return numbers(tensors), table.to_json(), settings.to_json()


def read_store(folder: Path) -> Any:
    supernet = read_supernet(folder, NETWORK)
    check_finite(supernet.model)
    sliced = slice_subnet(folder, supernet.uniform(min(supernet.settings.bits)))
    check_finite(supernet.canonical().model)
    statistics = [numbers({"statistics": one.statistics, "edges": one.edges}) for one in supernet.known]
    codes = {name: digest_of([codes.tolist(), scale.tolist()]) for name, (codes, scale) in sliced.items()}
    return numbers(dict(supernet.model.state_dict())), statistics, codes, supernet.settings.to_json()


def read_search(folder: Path) -> Any:
    return best_within(folder, read_supernet(folder, NETWORK), anybit.Budget.parse("3bit")).to_json()


def identity_of(seed: int) -> dict[str, Any]:
    return {"weights": seed, "samples": 24}


def trainee_of(network: nn.Module) -> Any:
    settings = GrowSettings.of(epochs=2, batch_size=8, activation_bits=4)
    plain = [Batch(INPUTS[:8], LABELLED[1][:8])]
    observed = observe_trainable(network, Batch(INPUTS[:2]), settings, None, "csq")
    return make_trainee(observed, plain, anybit.Budget.parse("4bit"), settings, "csq")


@functools.cache
def blank_trainee() -> Any:
    """Return a prepared training, which is created once and copied for each case."""
    return trainee_of(NETWORK)


def read_training(folder: Path) -> Any:
    one = copy.deepcopy(blank_trainee())
    optimizer = torch.optim.Adam(one.parameter_groups())
    records = resume_checkpoint(folder / "checkpoint.safetensors", one, optimizer, identity_of(0))
    check_finite(one.model)
    state = {f"{index} {key}": value for index, part in optimizer.state_dict()["state"].items() for key, value in part.items()}
    return numbers(dict(one.model.state_dict())), numbers(state), records, one.decisions()


STORED_LAYERS = ("conv1", "conv2", "fc")


def read_entry(folder: Path) -> Any:
    """Return a unit's result, reused from the cache or recomputed: it is the same whatever happened to the file."""
    cache, calibrated = Cache(folder / "cache"), quickly(0, 4)

    def read(stored: Entry) -> dict[str, float]:
        put_back(model, STORED_LAYERS, stored.tensors)
        return {key: float(value) for key, value in stored.record.items()}

    model = copy.deepcopy(calibrated)
    (folder / "cache").mkdir()
    entry = cache._path("a unit")
    entry.parent.mkdir()
    entry.write_bytes((folder / "digest").read_bytes() + _entry(folder))
    result = cache("a unit", lambda: entry_of(calibrated), read)
    check_finite(model)
    return [result, numbers(model.state_dict())]


def _entry(folder: Path) -> bytes:
    """Return the entry's bytes after its digest, with the record inserted if it is mutated."""
    data, record = (folder / "kept.safetensors").read_bytes(), (folder / "record.json").read_bytes()
    if record == (folder / "record as written").read_bytes():
        return data
    return save({**load(data), RECORD: torch.frombuffer(bytearray(record) or bytearray(b" "), dtype=torch.uint8)})


def remake_entry(folder: Path) -> None:
    with suppress(SafetensorError, KeyError, ValueError):
        (folder / "digest").write_bytes(hashlib.sha256(_entry(folder)).digest())


def entry_of(model: nn.Module) -> Entry:
    return Entry({"before": 0.25, "after": 0.125, "steps": 6}, snapshot(model, STORED_LAYERS))


@functools.cache
def quickly(seed: int, width: int) -> nn.Module:
    """Return a canonical network, which is created once."""
    return anybit.calibrate(calibrated_result(seed, width), LABELLED, "4bit", seed=seed, cache=False, **QUICK).model


def write_entry(folder: Path, seed: int, width: int) -> None:
    data = _serialized("a unit", entry_of(quickly(seed, width)))
    (folder / "digest").write_bytes(data[:DIGEST_BYTES])
    (folder / "kept.safetensors").write_bytes(data[DIGEST_BYTES:])
    for name in ("record.json", "record as written"):
        (folder / name).write_bytes(load(data[DIGEST_BYTES:])[RECORD].numpy().tobytes())


def observed() -> ObservedNetwork:
    return network_of(CalibrateSettings((8,), (8, None)))


def read_latency(folder: Path) -> Any:
    place, network = folder / "latency.json", observed()
    table_file = latency._table_file
    latency._table_file = lambda network, threads: place.with_stem("of 0")
    try:
        place.rename(place.with_stem("of 0"))
        loaded = load_table(network)
    finally:
        latency._table_file = table_file
    table, metadata = loaded
    if not 0 <= table.total(Scheme.uniform(network.names, "W8A8")) < float("inf"):
        raise Unsound("a predicted latency is not a finite number")
    return digest_of([asdict(table), metadata])


def read_listing(folder: Path) -> Any:
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    try:
        return is_trusted(folder)
    finally:
        os.environ.pop("XDG_STATE_HOME") if before is None else os.environ.update(XDG_STATE_HOME=before)


def read_scheme_text(folder: Path) -> Any:
    return _scheme_from(folder / "wanted.json").to_json()


def read_weights(folder: Path) -> Any:
    model = Tiny()
    load_weights(model, next(folder.glob("weights.*")))
    return numbers(dict(model.state_dict()))


def read_graph(folder: Path) -> Any:
    """Read constants and operators, as `verify` does to compare them with the run's before it runs anything."""
    model = load_graph(folder / "net.onnx")
    try:
        contents = {name: digest_of(array.tolist()) for name, array in _contents(model).items() if array is not None}
    except (ValueError, TypeError) as error:
        raise InvalidFile(f"net.onnx: {error}") from error
    return contents, digest_of([str(_described(node)) for node in model.graph])


def replaced(path: Path, key: str, value: str) -> None:
    """Replace a hash in a JSON file and leave its other bytes unchanged."""
    text = path.read_bytes()
    path.write_bytes(re.sub(rb'("%s": ?")[^"]*(")' % key.encode(), lambda match: match[1] + value.encode() + match[2], text))


def lenient(path: Path) -> Any:
    """Read JSON with Python's own parser, which accepts more than anybit's."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def reseal(path: Path, unguarded: tuple[str, ...] = ()) -> None:
    data = lenient(path)
    if isinstance(data, dict):
        try:
            digest = digest_of({key: value for key, value in data.items() if key not in {DIGEST, *unguarded}})
        except (ValueError, RecursionError):
            return
        replaced(path, DIGEST, digest)


def write_metadata(path: Path, metadata: dict[str, str]) -> None:
    try:
        header, data = opened(path.read_bytes())
    except (ValueError, RecursionError):
        return
    if header.get("__metadata__") is not None:
        path.write_bytes(closed({**header, "__metadata__": {**header["__metadata__"], **metadata}}, data))


def remake_pair(folder: Path, json_name: str, tensors_name: str, key: str, kind: Any) -> None:
    """Write the digest of the JSON file's contents to the tensors' metadata, and the tensors' hash to the JSON file."""
    data = lenient(folder / json_name)
    with suppress(ValueError, RecursionError):  # an unreadable file has no digest
        write_metadata(folder / tensors_name, {key: kind.model_validate(data).digest()})
    replaced(folder / json_name, "sha256", sha256_of(folder / tensors_name))


def remake_run(folder: Path) -> None:
    if (folder / "fingerprint.safetensors").is_file():
        replaced(folder / "scheme.json", "fingerprint", sha256_of(folder / "fingerprint.safetensors"))
    remake_pair(folder, "scheme.json", "model.safetensors", "scheme", SchemeFile)


def remake_candidates(folder: Path) -> None:
    remake_run(folder)
    replaced(folder / "candidates.json", "sha256", sha256_of(folder / "candidates.safetensors"))
    replaced(folder / "candidates.json", "run", sha256_of(folder / "model.safetensors"))
    reseal(folder / "candidates.json")


def remake_report(folder: Path) -> None:
    replaced(folder / "report.json", "sha256", sha256_of(folder / "model.safetensors"))
    reseal(folder / "report.json", TIMES)


def remake_supernet(folder: Path) -> None:
    remake_pair(folder, "supernet.json", "supernet.safetensors", "supernet", SupernetFile)
    for name, unguarded in (("report.json", TIMES), ("search.json", ())):
        if (folder / name).is_file():
            replaced(folder / name, "sha256", sha256_of(folder / "supernet.safetensors"))
            reseal(folder / name, unguarded)


def remake_training(folder: Path) -> None:
    path = folder / "checkpoint.safetensors"
    try:
        header, _ = opened(path.read_bytes())
        digest = _digest(header["__metadata__"]["anybit"], load(path.read_bytes()))
        write_metadata(path, {DIGEST: digest})
    except Exception:  # an unopenable file has no digest
        return


KINDS: dict[str, Kind] = {
    "run": Kind(("scheme.json", "model.safetensors", "fingerprint.safetensors"), read_run, remake_run),
    "report": Kind(("report.json",), read_reports, remake_report),
    "candidates": Kind(("candidates.json", "candidates.safetensors"), read_saved, remake_candidates),
    "training checkpoint": Kind(("checkpoint.safetensors",), read_training, remake_training),
    "supernet": Kind(("supernet.json", "supernet.safetensors", "report.json"), read_store, remake_supernet),
    "search": Kind(("search.json",), read_search, remake_supernet),
    "stored result": Kind(("kept.safetensors", "record.json"), read_entry, remake_entry),
    "latency cache": Kind(("latency.json",), read_latency, lambda folder: reseal(folder / "latency.json")),
    "list of own runs": Kind(("state/anybit/runs.json",), read_listing, guarded=False),
    "scheme to extract": Kind(("wanted.json",), read_scheme_text, guarded=False),
    "weights": Kind(("weights.safetensors",), read_weights, guarded=False),
    "pickled weights": Kind(("weights.pt",), read_weights, guarded=False),
    "exported file": Kind(("net.onnx",), read_graph, guarded=False),
}
"""A new kind of file is one entry here, and its writing in `write_all`."""


def write_all(home: Path, seed: int, width: int = 4) -> None:
    """Write one folder per kind, as anybit does."""
    network = calibrated_result(seed, width)
    result = anybit.calibrate(network, LABELLED, "4bit", test=LABELLED, seed=seed, cache=False, **QUICK)
    for kind in ("run", "report", "candidates", "list of own runs", "exported file"):
        result.save(home / kind)
    for kind in ("scheme to extract", "stored result", "latency cache", "weights", "pickled weights"):
        (home / kind).mkdir()
    if seed == 0:  # this file has no checksums to recompute
        anybit.export(home / "run", home / "exported file" / "net.onnx", model=network, data=INPUTS)
    (home / "scheme to extract" / "wanted.json").write_text(json.dumps(result.scheme.to_json()))
    save_file(network.state_dict(), home / "weights" / "weights.safetensors")
    torch.save(network.state_dict(), home / "pickled weights" / "weights.pt")
    place = home / "list of own runs" / "state" / "anybit" / "runs.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(["0" * 64, sha256_of(home / "list of own runs" / "scheme.json")], indent=1))
    supernet = anybit.train(network, LABELLED, seed=seed, **TRAINING)
    supernet.save(home / "supernet")
    anybit.search(supernet, LABELLED, ["3bit"], images=3, evaluations=10, seed=seed, cache=False).save(home / "search")
    write_entry(home / "stored result", seed, width)
    names = observed().names
    steps = [OperationFlow(name, (number,), (number + 1,), 100) for number, name in enumerate(names)]
    table = LatencyTable({n: {"float32": 3e-4, "int8": 1e-4} for n in names}, {"float32": 5e-4, "int8": 6e-4}, 1e-8, steps)
    table_file, latency._table_file = latency._table_file, lambda network, threads: home / "latency cache" / f"of {seed}.json"
    try:
        save_table(observed(), table, {"rounds": seed})
        (home / "latency cache" / f"of {seed}.json").rename(home / "latency cache" / "latency.json")
    finally:
        latency._table_file = table_file
    write_training(home / "training checkpoint", seed, network)


def write_training(folder: Path, seed: int, network: nn.Module) -> None:
    folder.mkdir()
    one = trainee_of(network)
    optimizer = torch.optim.Adam(one.parameter_groups())
    torch.manual_seed(seed)
    nn.functional.cross_entropy(one.model(INPUTS[:8]), LABELLED[1][:8]).backward()
    optimizer.step()
    record = {"epoch": 1, "loss": 1.0, "train_top1": 50.0, **one.summary()}
    save_checkpoint(folder / "checkpoint.safetensors", one, optimizer, [record], identity_of(seed))


# Cases


@dataclass
class Case:
    """A mutation of one file (`remade`: with recomputed checksums), and its result from `outcome` on."""

    number: int
    kind: str
    file: str
    mutation: str
    remade: bool
    outcome: str = ""
    error: str = ""
    seconds: float = 0.0
    bytes: int = 0
    trace: str = field(default="", repr=False)


def mutations_of(name: str) -> dict[str, Mutation]:
    if name.endswith((".pt", ".onnx")):
        return dict(BYTES)
    return BYTES | (TENSORS if name.endswith(".safetensors") else JSONS) | {"swapped": None, "another model's": None}


def run_case(home: Path, number: int, seed: int, pristine: dict[str, Any]) -> Case:
    """Mutate, read and judge. `home` contains the folders "a" (copied and mutated), "b" (other weights) and "c" (another network)."""
    rng = random.Random(f"{seed} {number}")
    name = list(KINDS)[(number // 2) % len(KINDS)]
    kind = KINDS[name]
    file = rng.choice(kind.files)
    options = mutations_of(file)
    chosen = rng.choice(list(options))
    case = Case(number, name, file, chosen, number % 2 == 1)
    with tempfile.TemporaryDirectory(dir=home) as place:
        folder = Path(place) / "case"
        shutil.copytree(home / "a" / name, folder)
        path = folder / file
        if options[chosen] is None:
            path.write_bytes((home / ("b" if chosen == "swapped" else "c") / name / file).read_bytes())
        else:
            path.write_bytes(options[chosen](path.read_bytes(), rng))
        if case.remade:
            kind.remake(folder)
        judge(case, kind, folder, pristine)
    return case


def judge(case: Case, kind: Kind, folder: Path, pristine: dict[str, Any]) -> None:
    start, before = time.perf_counter(), resident()
    _reset_peak()
    try:
        with bounded():
            result = kind.read(folder)
        case.outcome = "same" if result == pristine[case.kind] else "edited" if case.remade or not kind.guarded else "FAILED: not noticed"
    except AnybitError as error:
        case.outcome, case.error = "error", type(error).__name__
        if "\n" in str(error) or not 20 < len(str(error)) < 2000:
            case.outcome = f"FAILED: a message of {len(str(error))} characters: {str(error)[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        case.outcome, case.trace = f"FAILED: {type(error).__name__}: {error}"[:300], traceback.format_exc()
    case.seconds, case.bytes = time.perf_counter() - start, max(0, peak_memory() - before)


class TooLong(BaseException):
    """A case exceeded its time limit. Not an Exception, so that nothing catches it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the block to SECONDS, and to LEEWAY above the current address space."""

    def ring(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s")

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (held + LEEWAY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def prepared(home: Path) -> dict[str, Any]:
    """Write the folders, and read each kind before any mutation."""
    for name, seed, width in (("a", 0, 4), ("b", 1, 4), ("c", 2, 5)):
        (home / name).mkdir()
        write_all(home / name, seed, width)
    pristine = {}
    for name, kind in KINDS.items():
        for remade in (False, True):
            shutil.copytree(home / "a" / name, home / "once")
            if remade:
                kind.remake(home / "once")
            result = kind.read(home / "once")
            if pristine.setdefault(name, result) != result:
                raise Unsound(f"{name}: recomputing the checksums changes the contents")
            shutil.rmtree(home / "once")
    return pristine


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


def run_cases(home: Path, numbers: range | list[int], seed: int) -> list[Case]:
    with quiet():
        pristine = prepared(home)
        return [run_case(home, number, seed, pristine) for number in numbers]


def summary(cases: list[Case], seed: int, seconds: float) -> dict[str, Any]:
    def counted(key: Callable[[Case], str]) -> dict[str, dict[str, int]]:
        rows: dict[str, Counter] = {}
        for case in cases:
            rows.setdefault(key(case), Counter())[case.outcome.partition(":")[0]] += 1
        return {name: dict(sorted(row.items())) for name, row in rows.items()}

    failed = [case for case in cases if case.outcome.startswith("FAILED")]
    return {
        "command": f"python -m benchmarks.reliability.hostile_files --cases {len(cases)} --seed {seed}",
        "seed": seed,
        "cases": len(cases),
        "passed": len(cases) - len(failed),
        "outcomes": dict(Counter(case.outcome.partition(":")[0] for case in cases)),
        "by_checksums": counted(lambda case: "made right" if case.remade else "as they were"),
        "by_kind": counted(lambda case: case.kind),
        "by_mutation": counted(lambda case: case.mutation),
        "errors": dict(Counter(case.error for case in cases if case.error)),
        "longest_seconds": max(case.seconds for case in cases),
        "largest_resident_growth_bytes": max(case.bytes for case in cases),
        "address_space_leeway_bytes": LEEWAY,
        "failed": [{"number": case.number, "kind": case.kind, "mutation": case.mutation, "outcome": case.outcome} for case in failed],
        "seconds": seconds,
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, help="the number of one case")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        cases = run_cases(Path(home), range(arguments.cases) if arguments.replay is None else [arguments.replay], arguments.seed)
    summarized = summary(cases, arguments.seed, time.perf_counter() - start)
    for case in cases:
        if case.outcome.startswith("FAILED") or arguments.replay is not None:
            print(case, case.trace)
    print(f"{summarized['passed']} of {summarized['cases']}: {summarized['outcomes']}, longest {summarized['longest_seconds']:.2f} s")
    if arguments.output:
        arguments.output.write_text(json.dumps(summarized, indent=1) + "\n")


if __name__ == "__main__":
    main()
