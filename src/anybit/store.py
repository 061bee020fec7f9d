"""The supernet's one file: weights once, at 8 bits, from which the codes of every lower bit-width follow. numpy only.

    codes at b bits = clamp(round(codes at 8 bits * s / s_b), -2^(b-1), 2^(b-1) - 1)          s the store's step, s_b the width's own

    codes                    I8  [weights]             at 8 bits, of all layers with quantized weights, in the file's order
    code_scales              F32 [channels]            s, one a row of the weight matrix
    weight_scales            F32 [widths x channels]   s_b, the widths of one layer after another
    activation_scales        F32 [widths x operands]   of the quantized inputs, of both operands where a layer is a matmul
    activation_zero_points   U8  [widths x operands]
    floats                   F32 [numbers]             all other float32 entries of the state dict, in its order
    statistics               F32 [subnets, numbers]    mean and variance of every batch norm, of the subnets whose statistics are kept
    edges                    F32 [subnets, edges, 2]   and observed ends of the tensors between layers
    anything else            under its own state-dict key and type

supernet.json says what the numbers belong to, and holds this file's SHA-256.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anybit.errors import InvalidFile, SchemeMismatch
from anybit.scheme import Precision, Scheme

FILE = "supernet.safetensors"
STORE_BITS = 8


@dataclass(frozen=True)
class StoredLayer:
    """One layer: its weight as rows x columns, the bit-widths of its weights and input ((None,) where they are float), and how many
    activations it reads."""

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
    """What the file holds of one layer.

    codes int8 [rows, columns], code_scale [rows]; weight_scales bits -> [rows]; ranges bits -> (scale, zero point) of each operand
    """

    codes: np.ndarray | None
    code_scale: np.ndarray | None
    weight_scales: Mapping[int, np.ndarray]
    ranges: Mapping[int, list[tuple[float, int]]]


def lower(codes: np.ndarray, code_scale: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes of `bits` bits and step `scale` [rows], from those of the store and its step."""
    values = codes.astype(np.float32) * code_scale[:, None]
    return np.clip(np.rint(values / scale[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)


def split_tensors(layers: Mapping[str, StoredLayer], tensors: Mapping[str, np.ndarray]) -> dict[str, LayerTensors]:
    """The shared tensors cut into layers."""
    empty = np.zeros(0, np.float32)
    taken = dict.fromkeys(("codes", "code_scales", "weight_scales", "activation_scales"), 0)

    def take(name: str, count: int) -> np.ndarray:
        start, taken[name] = taken[name], taken[name] + count
        return tensors.get(name, empty)[start : taken[name]]

    found = {}
    for name, layer in layers.items():
        codes, code_scale, scales = None, None, {}
        if layer.has_codes:
            codes, code_scale = (
                take("codes", layer.rows * layer.columns).reshape(layer.rows, layer.columns),
                take("code_scales", layer.rows),
            )
            scales = {bits: take("weight_scales", layer.rows) for bits in layer.weight_bits}
        first, widths = taken["activation_scales"], [bits for bits in layer.activation_bits if bits]
        count = len(widths) * layer.operands
        zeros = tensors.get("activation_zero_points", empty)[first : first + count].reshape(-1, layer.operands)
        steps = take("activation_scales", count).reshape(-1, layer.operands)
        ranges = {
            bits: [(float(s), int(z)) for s, z in zip(scale, zero, strict=True)]
            for bits, scale, zero in zip(widths, steps, zeros, strict=True)
        }
        found[name] = LayerTensors(codes, code_scale, scales, ranges)
    return found


def slice_subnet(folder: str | Path, scheme: Scheme | Mapping[str, str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """layer -> (int8 codes [rows, columns], float32 scale [rows]) of a subnet, from the stored supernet, without PyTorch.

    Layers whose weights are float are left out. The scales are those before batch norm is folded.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = Path(folder)
    try:
        about, data = json.loads((folder / "supernet.json").read_text(encoding="utf8")), (folder / FILE).read_bytes()
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise ValueError(f"{FILE} is not the file that supernet.json was written with")
        layers = {
            name: StoredLayer(row["rows"], row["columns"], tuple(row["weight_bits"]), tuple(row["activation_bits"]), row.get("operands", 1))
            for name, row in about["layers"].items()
        }
        parts = split_tensors(layers, load(data))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InvalidFile(f"{folder} holds no supernet that can be read: {error}. Restore it or train again.") from error
    scheme = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
    check_choices(scheme, {name: layer.choices for name, layer in layers.items()})
    sliced = {}
    for name, precision in scheme.items():
        if precision.weight_bits:
            part, scale = parts[name], parts[name].weight_scales[precision.weight_bits]
            sliced[name] = (lower(part.codes, part.code_scale, scale, precision.weight_bits), scale)
    return sliced


def check_choices(scheme: Mapping[str, Precision], choices: Mapping[str, Sequence[Precision]]) -> None:
    """Raise SchemeMismatch where the scheme names an unknown layer, or a precision that was not trained."""
    Scheme({name: options[0] for name, options in choices.items()}).check_names(scheme)
    for name, precision in scheme.items():
        if precision not in choices[name]:
            there = ", ".join(str(option) for option in choices[name])
            raise SchemeMismatch(f"{name} was not trained at {precision}. Choose from {there}, or train again with those --bits.")


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
