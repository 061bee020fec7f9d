"""The run folder: strict reading, atomic writing. safetensors and JSON only; nothing in a folder is executed by reading it.

scheme.json          the scheme, the certificate, what the packed file's numbers belong to, and its SHA-256
model.safetensors    packed codes, scales, edge ranges, float leftovers (layout: `packing`)
report.json          the measured report; report.html shows it
candidates.safetensors, candidates.json    what `anybit allocate` needs to serve another budget (only in calibrate's folders)
"""

import fcntl
import glob
import hashlib
import json
import math
import os
import reprlib
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from anybit import batchnorm
from anybit.candidates import KEY, ActivationCandidate, Candidates, WeightCandidate, from_tensors, install, to_tensors
from anybit.cost import leftovers, operands_of, spec_of
from anybit.errors import AnybitError, InvalidFile, InvalidSetting, SchemeMismatch
from anybit.evaluation import Task
from anybit.files import (
    check_sealed,
    check_version,
    in_words,
    read_header,
    read_json,
    read_sealed,
    read_tensors,
    sealed,
    sha256_of,
    validated,
    write_json,
)
from anybit.layers import codes_of, float_weight, prepare, quantized_layers, scheme_of, weight_rows
from anybit.packing import StoredLayer, TensorSpec, layout, pack, packed_bytes, unpack
from anybit.records import Record, SearchFile, record_of
from anybit.references import Preprocessing
from anybit.resume import write_whole
from anybit.scheme import Precision, Scheme, check_names
from anybit.store import FILE as SUPERNET
from anybit.wiring import BATCH_NORMS

FORMAT_VERSION = 1
MODEL = "model.safetensors"


class LayerRecord(BaseModel):
    """One layer of scheme.json: its precision and its weight's shape as rows x columns (0 x 0 of a matmul).

    With a scale for each group of inputs, the rows are the groups: their columns do not reach across the layer's inputs.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    precision: str
    rows: int = Field(ge=0)
    columns: int = Field(ge=0)


class SchemeFile(BaseModel):
    """scheme.json. Strict: a wrong type, a missing or an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["anybit"] = "anybit"
    version: Literal[1] = FORMAT_VERSION
    layers: dict[str, LayerRecord]
    folded: dict[str, str] = {}
    edges: list[str] = []
    budget: str | None = None
    certificate: dict[str, Any] = {}
    model: dict[str, str | None] = {}
    data: dict[str, str | None] = {}
    preprocessing: dict[str, Any] = {}
    task: Task = "classification"
    sha256: str

    @property
    def scheme(self) -> Scheme:
        return Scheme.parse({name: record.precision for name, record in self.layers.items()})

    def digest(self) -> str:
        """SHA-256 of what gives the tensors their meaning; where they came from may be edited."""
        meaning = self.model_dump(include={"layers", "folded", "edges", "preprocessing", "task"})
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


@dataclass
class Canonical:
    """The canonical form, with what a file needs besides the tensors.

    model    folded, slots filled; edges: name -> (low, high) observed on it; folded: layer -> batch norm folded into it
    """

    model: nn.Module
    folded: Mapping[str, str]
    edges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.model)


def packed_tensors(canonical: Canonical) -> dict[str, Tensor]:
    """The tensors of model.safetensors."""
    layers = quantized_layers(canonical.model)
    scheme = canonical.scheme
    codes, scales, input_scales, zero_points = [], [], [], []
    kept_float = [name for name, precision in scheme.items() if precision.weight_bits is None]
    for name, precision in scheme.items():
        layer = layers[name]
        if precision.weight_bits:
            codes.append(torch.from_numpy(pack(codes_of(layer).numpy(), precision.weight_bits)))
            scales.append(layer.weight_quantizer.scale.flatten())
        if precision.activation_bits:
            input_scales.append(layer.input_quantizer.scale.reshape(-1))
            zero_points.append(layer.input_quantizer.zero_point.reshape(-1).to(torch.uint8))
    numbers, others = leftovers(canonical.model, [name for name in scheme if name not in kept_float])
    shared = {
        "codes": codes,
        "weight_scales": scales,
        "activation_scales": input_scales,
        "activation_zero_points": zero_points,
        "floats": [tensor.flatten() for tensor in numbers.values()],
    }
    tensors = {name: torch.cat(parts).contiguous() for name, parts in shared.items() if parts}
    if canonical.edges:
        tensors["edges"] = torch.tensor(list(canonical.edges.values()), dtype=torch.float32)
    return tensors | {key: tensor.contiguous().clone() for key, tensor in others.items()}


