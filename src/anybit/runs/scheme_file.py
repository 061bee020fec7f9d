"""scheme.json and model.safetensors: the canonical form, packed, written and read strictly."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor, nn

from anybit.data.batches import in_evaluation_mode
from anybit.data.options import TaskName
from anybit.errors import AnybitError, InvalidFile, InvalidSetting, SchemeMismatch
from anybit.files.strict import check_version, in_words, read_header, read_json, read_tensors, sha256_of, validated, write_json
from anybit.networks import batchnorm
from anybit.networks.candidates import ActivationCandidate, WeightCandidate, install
from anybit.networks.canonical import Canonical
from anybit.networks.edges import edge_grids
from anybit.networks.layer_types import COVERED, type_of
from anybit.networks.layers import QuantizedLayer, codes_of, float_weight, prepare, quantized_layers, weight_rows
from anybit.networks.norms import is_norm, keeps_statistics, running_statistics
from anybit.networks.rewrites import Rewrite, rewrite_of, rewritten_as
from anybit.networks.rounding import edge_grids as edge_grids_of
from anybit.networks.rounding import round_edges
from anybit.networks.states import check_state, leftovers, spec_of
from anybit.numerics.packing import PackedLayer, layout, pack, packed_bytes, unpack
from anybit.numerics.quantizers import frozen
from anybit.runs.fingerprint import check_fingerprint, read_fingerprint, write_fingerprint
from anybit.runs.folder import FORMAT_VERSION, check_run
from anybit.scheme import Scheme, check_names
from anybit.sources.preprocessing import Preprocessing


class LayerRecord(BaseModel):
    """One layer of scheme.json: its precision and its weight's shape as rows x columns (0 x 0 for a matmul).

    With a scale per group of inputs, the rows are the groups, with fewer columns than the layer has inputs.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    precision: str
    rows: int = Field(ge=0)
    columns: int = Field(ge=0)


