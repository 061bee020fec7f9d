"""The run folder: strict reading, atomic writing. safetensors and JSON only; nothing in a folder is executed by reading it.

scheme.json          the scheme, the certificate, what the packed file's numbers belong to, and its SHA-256
model.safetensors    packed codes, scales, edge ranges, float leftovers (layout: `packing`)
report.json          the measured report; report.html shows it
candidates.safetensors, candidates.json    what `anybit allocate` needs to serve another budget (only in calibrate's folders)
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anybit import batchnorm
from anybit.candidates import ActivationCandidate, Candidates, WeightCandidate, from_tensors, install, to_tensors
from anybit.cost import leftovers, operands_of, spec_of
from anybit.errors import AnybitError, InvalidFile, InvalidSetting, SchemeMismatch
from anybit.evaluation import Task
from anybit.layers import codes_of, float_weight, prepare, quantized_layers, scheme_of, weight_rows
from anybit.packing import StoredLayer, layout, pack, packed_bytes, unpack
from anybit.references import Preprocessing
from anybit.scheme import Scheme, check_names
from anybit.wiring import BATCH_NORMS

FORMAT_VERSION = 1


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
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
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
    data = read_json(folder / "scheme.json")
    if isinstance(data, dict) and isinstance(data.get("version"), int) and data["version"] > FORMAT_VERSION:
        raise InvalidFile(
            f"{folder / 'scheme.json'} has format version {data['version']}; this anybit reads up to {FORMAT_VERSION}. Upgrade anybit."
        )
    try:
        file = SchemeFile.model_validate(data)
        _ = file.scheme
        Preprocessing.from_json(file.preprocessing)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidFile(f"{folder / 'scheme.json'}: {where}: {first['msg']}.") from error
    except (AnybitError, TypeError) as error:
        raise InvalidFile(f"{folder / 'scheme.json'}: {error}") from error
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
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(of)
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{path} cannot be read: {error}") from error


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
    tensors = read_tensors(folder / "model.safetensors", {name: (spec.dtype, spec.shape) for name, spec in specs.items()})
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
            weights = WeightCandidate(codes, _positive(take("weight_scales", record.rows), name)[:, None], None)
        if precision.activation_bits:
            count = operands_of(layer)
            scale, zero_point = _positive(take("activation_scales", count), name), take("activation_zero_points", count).float()
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
    return Canonical(model.eval(), file.folded, edges)


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


def _positive(scale: Tensor, name: str) -> Tensor:
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise InvalidFile(f"{name}: a stored scale is not a positive finite number.")
    return scale


def read_tensors(path: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that must hold exactly the `expected` names, types and shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                lacking, surplus = sorted(set(expected) - names), sorted(names - set(expected))
                raise InvalidFile(f"{path}: tensors lacking: {lacking or 'none'}; unexpected: {surplus or 'none'}.")
            for name, (dtype, shape) in expected.items():
                part = file.get_slice(name)
                if part.get_dtype() != dtype or tuple(part.get_shape()) != tuple(shape):
                    found = f"{part.get_dtype()} {list(part.get_shape())}"
                    raise InvalidFile(f"{path}: tensor {name} is {found}; the scheme needs {dtype} {list(shape)}.")
            tensors = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{path} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidFile(f"{path}: tensor {name} holds NaN or infinity.")
    return tensors


def write_candidates(folder: Path, candidates: Candidates, about: Mapping[str, Any]) -> None:
    """candidates.safetensors (packed codes, scales and biases a candidate) and candidates.json with `about`."""
    save_file(to_tensors(candidates), folder / "candidates.safetensors")
    write_json(folder / "candidates.json", {"version": FORMAT_VERSION, "sha256": sha256_of(folder / "candidates.safetensors"), **about})


def read_candidates(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> tuple[Candidates, dict]:
    """What `write_candidates` wrote, for layers of these row x column shapes; (candidates, about)."""
    about = read_json(folder / "candidates.json")
    path = folder / "candidates.safetensors"
    complete = isinstance(about, dict) and all(isinstance(about.get(key), dict) for key in ("table", "choices", "settings"))
    if not complete or about.get("version") != FORMAT_VERSION:
        raise InvalidFile(f"{folder / 'candidates.json'} is not a candidates file of format version {FORMAT_VERSION}.")
    if not path.is_file() or sha256_of(path) != about.get("sha256"):
        raise InvalidFile(f"{path} is missing or not the file that candidates.json was written with. Run calibrate again.")
    try:
        with safe_open(path, framework="pt") as file:
            return from_tensors({key: file.get_tensor(key) for key in file.keys()}, shapes), about  # noqa: SIM118 (no dict)
    except (SafetensorError, InvalidFile) as error:
        raise InvalidFile(f"{path} cannot be read: {error}. Run calibrate again.") from error


def write_json(path: Path, data: Any) -> None:
    """Indented JSON with a final newline; numbers that JSON cannot hold are refused."""
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf8")


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    if not path.is_file():
        several = runs_in(path.parent) if path.name == "scheme.json" else []
        if several:
            names = ", ".join(run.name for run in several)
            raise InvalidFile(f"{path.parent} holds several runs: {names}. Name one of them: {several[0]}.")
        raise InvalidFile(f"{path} is not there. Is {path.parent} a run folder of anybit?")
    try:
        return json.loads(path.read_text(encoding="utf8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"{path} is not valid JSON: {error}") from error


def _refuse_constant(text: str):
    raise ValueError(f"{text} is not JSON")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A fresh folder to write into, moved to `path` when the block ends well and removed when it does not."""
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield draft
        draft.chmod(0o755)
        if path.exists():  # the old run goes only once the new one stands in its place
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / path.name
            path.rename(aside)
            draft.rename(path)
            shutil.rmtree(aside.parent)
        else:
            draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


CHECKPOINT = "checkpoint.safetensors"
RUN_FILES = {
    "scheme.json",
    "model.safetensors",
    "report.json",
    "candidates.safetensors",
    "candidates.json",
    "report.html",
    "supernet.safetensors",
    "supernet.json",
    "search.json",
    CHECKPOINT,
    f".{CHECKPOINT}.tmp",
}


def is_run(path: Path) -> bool:
    """Whether the folder holds what anybit writes, and nothing else: a run, or several with their common report."""
    if not path.is_dir():
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
        known = read_json(listing) if listing.is_file() else []
        digest = sha256_of(folder / file)
        if digest not in known:
            draft = listing.with_suffix(".tmp")
            write_json(draft, [*known, digest])
            draft.replace(listing)
    except (OSError, InvalidFile) as error:
        warnings.warn(
            f"{folder} is not listed as your own run ({error}): name its model when you load it, or mend {listing}.", stacklevel=2
        )


def is_own(folder: Path, file: str = "scheme.json") -> bool:
    """Whether this user's own run wrote the folder's scheme file (or another that names its model) as it stands."""
    return _own_runs().is_file() and sha256_of(folder / file) in read_json(_own_runs())