def write_canonical(folder: Path, canonical: Canonical, about: Mapping[str, Any]) -> None:
    """Write scheme.json and model.safetensors into `folder`; `about` fills SchemeFile's budget, certificate, model, ..."""
    layers = quantized_layers(canonical.model)
    records = {}
    for name, precision in canonical.scheme.items():
        rows = weight_rows(layers[name], float_weight(layers[name]))
        records[name] = LayerRecord(precision=str(precision), rows=rows.shape[0], columns=rows.shape[1])
    file = SchemeFile(layers=records, folded=dict(canonical.folded), edges=list(canonical.edges), sha256="", **about)
    save_file(packed_tensors(canonical), folder / "model.safetensors", {"scheme": file.digest()})
    file.sha256 = sha256_of(folder / "model.safetensors")
    write_json(folder / "scheme.json", file.model_dump())


def read_scheme(folder: Path) -> SchemeFile:
    """scheme.json, strictly, and only if model.safetensors is the one it was written with and was written for it."""
    path = folder / "scheme.json"
    several = [] if path.is_file() else runs_in(folder)
    if several:
        raise InvalidFile(f"{folder} holds several runs: {', '.join(run.name for run in several)}. Name one of them: {several[0]}.")
    if not path.is_file() and (folder / SUPERNET).is_file():
        raise InvalidFile(
            f"{folder} holds a supernet, which has no scheme of its own. Extract a subnet: anybit extract {folder} --budget 3bit."
        )
    data = read_json(path)
    check_version(data, path, FORMAT_VERSION)
    file = validated(SchemeFile, data, str(path))
    try:
        _ = file.scheme
        Preprocessing.from_json(file.preprocessing)
    except AnybitError as error:
        raise InvalidFile(f"{path}: {in_words(error)}") from error
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InvalidFile(f"{weights} is missing. The run is incomplete: run it again.")
    if sha256_of(weights) != file.sha256:
        raise InvalidFile(f"{weights} is not the file that scheme.json was written with (its SHA-256 differs). Restore it or run again.")
    if digest_in(weights, "scheme") != file.digest():
        raise InvalidFile(
            f"{folder / 'scheme.json'} is not the one that {weights.name} was written for: a layer, fold, edge, the preprocessing or "
            "the task has been edited. Restore it or run again."
        )
    return file


def digest_in(path: Path, of: str) -> str | None:
    """The digest that a file of tensors holds of what gives them their meaning."""
    return read_header(path)[1].get(of)