class SchemeFile(BaseModel):
    """scheme.json. Strict: a wrong type, a missing or an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["anybit"] = "anybit"
    version: Literal[1] = 1
    layers: dict[str, LayerRecord]
    folded: dict[str, str] = {}
    edges: list[str] = []
    functions: Rewrite | None = None
    rounded: list[str] | None = None
    """The edges that the network rounds; None in old runs that rounded none."""
    budget: str | None = None
    certificate: dict[str, Any] = {}
    model: dict[str, str | None] = {}
    data: dict[str, str | None] = {}
    preprocessing: dict[str, Any] = {}
    task: TaskName = "classification"
    outputs: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """The outputs that the run compared, name or index -> weight; None if none were chosen."""
    sha256: str
    fingerprint: str | None = None

    @property
    def scheme(self) -> Scheme:
        return Scheme.parse({name: record.precision for name, record in self.layers.items()})

    def to_json(self, include: set[str] | None = None) -> dict[str, Any]:
        """Return the file's content, without `functions` if none was rewritten, and without other empty fields."""
        absent = {name for name in ("functions", "rounded", "outputs") if getattr(self, name) is None}
        return self.model_dump(include=include, exclude=absent)

    def digest(self) -> str:
        """Return the SHA-256 of the fields that give the tensors their meaning; their origin may be edited."""
        meaning = self.to_json(include={"layers", "folded", "edges", "rounded", "functions", "preprocessing", "task", "outputs"})
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def packed_tensors(canonical: Canonical) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors."""
    layers = quantized_layers(canonical.model)
    scheme = canonical.scheme
    codes, scales, input_scales, zero_points = [], [], [], []
    float_layers = [name for name, precision in scheme.items() if precision.weight_bits is None]
    for name, precision in scheme.items():
        layer = layers[name]
        if precision.weight_bits:
            codes.append(torch.from_numpy(pack(codes_of(layer).numpy(), precision.weight_bits)))
            scales.append(frozen(layer.weight_quantizer).scale.flatten())
        if precision.activation_bits:
            quantizer = frozen(layer.input_quantizer)
            input_scales.append(quantizer.scale.reshape(-1))
            zero_points.append(quantizer.zero_point.reshape(-1).to(torch.uint8))
    numbers, others = leftovers(canonical.model, [name for name in scheme if name not in float_layers])
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


def check_not_converted(canonical: Canonical) -> None:
    """Raise InvalidSetting if the model was converted to another type since it was created with float32 scales."""
    for name, layer in quantized_layers(canonical.model).items():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            types = {tensor.dtype for tensor in quantizer.buffers()} if quantizer is not None else set()
            for other in types - {torch.float32}:
                raise InvalidSetting(f"{name}: its scales are {other} instead of float32: the model was converted. Save it before that.")


def write_canonical(folder: Path, canonical: Canonical, provenance: Mapping[str, Any]) -> None:
    """Write scheme.json and model.safetensors into `folder`; `provenance` fills SchemeFile's budget, certificate, model, ...

    Raises InvalidSetting if the model was converted since it was created.
    """
    check_not_converted(canonical)
    layers = quantized_layers(canonical.model)
    records = {}
    for name, precision in canonical.scheme.items():
        rows = weight_rows(layers[name], float_weight(layers[name]))
        records[name] = LayerRecord(precision=str(precision), rows=rows.shape[0], columns=rows.shape[1])
    file = SchemeFile(
        layers=records,
        folded=dict(canonical.folded),
        edges=list(canonical.edges),
        functions=rewrite_of(canonical.model),
        rounded=list(edge_grids_of(canonical.model)),
        sha256="",
        **provenance,
    )
    save_file(packed_tensors(canonical), folder / "model.safetensors", {"scheme": file.digest()})
    file.sha256 = sha256_of(folder / "model.safetensors")
    file.fingerprint = write_fingerprint(folder, canonical.fingerprint)
    write_json(folder / "scheme.json", file.to_json())


def read_scheme(folder: Path) -> SchemeFile:
    """Read scheme.json strictly, and check that it and model.safetensors belong together."""
    path = folder / "scheme.json"
    if not path.is_file():
        check_run(folder)
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
    if stored_digest(weights, "scheme") != file.digest():
        raise InvalidFile(
            f"{folder / 'scheme.json'} is not the one that {weights.name} was written for: a layer, fold, edge, the preprocessing, "
            "the task or the outputs were edited. Restore it or run again."
        )
    return file


def stored_digest(path: Path, of: str) -> str | None:
    """Return the digest, stored in a tensors' file, of the fields that give its tensors their meaning."""
    return read_header(path)[1].get(of)


def read_canonical(folder: Path, float_model: nn.Module, file: SchemeFile | None = None) -> Canonical:
    """Read the saved canonical model onto a copy of the float network: its outputs are bitwise those of the saved one."""
    file = file or read_scheme(folder)
    scheme = file.scheme
    float_model = with_functions(float_model, file.functions, file.layers, "scheme.json")
    names = {name for name, _ in float_model.named_modules()}
    check_names([*file.layers, *file.folded, *file.folded.values()], names, "The model")
    check_folded(file, float_model, "scheme.json")
    folded, _ = batchnorm.fold(float_model, file.folded)
    float_layers = [name for name, precision in scheme.items() if precision.weight_bits is None]
    model = prepare(folded, list(file.layers), float_layers, _groups(folded, file))
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
        PackedLayer(
            record.rows, record.columns, scheme[name].weight_bits, type_of(layers[name]).operands * bool(scheme[name].activation_bits)
        )
        for name, record in file.layers.items()
    ]
    specs = layout(stored, len(file.edges), sum(t.numel() for t in numbers.values()), {key: spec_of(t) for key, t in others.items()})
    tensors = read_tensors(folder / "model.safetensors", specs)
    _load(layers, file, tensors, numbers, others)
    edges = dict(zip(file.edges, [tuple(row) for row in tensors["edges"].tolist()], strict=True)) if file.edges else {}
    check_edges(edges, folder / "model.safetensors")
    check_state(model, folder / "model.safetensors")
    check_fingerprint(folder, file.fingerprint, model)
    model = round_edges(in_evaluation_mode(model), edge_grids(edges, file.rounded or ()))
    return Canonical(model, file.folded, edges, read_fingerprint(folder, file.fingerprint))


