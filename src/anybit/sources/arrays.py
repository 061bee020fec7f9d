"""Arrays from a `.npz` or `.npy` file, or from memory, checked and turned into samples."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from anybit.data.batches import check_plain
from anybit.data.samples import ArrayDataset, NamedArrays, Samples
from anybit.errors import InvalidFile, InvalidInput
from anybit.files.strict import in_words
from anybit.sources.preprocessing import Preprocessing

LABELS = ("y", "labels", "label")
KINDS = {"U": "text", "S": "bytes", "M": "dates", "m": "durations", "V": "records of several fields", "O": "Python objects"}
"""Array types that are not numbers, by numpy's letter."""


def read_samples(path: Path, subset: str, preprocessing: Preprocessing, workers: int, model: nn.Module | None) -> Samples:
    """Read (x, y) of a .npy or .npz file; x is one array, or several under the names of the network's inputs."""
    if not path.is_file():
        raise InvalidInput(f"There is no file {path}.")
    taken = names_of_inputs(model)
    try:
        with open(path, "rb") as file:
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                names, arrays = ["x"], {"x": stored}
            else:
                names = list(stored)
                arrays = {name: stored[key] for name, key in _keys(names, subset, taken).items()}
    except Exception as error:
        if "allow_pickle" in str(error) and path.read_bytes()[:2] not in (b"PK", b"\x93N"):
            raise InvalidFile(
                f"{path} is not a file of arrays: numpy.save or numpy.savez did not write it. Write it with one of them."
            ) from error
        if "allow_pickle" in str(error):  # numpy's advice would run code
            raise InvalidFile(f"{path} cannot be read as arrays: it holds Python objects, not numbers. Save arrays of numbers.") from error
        raise InvalidFile(f"{path} cannot be read as arrays: {in_words(error)}") from error
    labels = [name for name in LABELS if name in arrays]
    if len({arrays[name].shape[:1] for name in labels}) < len(labels):  # a list of names of the classes is shorter
        raise InvalidInput(f"{path} has several arrays of labels: {', '.join(labels)}. Keep one of them, and save the others elsewhere.")
    y = arrays.pop(labels[0]) if labels else None
    if not arrays:
        also = f", nor one of the network's inputs ({', '.join(taken)})" if taken else ""
        part = f"_{subset}" if subset else ""
        there = next((name.removeprefix("x_") for name in names if name.startswith("x_") and name != f"x{part}"), None)
        named = f"Name the inputs x and the labels y; for {path.name}#test, x_test and y_test."
        remedy = named if there is None else f"Write {path.name}#{there} for x_{there}."
        raise InvalidInput(f"{path} has no array x{part}{also}; it holds {', '.join(names)}. {remedy}")
    samples = samples_of_arrays(arrays, y, workers, preprocessing, f"{path}: ")
    lacks = f"{path} holds {', '.join(names)}, and no y{f'_{subset}' if subset else ''}. "
    return samples if samples.labelled else replace(samples, unlabelled=lacks)


def samples_of_arrays(
    arrays: Mapping[str, np.ndarray], y: np.ndarray | None, workers: int, preprocessing: Preprocessing = Preprocessing(), where: str = ""
) -> Samples:
    """Return samples of one array `x`, or of several under the names of the network's inputs, with labels or None.

    Raises InvalidInput, beginning with `where`, for arrays that are not numbers, have no samples' dimension, or differ in length.
    """
    arrays = {name: _numbers(array, name, where) for name, array in arrays.items()}
    y = None if y is None else _labels(_numbers(y, "y", where), where)
    lengths = {len(array) for array in (*arrays.values(), *(() if y is None else (y,)))}
    if len(lengths) > 1:
        counts = [*(f"{len(array)} {name}" for name, array in arrays.items()), *([] if y is None else [f"{len(y)} labels"])]
        raise InvalidInput(f"{where}{', '.join(counts[:-1])} and {counts[-1]}. Give as many of each.")
    mean, std = preprocessing.mean, preprocessing.std
    alone = set(arrays) == {"x"}
    if not alone:
        return Samples(NamedArrays(arrays, y, mean, std), y is not None, workers)
    pixels = arrays["x"].dtype == np.uint8 or mean is not None  # others may already be normalized
    black = preprocessing.black if pixels else None
    return Samples(ArrayDataset(arrays["x"], y, mean, std), y is not None, workers, black=black)


def array_of(tensor: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return a tensor as an array."""
    if isinstance(tensor, np.ndarray):
        return tensor
    check_plain(tensor)
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16; every value of it is a float32


def _numbers(array: np.ndarray, name: str, where: str) -> np.ndarray:
    """Return the array in this machine's byte order, in a type that PyTorch supports. Raises InvalidInput if it holds no numbers."""
    if array.dtype.kind in KINDS:
        labels = name in ("y", "labels") or name.startswith("rows")
        cure = "numpy.unique(y, return_inverse=True)[1] numbers them" if labels else "Turn them into numbers first"
        raise InvalidInput(f"{where}{name} {_verb(name, 'hold')} {KINDS[array.dtype.kind]} ({array.dtype}), not numbers. {cure}.")
    if not array.ndim:
        verb = "are" if _is_plural(name) else "is"
        raise InvalidInput(f"{where}{name} {verb} a single number, not an array with a first dimension of samples. Give [N, ...].")
    if array.dtype.kind in "fc" and array.dtype.itemsize > (8 if array.dtype.kind == "f" else 16):  # wider than a double
        array = array.astype(np.float64 if array.dtype.kind == "f" else np.complex128)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _is_plural(name: str) -> bool:
    return name.startswith(("inputs", "labels", "rows"))


def _verb(name: str, stem: str) -> str:
    return stem if _is_plural(name) else f"{stem}s"


def _labels(y: np.ndarray, where: str) -> np.ndarray:
    """Return labels [N, 1] as [N], others unchanged. Raises InvalidInput for NaN, infinity and numbers beyond 64 bits."""
    if y.dtype.kind in "fc" and not np.isfinite(y).all():
        raise InvalidInput(f"{where}y holds NaN or infinity ({int((~np.isfinite(y)).sum())} numbers). Leave such samples out.")
    if y.dtype.kind == "u" and y.dtype.itemsize == 8 and y.size and y.max() >= 2**63:
        raise InvalidInput(f"{where}y holds {y.max()}, which exceeds signed 64 bits. Number the classes from 0.")
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def _keys(stored: Sequence[str], subset: str, taken: Sequence[str]) -> dict[str, str]:
    """Return name -> key of the arrays of a subset to read: x, or the network's inputs by name, and labels."""
    for suffix in [f"_{subset}"] if subset else ["", "_train"]:
        keys = {key.removesuffix(suffix): key for key in stored if key.endswith(suffix)}
        inputs = [name for name in taken if name in keys] or [name for name in ("x",) if name in keys]
        if "x" in keys and (len(inputs) == 1 or "x" not in inputs):
            inputs = ["x"]
        if inputs:
            return {name: keys[name] for name in (*inputs, *LABELS) if name in keys}
    return {}


def names_of_inputs(model: nn.Module | None) -> list[str]:
    """Return the names of the forward's inputs, without labels."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {} if model is None else inspect.signature(model.forward).parameters
    return [name for name, one in parameters.items() if one.kind in kinds and name not in LABELS]