def read_canonical(folder: Path, float_model: nn.Module, file: SchemeFile | None = None) -> Canonical:
    """The canonical model that was saved, on a copy of the float network: its outputs are bitwise those of the saved one."""
    file = file or read_scheme(folder)
    scheme = file.scheme
    names = {name for name, _ in float_model.named_modules()}
    check_names([*file.layers, *file.folded, *file.folded.values()], names, "The model")
    check_folded(file, float_model, "scheme.json")
    folded, _ = batchnorm.fold(float_model, file.folded)
    kept_float = [name for name, precision in scheme.items() if precision.weight_bits is None]
    model = prepare(folded, list(file.layers), kept_float, _groups(folded, file))
    layers = quantized_layers(model)
    for name, record in file.layers.items():
        shape = tuple(weight_rows(layers[name], float_weight(layers[name])).shape)
        if shape != (record.rows, record.columns):
            raise SchemeMismatch(
                f"{name}: the weight is {shape[0]} x {shape[1]} in the model and {record.rows} x {record.columns} in the file."
            )
    coded = [name for name, precision in scheme.items() if precision.weight_bits is not None]
    numbers, others = leftovers(model, coded)
    stored = [
        StoredLayer(record.rows, record.columns, scheme[name].weight_bits, operands_of(layers[name]) * bool(scheme[name].activation_bits))
        for name, record in file.layers.items()
    ]
    specs = layout(stored, len(file.edges), sum(t.numel() for t in numbers.values()), {key: spec_of(t) for key, t in others.items()})
    tensors = read_tensors(folder / "model.safetensors", specs)
    cursor = {name: 0 for name in tensors}

    def take(name: str, count: int) -> Tensor:
        part = tensors[name][cursor[name] : cursor[name] + count]
        cursor[name] += count
        return part

    for name, precision in scheme.items():
        layer, record = layers[name], file.layers[name]
        weights = inputs = None
        if precision.weight_bits:
            stream = take("codes", packed_bytes(record.rows * record.columns, precision.weight_bits)).numpy()
            codes = torch.from_numpy(unpack(stream, precision.weight_bits, record.rows * record.columns)).view(record.rows, record.columns)
            weights = WeightCandidate(codes, checked_scale(take("weight_scales", record.rows), name)[:, None], None)
        if precision.activation_bits:
            count = operands_of(layer)
            scale, zero_point = checked_scale(take("activation_scales", count), name), take("activation_zero_points", count).float()
            if zero_point.max() > 2**precision.activation_bits - 1:
                raise InvalidFile(f"{name}: activation zero point {int(zero_point.max())} is above {2**precision.activation_bits - 1}.")
            inputs = ActivationCandidate(*((scale, zero_point) if count > 1 else (scale[0], zero_point[0])))
        install(layer, weights, inputs, precision)
    with torch.no_grad():
        for tensor in numbers.values():
            tensor.copy_(take("floats", tensor.numel()).view(tensor.shape))
        for key, tensor in others.items():
            tensor.copy_(tensors[key])
    edges = dict(zip(file.edges, [tuple(row) for row in tensors["edges"].tolist()], strict=True)) if file.edges else {}
    check_edges(edges, folder / "model.safetensors")
    check_state(model, folder / "model.safetensors")
    return Canonical(model.eval(), file.folded, edges)


def check_edges(edges: Mapping[str, tuple[float, float]], where: Path | str) -> None:
    """Raise InvalidFile naming the first edge whose stored ends are not finite, or in the wrong order."""
    for name, (low, high) in edges.items():
        if not -math.inf < low <= high < math.inf:
            raise InvalidFile(f"{where}: edge {name} reaches from {low:g} to {high:g}. Restore the file or run again.")


def check_state(model: nn.Module, path: Path) -> None:
    """Raise InvalidFile naming the first tensor of a loaded model that is not finite, or a variance below zero."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidFile(f"{path}: {name} would hold NaN or infinity. Restore the file or run again.")
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_var is not None and (module.running_var < 0).any():
            raise InvalidFile(f"{path}: {name} has a variance of {module.running_var.min():g}. Restore the file or run again.")


def _groups(model: nn.Module, file: SchemeFile) -> dict[str, int]:
    """layer -> group size, of those whose rows in the file are shorter than the model's."""
    groups = {}
    for name, record in file.layers.items():
        layer = model.get_submodule(name)
        whole = isinstance(layer, (nn.Linear, nn.Embedding)) and layer.weight.numel() == record.rows * record.columns
        if whole and 0 < record.columns < layer.weight.shape[1]:
            groups[name] = record.columns
    return groups


