"""The supernet's one file: weights stored once, at 8 bits, from which the codes of every lower bit-width follow. numpy only.

    codes at b bits = clamp(round(codes at 8 bits * s / s_b), -2^(b-1), 2^(b-1) - 1)          s the store's step, s_b the bit-width's own

    codes                    I8  [weights]             at 8 bits, of all layers with quantized weights, in the file's order
    code_scales              F32 [channels]            s, one per row of the weight matrix
    weight_scales            F32 [widths x channels]   s_b, the widths of one layer after another
    activation_scales        F32 [widths x operands]   of the quantized inputs; of both operands for a matmul
    activation_zero_points   U8  [widths x operands]
    floats                   F32 [numbers]             all other float32 entries of the state dict, in its order
    statistics               F32 [subnets, numbers]    mean and variance of every batch norm, of the subnets whose statistics are stored
    edges                    F32 [subnets, edges, 2]   and observed ends of the tensors between layers
    anything else            under its own state-dict key and type

supernet.json gives the numbers their meaning, and holds this file's SHA-256.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from anybit.errors import InvalidFile, InvalidSetting
from anybit.files.strict import check_tensors, check_version, digest_of, load_tensors, read_header, read_json, sha256_of, validated
from anybit.numerics.packing import TensorSpec
from anybit.runs.names import SUPERNET, SUPERNET_JSON
from anybit.scheme import Precision, Scheme, check_choices

FORMAT_VERSION: Literal[1] = 1
STORE_BITS = 8
LARGEST_STEP = float(np.finfo(np.float32).max) / 256
"""A larger step times a code would overflow."""


@dataclass(frozen=True)
class StoredLayer:
    """One layer: its weight as rows x columns, the bit-widths of its weights and input ((None,) for float), and the number of activations
    that it reads."""

    rows: int
    columns: int
    weight_bits: tuple[int | None, ...]
    activation_bits: tuple[int | None, ...]
    operands: int = 1

    @property
    def has_codes(self) -> bool:
        return any(self.weight_bits)

    @property
    def choices(self) -> list[Precision]:
        return [Precision(w, a) for w in self.weight_bits for a in self.activation_bits]


@dataclass(frozen=True)
class LayerTensors:
    """One layer's tensors in the file.

    codes int8 [rows, columns], code_scale [rows]; weight_scales bits -> [rows]; ranges bits -> (scale, zero point) of each operand
    """

    codes: np.ndarray | None
    code_scale: np.ndarray | None
    weight_scales: Mapping[int, np.ndarray]
    ranges: Mapping[int, list[tuple[float, int]]]


class SupernetLayer(BaseModel):
    """One layer of supernet.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rows: int = Field(ge=0)
    columns: int = Field(ge=0)
    weight_bits: list[int | None] = Field(min_length=1)
    activation_bits: list[int | None] = Field(min_length=1)
    macs: int = Field(ge=0)
    per_channel: bool
    operands: Literal[1, 2] = 1


class SupernetFile(BaseModel):
    """supernet.json. Strict: a wrong type, a missing or an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["anybit supernet"] = "anybit supernet"
    version: Literal[1] = FORMAT_VERSION
    layers: dict[str, SupernetLayer]
    folded: dict[str, str] = {}
    edges: list[str] = []
    functions: dict[str, Any] | None = None
    subnets: list[dict[str, str]] = Field(min_length=1)
    settings: dict[str, Any] = {}
    model: dict[str, str | None] = {}
    data: dict[str, str | None] = {}
    preprocessing: dict[str, Any] = {}
    task: str = "classification"
    sha256: str
    fingerprint: str | None = None

    def digest(self) -> str:
        """Return the SHA-256 of the fields that give the tensors their meaning; their origin may be edited."""
        return digest_of(self.to_json({"layers", "folded", "edges", "functions", "subnets", "settings", "preprocessing", "task"}))

    def to_json(self, include: set[str] | None = None) -> dict[str, Any]:
        """Return the file's content, without `functions` if none was rewritten."""
        return self.model_dump(include=include, exclude=None if self.functions else {"functions"})

    def stored(self) -> dict[str, StoredLayer]:
        """Return the layers without the fields that only PyTorch needs."""
        return {
            name: StoredLayer(one.rows, one.columns, tuple(one.weight_bits), tuple(one.activation_bits), one.operands)
            for name, one in self.layers.items()
        }


def read_store(folder: Path) -> SupernetFile:
    """Read supernet.json strictly, and check that it and supernet.safetensors belong together."""
    path, tensors = folder / SUPERNET_JSON, folder / SUPERNET
    data = read_json(path)
    check_version(data, path, FORMAT_VERSION)
    file = validated(SupernetFile, data, str(path))
    for name, layer in file.stored().items():
        try:
            _ = layer.choices
        except InvalidSetting as error:
            raise InvalidFile(f"{path}: layer {name}: {error}") from error
        for bits in (layer.weight_bits, layer.activation_bits):
            if len(set(bits)) < len(bits) or (None in bits and len(bits) > 1) or 0 in bits:
                fault = f"has bit-widths {list(bits)}, not distinct ones or float alone"
                raise InvalidFile(f"{path}: layer {name} {fault}. Restore it or train again.")
    if not tensors.is_file() or sha256_of(tensors) != file.sha256:
        raise InvalidFile(f"{tensors} is missing or not the file that {SUPERNET_JSON} was written with. Restore it or train again.")
    if read_header(tensors)[1].get("supernet") != file.digest():
        raise InvalidFile(f"{path} is not the one that {SUPERNET} was written for: it was edited. Restore it.")
    return file


