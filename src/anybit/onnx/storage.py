"""Weight codes of 2..8 bits (or none) in an ONNX file: packed bytes, and standard operators that unpack them to int8 on loading.

    8 bits      an int8 initializer
    4 bits      an int4 initializer and a Cast
    others      planes of 4, 2 and 1 bits, the lowest first, each packed densely; a plane is unpacked by looking up its bytes in a table of
                the values of their fields, and the planes are added
    0 bits      one zero, expanded

All operators have constant inputs, so that a runtime folds them once; their sum stays within int8. Bitwise operators would be the
obvious way, but runtimes disagree on them: one folds them, another runs them at every inference and gets them wrong.
"""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

PLANES = {2: (2,), 3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits -> widths of the planes, the lowest first."""

Emit = Callable[..., ir.Value]
"""emit(op_type, inputs, attributes, name) -> the new node's output."""
Constant = Callable[[str, np.ndarray], ir.Value]
"""constant(name, array) -> an initializer; the same name gives the same one."""


def stored(name: str, codes: np.ndarray, bits: int, emit: Emit, constant: Constant) -> ir.Value:
    """Store `codes` (int8, any shape, of `bits` bits) in as few bytes as possible, and return the int8 value that unpacks them."""
    if bits == 0:
        zero, shape = constant("zero_code", np.zeros(1, np.int8)), constant(f"{name}.shape", np.array(codes.shape, np.int64))
        return emit("Expand", [zero, shape], {}, "")
    if bits == 8:
        return constant(f"{name}.codes", codes)
    if bits == 4:
        return emit("Cast", [constant(f"{name}.packed", codes.astype(ml_dtypes.int4))], {"to": int(ir.DataType.INT8)}, "")
    planes, shift = [], 0
    flat = np.concatenate([codes.reshape(-1), np.zeros(-codes.size % 8, np.int8)])
    for width in PLANES[bits]:
        top = shift + width == bits
        fields = (flat.view(np.uint8) >> shift) & (2**width - 1)
        packed = constant(f"{name}.packed{shift}", pack_fields(fields, width))
        table = constant(f"table_{width}_{shift}_{'signed' if top else 'unsigned'}", field_table(width, shift, top))
        index = emit("Cast", [packed], {"to": int(ir.DataType.INT32)}, "")
        looked_up = emit("Gather", [table, index], {"axis": 0}, "")  # [bytes, fields a byte]
        planes.append(emit("Reshape", [looked_up, constant("flat", np.array([-1], np.int64))], {}, ""))
        shift += width
    total = planes[0]
    for plane in planes[1:]:
        total = emit("Add", [total, plane], {}, "")
    if flat.size > codes.size:
        ends = [constant("zero", np.array([0], np.int64)), constant(f"{name}.count", np.array([codes.size], np.int64))]
        total = emit("Slice", [total, *ends], {}, "")
    return emit("Reshape", [total, constant(f"{name}.shape", np.array(codes.shape, np.int64))], {}, "")


def pack_fields(fields: np.ndarray, width: int) -> np.ndarray:
    """Pack fields of 1, 2 or 4 bits (uint8, a multiple of 8 of them) into bytes, the first in the lowest bits."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return np.bitwise_or.reduce(fields.reshape(-1, 8 // width) << shifts, axis=1).astype(np.uint8)


def field_table(width: int, shift: int, signed: bool) -> np.ndarray:
    """Return the values of the fields of every byte, int8 [256, 8 / width]: field << shift, in two's complement if `signed`."""
    fields = (np.arange(256)[:, None] >> np.arange(0, 8, width)) & (2**width - 1)
    if signed:
        fields = np.where(fields >= 2 ** (width - 1), fields - 2**width, fields)
    return (fields << shift).astype(np.int8)


def stored_bytes(counts: Sequence[tuple[int, int]]) -> int:
    """Return the fewest bytes for packed codes of these (weights, bits)."""
    return sum(-(-count * bits // 8) for count, bits in counts)