def _load(
    layers: Mapping[str, QuantizedLayer],
    file: SchemeFile,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
) -> None:
    """Load the tensors of model.safetensors into the layers' slots and, in place, into the other entries of the state dict.

    `numbers` are the float32 entries, which share one tensor; `others` have their own keys.
    """
    cursor = {name: 0 for name in tensors}

    def take(name: str, count: int) -> Tensor:
        values = tensors[name][cursor[name] : cursor[name] + count]
        cursor[name] += count
        return values

    for name, precision in file.scheme.items():
        layer, record = layers[name], file.layers[name]
        weights = inputs = None
        if precision.weight_bits:
            stream = take("codes", packed_bytes(record.rows * record.columns, precision.weight_bits)).numpy()
            codes = torch.from_numpy(unpack(stream, precision.weight_bits, record.rows * record.columns)).view(record.rows, record.columns)
            weights = WeightCandidate(codes, checked_scale(take("weight_scales", record.rows), name)[:, None], None)
        if precision.activation_bits:
            count = type_of(layer).operands
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


def check_edges(edges: Mapping[str, tuple[float, float]], where: Path | str) -> None:
    """Raise InvalidFile naming the first edge whose stored range is not finite, or in the wrong order."""
    for name, (low, high) in edges.items():
        if not -math.inf < low <= high < math.inf:
            raise InvalidFile(f"{where}: edge {name} reaches from {low:g} to {high:g}. Restore the file or run again.")


def _groups(model: nn.Module, file: SchemeFile) -> dict[str, int]:
    """Return layer -> group size, for layers whose rows in the file are shorter than the model's."""
    groups = {}
    for name, record in file.layers.items():
        layer = model.get_submodule(name)
        if not (isinstance(layer, COVERED) and type_of(layer).grouped):
            continue
        weight = float_weight(layer)
        if weight.numel() == record.rows * record.columns and 0 < record.columns < weight.shape[1]:
            groups[name] = record.columns
    return groups


def check_folded(file: Any, float_model: nn.Module, name: str) -> None:
    """Raise InvalidFile unless each pair that `file` (called `name`) folds is a layer and a batch norm with equal channels, named once."""
    if len(set(file.folded.values())) < len(file.folded) or len(set(file.edges)) < len(file.edges):
        raise InvalidFile(f"{name} names a batch norm or an edge twice.")
    if unknown := set(getattr(file, "rounded", None) or ()) - set(file.edges):
        raise InvalidFile(f"{name} rounds {min(unknown)}, which is not one of its edges.")
    for layer, norm in file.folded.items():
        module = float_model.get_submodule(norm)
        rows = file.layers[layer].rows if layer in file.layers else None
        if not (is_norm(module) and keeps_statistics(module)) or len(running_statistics(module)[0]) != rows:
            raise InvalidFile(f"{name} folds {norm} into {layer}, but that is not a batch norm of the layer's {rows} channels.")


def with_functions(model: nn.Module, rewrite: Rewrite | None, layers: Mapping[str, Any], name: str) -> nn.Module:
    """Return `model` with the layers that, according to a file (called `name`), compute its functions.

    Raises InvalidFile unless every added layer is one of the file's `layers`, with their rows and columns.
    """
    if rewrite is None:
        return model
    for added, layer in rewrite.layers.items():
        record = layers.get(added)
        if record is None or record.rows * record.columns != layer.weights:
            raise InvalidFile(f"{name} adds {added}, which is not one of its layers, or has another size. Restore the file or run again.")
    return rewritten_as(model, rewrite)


def checked_scale(scale: Tensor, where: str) -> Tensor:
    """Return `scale`. Raises InvalidFile unless it is positive and its multiples by 8-bit codes are finite."""
    if not (torch.isfinite(scale * 255).all() and (scale > 0).all()):
        raise InvalidFile(f"{where}: a stored scale is not a positive finite number. Restore the file or run again.")
    return scale