def layer_specs(layers: Mapping[str, StoredLayer]) -> dict[str, TensorSpec]:
    """Return the type and shape of the shared tensors that hold the layers' weights and ranges."""
    coded = [layer for layer in layers.values() if layer.has_codes]
    inputs = sum(layer.operands for layer in layers.values() for bits in layer.activation_bits if bits)
    return {
        "codes": TensorSpec("I8", (sum(layer.rows * layer.columns for layer in coded),)),
        "code_scales": TensorSpec("F32", (sum(layer.rows for layer in coded),)),
        "weight_scales": TensorSpec("F32", (sum(layer.rows * len(layer.weight_bits) for layer in coded),)),
        "activation_scales": TensorSpec("F32", (inputs,)),
        "activation_zero_points": TensorSpec("U8", (inputs,)),
    }


def check_parts(parts: Mapping[str, LayerTensors], path: Path) -> None:
    """Raise InvalidFile naming the first layer with a step that is not positive, or a zero point outside of its bits."""
    for name, part in parts.items():
        steps = [*([] if part.code_scale is None else [part.code_scale]), *part.weight_scales.values()]
        steps += [np.array([scale for scale, _ in operands], np.float32) for operands in part.ranges.values()]
        if not all((step > 0).all() and (step <= LARGEST_STEP).all() for step in steps):
            raise InvalidFile(f"{path}: a stored step of {name} is not a positive finite number. Restore it or train again.")
        for bits, operands in part.ranges.items():
            if any(zero > 2**bits - 1 for _, zero in operands):
                raise InvalidFile(f"{path}: a zero point of {name} at {bits} bits is above {2**bits - 1}. Restore it or train again.")


def lower(codes: np.ndarray, code_scale: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Return int8 codes of `bits` bits at step `scale` [rows], from the store's codes and step."""
    values = codes.astype(np.float32) * code_scale[:, None]
    return np.clip(np.rint(values / scale[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)


def split_tensors(layers: Mapping[str, StoredLayer], tensors: Mapping[str, np.ndarray]) -> dict[str, LayerTensors]:
    """Split the shared tensors into layers."""
    empty = np.zeros(0, np.float32)
    taken = dict.fromkeys(("codes", "code_scales", "weight_scales", "activation_scales"), 0)

    def take(name: str, count: int) -> np.ndarray:
        start, taken[name] = taken[name], taken[name] + count
        return tensors.get(name, empty)[start : taken[name]]

    parts = {}
    for name, layer in layers.items():
        codes, code_scale = None, None
        scales: dict[int, np.ndarray] = {}
        if layer.has_codes:
            codes, code_scale = (
                take("codes", layer.rows * layer.columns).reshape(layer.rows, layer.columns),
                take("code_scales", layer.rows),
            )
            scales = {bits: take("weight_scales", layer.rows) for bits in layer.weight_bits if bits}
        first, widths = taken["activation_scales"], [bits for bits in layer.activation_bits if bits]
        count = len(widths) * layer.operands
        zeros = tensors.get("activation_zero_points", empty)[first : first + count].reshape(-1, layer.operands)
        steps = take("activation_scales", count).reshape(-1, layer.operands)
        ranges = {
            bits: [(float(s), int(z)) for s, z in zip(scale, zero, strict=True)]
            for bits, scale, zero in zip(widths, steps, zeros, strict=True)
        }
        parts[name] = LayerTensors(codes, code_scale, scales, ranges)
    return parts


def slice_subnet(folder: str | Path, scheme: Scheme | Mapping[str, str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return layer -> (int8 codes [rows, columns], float32 scale [rows]) of a subnet, from the stored supernet, without PyTorch.

    `scheme` names a precision for every layer; layers with float weights are left out. The scales are those before batch norm is folded.
    Raises InvalidFile if the folder is damaged, SchemeMismatch if the scheme does not fit it.
    """
    folder = Path(folder)
    layers = read_store(folder).stored()
    expected = {name: spec for name, spec in layer_specs(layers).items() if spec.nbytes}
    stored = read_header(folder / SUPERNET)[0]
    check_tensors(folder / SUPERNET, {name: spec for name, spec in stored.items() if name in expected}, expected)
    parts = split_tensors(layers, load_tensors(folder / SUPERNET, expected, "np"))
    check_parts(parts, folder / SUPERNET)
    scheme = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
    check_choices(scheme, {name: layer.choices for name, layer in layers.items()})
    sliced = {}
    for name, precision in scheme.items():
        if precision.weight_bits:
            part, scale = parts[name], parts[name].weight_scales[precision.weight_bits]
            assert part.codes is not None and part.code_scale is not None  # the layer has bits to choose from
            sliced[name] = (lower(part.codes, part.code_scale, scale, precision.weight_bits), scale)
    return sliced


def to_json(layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
    return {
        name: {
            "rows": one.rows,
            "columns": one.columns,
            "weight_bits": list(one.weight_bits),
            "activation_bits": list(one.activation_bits),
            "operands": one.operands,
        }
        for name, one in layers.items()
    }