def check_folded(file: Any, float_model: nn.Module, name: str) -> None:
    """Each pair that `file` (called `name`) folds must be one of its layers and a batch norm of as many channels, named once."""
    if len(set(file.folded.values())) < len(file.folded) or len(set(file.edges)) < len(file.edges):
        raise InvalidFile(f"{name} names a batch norm or an edge twice.")
    for layer, norm in file.folded.items():
        module = float_model.get_submodule(norm)
        rows = file.layers[layer].rows if layer in file.layers else None
        if not isinstance(module, BATCH_NORMS) or module.num_features != rows:
            raise InvalidFile(f"{name} folds {norm} into {layer}, but that is no batch norm of the layer's {rows} channels.")


def checked_scale(scale: Tensor, where: str) -> Tensor:
    """`scale` itself, when it is above zero and its multiples by 8-bit codes are finite."""
    if not (torch.isfinite(scale * 255).all() and (scale > 0).all()):
        raise InvalidFile(f"{where}: a stored scale is not a positive finite number. Restore the file or run again.")
    return scale


def write_candidates(folder: Path, candidates: Candidates, about: Mapping[str, Any]) -> None:
    """candidates.safetensors (packed codes, scales and biases a candidate) and candidates.json with `about`."""
    save_file(to_tensors(candidates), folder / "candidates.safetensors")
    told = {"version": FORMAT_VERSION, "sha256": sha256_of(folder / "candidates.safetensors"), "run": sha256_of(folder / MODEL), **about}
    write_json(folder / "candidates.json", sealed(told))


class TableRecord(BaseModel):
    """The sensitivity table in candidates.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    base: str
    samples: int = Field(ge=0)
    pairs: bool
    floor: float
    rows: dict[str, dict[str, float]]


class CandidatesFile(BaseModel):
    """candidates.json. Strict: a wrong type, a missing or an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[1]
    sha256: str
    run: str
    table: TableRecord
    choices: dict[str, list[str]]
    settings: dict[str, Any]
    digest: str


