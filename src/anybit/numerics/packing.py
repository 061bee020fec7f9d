"""Integer codes <-> bytes, and the exact layout of the packed file. numpy only, so that a file can be read without PyTorch.

A layer's codes are one dense little-endian bit stream of two's-complement fields: code i holds bits [i b, (i + 1) b).
Each layer starts at a byte boundary. The file `model.safetensors` has shared tensors, because each tensor's name costs bytes:

    codes                    U8  [bytes]       the streams of all layers with 2..8 weight bits, in the scheme's order
    weight_scales            F32 [channels]    their scales, one per row of the weight matrix
    activation_scales        F32 [inputs]      scales of the quantized inputs, in the scheme's order
    activation_zero_points   U8  [inputs]
    edges                    F32 [edges, 2]    observed ranges of the tensors between layers (their names are in scheme.json)
    floats                   F32 [numbers]     all other float32 entries of the state dict, in its order
    anything else            under its own state-dict key and type

Its metadata hold the SHA-256 of scheme.json's description of the tensors, and scheme.json holds that of this file: no change goes
unnoticed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anybit.errors import InvalidFile, UnsupportedModel

# In the order in which safetensors stores them.
ITEM_BYTES = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


RESERVED = ("__metadata__", "code_scales", "statistics")
"""Names that entries of a state dict cannot have in a file, besides those of the packed file: safetensors' own, and a supernet's."""

PACKED_METADATA = {"scheme": "0" * 64}  # with the digest in place of the zeros


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack the n two's-complement integers `codes` at `bits` each, as uint8 [ceil(n bits / 8)]."""
    fields = (codes.reshape(-1).astype(np.int16) & (2**bits - 1)).astype(np.uint8)
    return np.packbits(np.unpackbits(fields[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the integers that `pack` wrote, int8 [count]. The stream must have exactly their length."""
    if stream.size != packed_bytes(count, bits):
        raise InvalidFile(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, but {stream.size} are there.")
    # Eight codes fill `bits` bytes: each such group in a word of 64 bits, its codes by shifts.
    words = np.zeros((-(-count // 8), 8), np.uint8)
    words[:, :bits] = np.pad(stream, (0, len(words) * bits - stream.size)).reshape(-1, bits)
    fields = words.view("<u8") >> np.arange(0, 8 * bits, bits, dtype=np.uint64) & np.uint64(2**bits - 1)
    sign = 2 ** (bits - 1)
    return ((fields.reshape(-1)[:count].astype(np.int16) ^ sign) - sign).astype(np.int8)


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


@dataclass(frozen=True)
class TensorSpec:
    """Type (in safetensors' notation) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


def file_bytes(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> int:
    """Return the exact size of the safetensors file that holds `tensors` and `metadata`: 8 bytes of length, the header, the data."""
    rank = {dtype: index for index, dtype in enumerate(ITEM_BYTES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        end = offset + tensors[name].nbytes
        header[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


@dataclass(frozen=True)
class PackedLayer:
    """One layer in the layout: its weight as rows [channels, fan-in], its bits, and the number of its quantized inputs."""

    rows: int
    columns: int
    weight_bits: int | None
    quantized_inputs: int


def layout(layers: Sequence[PackedLayer], edges: int, floats: int, others: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors of a packed file, in order; empty shared tensors are left out."""
    coded = [(layer, layer.weight_bits) for layer in layers if layer.weight_bits]
    inputs = sum(layer.quantized_inputs for layer in layers)
    shared = {
        "codes": TensorSpec("U8", (sum(packed_bytes(layer.rows * layer.columns, bits) for layer, bits in coded),)),
        "weight_scales": TensorSpec("F32", (sum(layer.rows for layer, _ in coded),)),
        "activation_scales": TensorSpec("F32", (inputs,)),
        "activation_zero_points": TensorSpec("U8", (inputs,)),
        "edges": TensorSpec("F32", (edges, 2)),
        "floats": TensorSpec("F32", (floats,)),
    }
    taken = sorted({*shared, *RESERVED} & set(others))
    if taken:
        raise UnsupportedModel(f"The model's buffer {taken[0]!r} has the name of a tensor of the packed file. Rename the buffer.")
    return {name: spec for name, spec in shared.items() if spec.nbytes} | dict(others)
