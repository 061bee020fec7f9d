"""Packing of codes round-trips, and the counted size of a file equals its size."""

import itertools
import os
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anybit.errors import InvalidFile
from anybit.numerics.packing import ITEM_BYTES, PACKED_METADATA, PackedLayer, TensorSpec, file_bytes, layout, pack, packed_bytes, unpack

few = settings(max_examples=80, deadline=None)

TORCH_TYPES = {
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "F32": torch.float32, "I32": torch.int32, "U32": torch.uint32,
    "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16, "U16": torch.uint16, "U8": torch.uint8, "I8": torch.int8,
    "BOOL": torch.bool,
}  # fmt: skip


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(2, 8))
    codes = draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), max_size=70))
    return np.array(codes, dtype=np.int8), bits


@few
@given(codes_and_bits())
def test_unpack_inverts_pack(problem):
    codes, bits = problem
    assert np.array_equal(unpack(pack(codes, bits), bits, len(codes)), codes)


@few
@given(codes_and_bits())
def test_stream_is_twos_complement_fields_lowest_bit_first(problem):
    codes, bits = problem
    number = sum((int(code) % 2**bits) << (index * bits) for index, code in enumerate(codes))
    assert pack(codes, bits).tobytes() == number.to_bytes(packed_bytes(len(codes), bits), "little")


@few
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_packed_bytes_is_the_bits_rounded_up(count, bits):
    assert 8 * packed_bytes(count, bits) - count * bits in range(8)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64, np.float32])
def test_packing_is_independent_of_dtype_and_works_row_by_row(dtype):
    codes = np.array([[-4, 3, 0], [1, -1, 2]])
    assert np.array_equal(pack(codes.astype(dtype), 3), pack(codes.reshape(-1), 3))


@few
@given(codes_and_bits(), st.sampled_from([-1, 1]))
def test_rejects_stream_of_another_length_naming_both(problem, change):
    codes, bits = problem
    stream = np.resize(pack(codes, bits), max(0, packed_bytes(len(codes), bits) + change))
    if stream.size == packed_bytes(len(codes), bits):
        return  # no stream is shorter than an empty one
    with pytest.raises(InvalidFile, match=f"take {packed_bytes(len(codes), bits)} bytes, but {stream.size} are there"):
        unpack(stream, bits, len(codes))


names = st.text(st.sampled_from('abz0_./|-"\\é字 \n'), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


def written_bytes(specs, metadata=None):
    """Size of the file that safetensors writes for tensors of these types and shapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.safetensors")
        save_file({name: torch.zeros(spec.shape, dtype=TORCH_TYPES[spec.dtype]) for name, spec in specs.items()}, path, metadata)
        return os.path.getsize(path)


@few
@given(st.dictionaries(names, st.builds(TensorSpec, st.sampled_from(sorted(ITEM_BYTES)), shapes), max_size=8))
def test_file_bytes_equals_the_size_written_by_safetensors(specs):
    assert file_bytes(specs) == written_bytes(specs)
    assert file_bytes(specs, PACKED_METADATA) == written_bytes(specs, {"scheme": "f" * 64})


def test_file_bytes_knows_the_order_of_types_of_equal_size():
    # The order decides how many digits the offsets have; names of eight lengths make every digit show in the padded header.
    for first, second in itertools.permutations(ITEM_BYTES, 2):
        if ITEM_BYTES[first] != ITEM_BYTES[second]:
            continue  # the larger type comes first
        for padding in range(8):
            specs = {"a": TensorSpec(first, (5,)), "b" + "_" * padding: TensorSpec(second, (95,))}
            assert file_bytes(specs) == written_bytes(specs), (first, second)


layers = st.lists(
    st.builds(PackedLayer, st.integers(1, 20), st.integers(1, 20), st.sampled_from([None, 0, *range(2, 9)]), st.integers(0, 2)), max_size=5
)


@few
@given(layers, st.integers(0, 4), st.integers(0, 30))
def test_layout_stores_each_number_once_and_no_empty_tensor(stored, edges, floats):
    others = {"counter": TensorSpec("I64", ())}
    specs = layout(stored, edges, floats, others)
    coded = [layer for layer in stored if layer.weight_bits]
    stream = sum(packed_bytes(layer.rows * layer.columns, layer.weight_bits) for layer in coded)
    rows, inputs = sum(layer.rows for layer in coded), sum(layer.quantized_inputs for layer in stored)
    assert all(spec.nbytes for spec in specs.values())
    assert sum(spec.nbytes for spec in specs.values()) == stream + 4 * rows + 5 * inputs + 8 * edges + 4 * floats + 8