def read_candidates(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> tuple[Candidates, dict]:
    """What `write_candidates` wrote, for layers of these row x column shapes; (candidates, about)."""
    again = "Run calibrate again."
    if not (folder / "candidates.json").is_file():
        raise InvalidFile(f"{folder} has no candidates.json: runs of calibrate alone have candidates to allocate. Name such a run.")
    about = read_sealed(folder / "candidates.json", FORMAT_VERSION, again)
    file, path = validated(CandidatesFile, about, str(folder / "candidates.json")), folder / "candidates.safetensors"
    if not path.is_file() or sha256_of(path) != file.sha256:
        raise InvalidFile(f"{path} is missing or not the file that candidates.json was written with. {again}")
    if sha256_of(folder / MODEL) != file.run:
        raise InvalidFile(f"{folder / 'candidates.json'} belongs to another run than {folder / MODEL}. {again}")
    found, _ = read_header(path)
    tensors = read_tensors(path, _candidate_specs(path, found, file.choices, shapes))
    try:
        return from_tensors(tensors, shapes), about
    except InvalidFile as error:
        raise InvalidFile(f"{path} cannot be read: {error}. {again}") from error


def _candidate_specs(
    path: Path, found: Mapping[str, TensorSpec], choices: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, TensorSpec]:
    """What candidates.safetensors must hold: all that the layers may choose; more bit-widths of theirs, and biases, as far as it does."""
    check_names(choices, shapes, "scheme.json")
    parsed = {name: [Precision.parse(text) for text in texts] for name, texts in choices.items()}
    needed = {f"{name}|W{p.weight_bits}|codes" for name, options in parsed.items() for p in options if p.weight_bits}
    needed |= {f"{name}|A{p.activation_bits}" for name, options in parsed.items() for p in options if p.activation_bits}
    specs = {}
    for key in sorted({*needed, *found}):
        match = KEY.fullmatch(key)
        if match is None or match["name"] not in choices:
            raise InvalidFile(f"{path}: {reprlib.repr(key)} is no candidate of a layer in candidates.json. Run calibrate again.")
        rows, columns = shapes[match["name"]]
        if match["activation_bits"]:
            specs[key] = TensorSpec("F32", (2,) if rows * columns else (2, 2))
            continue
        name, bits = match["name"], int(match["weight_bits"])
        specs |= {f"{name}|W{bits}|codes": TensorSpec("U8", (packed_bytes(rows * columns, bits),))}
        specs |= {f"{name}|W{bits}|scale": TensorSpec("F32", (rows,))}
        if match["part"] == "bias":
            specs[key] = TensorSpec("F32", found[key].shape[:1])
    return specs


REPORT = "report.json"
SEARCH = "search.json"
TIMES = ("stages", "latency", "budgets")
"""What no digest of a report guards: no two runs take as long. (Of several budgets each has its own.)"""


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """report.json, bound to the tensors that are in the folder already."""
    tensors = _tensors_in(folder)
    told = {**report} if tensors is None else {**report, "sha256": sha256_of(tensors)}
    if "budgets" in told:
        told["budgets"] = {name: sealed(one, TIMES) for name, one in told["budgets"].items()}
    write_json(folder / REPORT, sealed(told, TIMES))


def read_report(folder: Path) -> dict[str, Any]:
    """report.json, strictly: as it was written, and of the tensors that are in the folder."""
    path, again = folder / REPORT, "Run again."
    report = read_sealed(path, FORMAT_VERSION, again, TIMES)
    several = validated(dict[str, dict[str, Any]], report.get("budgets", {}), f"{path}: budgets")
    for name, one in several.items():
        check_sealed(one, f"{path}: {name}", again, TIMES)
        record_of(one, f"{path}: {name}")
    if not several:
        record_of(report, str(path))
    tensors = _tensors_in(folder)
    if "sha256" in report and (tensors is None or sha256_of(tensors) != report["sha256"]):
        raise InvalidFile(f"{path} was not measured on {'the tensors' if tensors is None else tensors.name} in {folder}. {again}")
    return report


def _tensors_in(folder: Path) -> Path | None:
    return next((folder / name for name in (MODEL, SUPERNET) if (folder / name).is_file()), None)


def read_record(folder: Path) -> Record:
    """What one run folder reports, with all that its search evaluated where it is a search's."""
    record = record_of(read_report(folder), str(folder / REPORT))
    if not (record.result or record.search or record.subnets):
        raise InvalidFile(f"{folder / REPORT} is no report of a run: it has neither a result nor subnets.")
    whole = record.search is not None and (folder / SEARCH).is_file()
    return record.model_copy(update={"search": read_search(folder)}) if whole else record


def read_search(folder: Path) -> SearchFile:
    """search.json, strictly, and only if it is of the supernet beside it."""
    path, again = folder / SEARCH, "Search again."
    found = validated(SearchFile, read_sealed(path, FORMAT_VERSION, again), str(path))
    if found.sha256 != sha256_of(folder / SUPERNET):
        raise InvalidFile(f"{path} is not of the {SUPERNET} beside it. {again}")
    return found


@contextmanager
def new_folder(
    path: Path, overwrite: bool = False, check: Callable[[Path, bool], None] | None = None, remedy: str | None = None
) -> Iterator[Path]:
    """A fresh folder to write into, moved to `path` when the block ends well and removed when it does not.

    `check` raises where `path` is taken; without one, `check_free`.
    """
    check = check or check_free
    check(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
        draft = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            draft.mkdir()
            yield draft
            check(path, overwrite)  # another run may have taken the place meanwhile
            _open_as_others(draft)
            _put_in_place(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        remedy = remedy or "Make room, or choose another --output; what was finished is kept, and the same command continues."
        raise AnybitError(f"{path} cannot be written: {error}. Nothing is left there. {remedy}") from error


def _open_as_others(folder: Path) -> None:
    """Give the files in a folder the rights that new ones have here: those of tensors are made for their writer alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _put_in_place(draft: Path, path: Path) -> None:
    """Move the draft to `path`; an old run goes only once the new one stands in its place, and comes back where it does not."""
    if not path.exists():
        draft.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}.old.", dir=path.parent))
    try:
        path.rename(aside / path.name)
        draft.rename(path)
    finally:
        if not path.exists():
            (aside / path.name).rename(path)
        shutil.rmtree(aside)


def _remove_left_behind(path: Path) -> None:
    """Remove the drafts of `path` that a killed process has left; an old run that was being replaced goes only if another is there."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        writer = draft.name.removeprefix(f".{path.name}.").split(".")
        if writer[0].isdigit() and not _is_alive(int(writer[0])) and (writer[1] != "old" or path.exists()):
            shutil.rmtree(draft, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


CHECKPOINT = "checkpoint.safetensors"
RUN_FILES = {
    "scheme.json",
    "model.safetensors",
    REPORT,
    "candidates.safetensors",
    "candidates.json",
    "report.html",
    SUPERNET,
    "supernet.json",
    SEARCH,
    CHECKPOINT,
    f".{CHECKPOINT}.tmp",
}


def is_run(path: Path) -> bool:
    """Whether the folder holds what anybit writes, and nothing else: a run, or several with their common report."""
    if not path.is_dir() or path.is_symlink():
        return False
    items = list(path.iterdir())
    known = all(item.name in RUN_FILES if item.is_file() else is_run(item) for item in items)
    return known and any(item.name == "report.json" for item in items)


def runs_in(path: Path) -> list[Path]:
    """The run folders inside one that holds several; none where `path` is a run itself."""
    return [] if (path / "scheme.json").is_file() else sorted(child.parent for child in path.glob("*/scheme.json"))


def check_free(path: Path, overwrite: bool = False, unfinished: bool = False) -> None:
    """Raise InvalidSetting where `path` is taken: by a run, unless it may be overwritten, or by anything else, always.

    A training that was interrupted has left its checkpoint alone there: free for the one that continues it (`unfinished`).
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if path.is_dir() and {item.name for item in path.iterdir()} <= {CHECKPOINT, f".{CHECKPOINT}.tmp"}:
        if unfinished or overwrite:
            return
        raise InvalidSetting(f"{path} holds an unfinished training. Continue it with the verb that began it, or give --overwrite.")
    if not is_run(path):
        raise InvalidSetting(f"{path} exists and is no run folder of anybit, or holds files besides. Choose another --output.")
    if not overwrite:
        raise InvalidSetting(f"{path} holds a finished run. Choose another --output, or give --overwrite.")


def _own_runs() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "anybit" / "runs.json"


def remember(folder: Path, file: str = "scheme.json") -> None:
    """List the run as one of this user's own, by the hash of the file that names its model, so that its reference may be followed.

    The run is written by then: a list that cannot be written is worth a warning, not the run.
    """
    listing = _own_runs()
    try:
        listing.parent.mkdir(parents=True, exist_ok=True)
        digest = sha256_of(folder / file)
        with _one_at_a_time(listing.with_suffix(".lock")):
            known = _known_runs(listing)
            if digest not in known:
                write_whole(listing, json.dumps([*known, digest], indent=1).encode())
    except (OSError, InvalidFile) as error:
        warnings.warn(
            f"{folder} is not listed as your own run ({error}): name its model when you load it, or mend {listing}.", stacklevel=2
        )


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here; a file system without locks lets all in."""
    with open(lock, "w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_own(folder: Path, file: str = "scheme.json") -> bool:
    """Whether this user's own run wrote the folder's scheme file (or another that names its model) as it stands."""
    return sha256_of(folder / file) in _known_runs(_own_runs())


def _known_runs(listing: Path) -> list[str]:
    """The hashes in the user's list; none where there is no list yet."""
    if not listing.is_file():
        return []
    known = read_json(listing)
    if not isinstance(known, list) or not all(isinstance(digest, str) for digest in known):
        raise InvalidFile(f"{listing} is no list of hashes. Remove it; your runs are then loaded with --model, as a stranger's are.")
    return known
