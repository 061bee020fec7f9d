"""Files are data: JSON and tensors are read strictly, nothing in them is executed, and writing is atomic.

    JSON      no key twice in an object; no NaN, no infinity, no integer beyond 64 bits, no text outside UTF-8; at most 64 levels
    tensors   exactly the expected names, types and shapes, which are checked in the header before any tensor is read; finite
    digest    in a JSON file that nothing else guards: SHA-256 of the rest. A change without a new digest is an error

A digest detects damage and slips; it is not a signature. Reading takes memory in proportion to the file's size, whatever the file claims.
"""

import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from anybit.errors import AnybitError, InvalidFile
from anybit.numerics.packing import TensorSpec

LEVELS = 64
DIGEST = "digest"
Value = TypeVar("Value")


# JSON


def parse_json(content: bytes | str, where: str) -> Any:
    """Parse the JSON value in `content`; `where` names it in errors."""
    try:
        text = content if isinstance(content, str) else content.decode("utf8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        _check_value(value)
    except RecursionError as error:
        raise InvalidFile(f"{where} is not valid JSON: it is nested deeper than {LEVELS} levels. Restore it or recreate it.") from error
    except ValueError as error:
        raise InvalidFile(f"{where} is not valid JSON: {in_words(error)}. Restore it or recreate it.") from error
    return value


def read_json(path: Path) -> Any:
    """Read a file of JSON."""
    if not path.is_file():
        raise InvalidFile(f"{path} is not there. Is {path.parent} a run folder of anybit?")
    return parse_json(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Return the file's bytes."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read: {error.strerror}. Restore it or recreate it.") from error


def json_text(data: Any, indent: int | None = None) -> str:
    """Return JSON, which every writer uses. Raises AnybitError naming a number that JSON cannot represent: NaN or infinity."""
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError as error:
        place = _not_finite(data)
        if place is None:
            raise
        raise AnybitError(f"{place} is NaN or infinite, which JSON cannot represent. Check the network and the data.") from error


def _not_finite(data: Any, place: str = "The value") -> str | None:
    """Return where a number is not finite; None if all are."""
    if isinstance(data, float) and not math.isfinite(data):
        return place
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, (list, tuple)) else ()
    inner = (_not_finite(value, str(key) if place == "The value" else f"{place}.{key}") for key, value in items)
    return next(filter(None, inner), None)


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON with a final newline. Raises AnybitError for numbers that JSON cannot represent."""
    path.write_text(json_text(data, indent=1) + "\n", encoding="utf8")


def _refuse_constant(text: str):
    raise ValueError(f"{text} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{reprlib.repr(twice)} occurs twice in one object")
    return values


def _check_value(value: Any) -> None:
    """Raise ValueError for values that Python's parser accepts but other JSON readers do not."""
    ahead = [(value, 1)]
    while ahead:
        one, level = ahead.pop()
        if isinstance(one, (dict, list)):
            if level > LEVELS:
                raise ValueError(f"it is nested deeper than {LEVELS} levels")
            inner = [*one, *one.values()] if isinstance(one, dict) else one
            ahead += [(item, level + 1) for item in inner]
        elif isinstance(one, str):
            one.encode("utf8")  # half of a surrogate pair cannot be written again
        elif isinstance(one, float) and not math.isfinite(one):
            raise ValueError("a number exceeds 64 bits")
        elif isinstance(one, int) and not -(2**63) <= one < 2**63:
            raise ValueError(f"an integer has {one.bit_length()} bits, more than 64")


# Contents of a JSON file


def check_version(data: Any, path: Path | str, newest: int) -> None:
    """Raise InvalidFile unless `data`, read from `path`, is an object with a supported format version."""
    if not isinstance(data, dict):
        raise InvalidFile(f"{path} holds a {type(data).__name__}, not a JSON object. Restore it or recreate it.")
    version = data.get("version")
    if type(version) is int and version > newest:
        raise InvalidFile(f"{path} has format version {version}; this anybit reads up to {newest}. Upgrade anybit.")
    if type(version) is not int or version < 1:
        raise InvalidFile(f"{path}: version is {reprlib.repr(version)}, not a number from 1 to {newest}. Restore it or recreate it.")


def validated(kind: type[Value], data: Any, where: str) -> Value:
    """Return `data` as the pydantic model or type `kind`. Raises InvalidFile naming the field that differs."""
    try:
        return TypeAdapter(kind).validate_python(data, strict=True)
    except ValidationError as error:
        raise InvalidFile(f"{where}: {_first_difference(error)}. Restore it or recreate it.") from error
    except RecursionError as error:
        raise InvalidFile(f"{where} is nested too deeply. Restore it or recreate it.") from error


def _first_difference(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(key) for key in first["loc"])
    value = first["input"]
    shown = f"a {type(value).__name__}" if isinstance(value, (dict, list, tuple)) and value else reprlib.repr(value)
    suffix = "" if first["type"] in ("missing", "value_error") else f" (it is {shown})"
    return f"{place[:300] + ': ' if place else ''}{' '.join(first['msg'].removeprefix('Value error, ').split())}{suffix}"


# Digests


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidFile(f"{path} cannot be read: {error.strerror}. Restore it or recreate it.") from error


def digest_of(data: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of its layout in a file."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def sealed(data: Mapping[str, Any], unguarded: Iterable[str] = ()) -> dict[str, Any]:
    """Return `data` with a digest of all its keys except the `unguarded` ones."""
    return {**data, DIGEST: _seal_of(data, unguarded)}


def read_sealed(path: Path, newest: int, remedy: str, unguarded: Iterable[str] = ()) -> dict[str, Any]:
    """Read an object of a supported version. Raises InvalidFile if its digest does not match."""
    data = read_json(path)
    check_version(data, path, newest)
    check_sealed(data, str(path), remedy, unguarded)
    return data


def check_sealed(data: Mapping[str, Any], where: str, remedy: str, unguarded: Iterable[str] = ()) -> None:
    """Raise InvalidFile if the object's digest does not match its content."""
    if DIGEST not in data:
        raise InvalidFile(f"{where} has no {DIGEST}: it is from an earlier anybit, or was edited. {remedy}")
    if data[DIGEST] != _seal_of(data, unguarded):
        raise InvalidFile(f"{where} was changed after it was written: its {DIGEST} does not match its content. Restore it. {remedy}")


def _seal_of(data: Mapping[str, Any], unguarded: Iterable[str]) -> str:
    out = {DIGEST, *unguarded}
    return digest_of({key: value for key, value in data.items() if key not in out})


# Tensors

FLOATS = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
"""Types of floats in a run's files; PyTorch cannot check whether others are finite."""


def read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Return (name -> type and shape, the metadata) of a safetensors file."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            specs = {name: TensorSpec(view.get_dtype(), tuple(view.get_shape())) for name, view in slices.items()}
            return specs, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InvalidFile(f"{path} cannot be read: {in_words(error)}. Restore it or recreate it.") from error


def read_tensors(path: Path, expected: Mapping[str, TensorSpec], framework: Literal["pt", "np"] = "pt") -> dict[str, Any]:
    """Read a safetensors file that must hold exactly the `expected` names, types and shapes, and finite numbers."""
    check_tensors(path, read_header(path)[0], expected)
    return load_tensors(path, expected, framework)


def load_tensors(path: Path, names: Iterable[str], framework: Literal["pt", "np"] = "pt") -> dict[str, Any]:
    """Read some tensors of a safetensors file whose header has been checked. Raises InvalidFile if a number is not finite."""
    try:
        with safe_open(path, framework=framework) as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise InvalidFile(f"{path} cannot be read: {in_words(error)}. Restore it or recreate it.") from error
    for name, tensor in tensors.items():
        if framework == "pt" and tensor.is_floating_point() and str(tensor.dtype) not in FLOATS:
            raise InvalidFile(f"{path}: tensor {name} holds {tensor.dtype}, which no run has. Restore it or recreate it.")
        if not _finite(tensor):
            raise InvalidFile(f"{path}: tensor {name} holds NaN or infinity. Restore it or recreate it.")
    return tensors


def check_tensors(path: Path, specs: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Raise InvalidFile unless the names, types and shapes of a file's tensors are as expected."""
    if set(specs) != set(expected):
        lacking, surplus = sorted(set(expected) - set(specs)), sorted(set(specs) - set(expected))
        difference = (
            f"tensors lacking: {reprlib.repr(lacking) if lacking else 'none'}; unexpected: {reprlib.repr(surplus) if surplus else 'none'}"
        )
        raise InvalidFile(f"{path}: {difference}. Restore it or recreate it.")
    for name, spec in expected.items():
        if specs[name] != TensorSpec(spec.dtype, tuple(spec.shape)):
            actual = f"{specs[name].dtype} {reprlib.repr(list(specs[name].shape))}"
            raise InvalidFile(f"{path}: tensor {name} is {actual}; {spec.dtype} {list(spec.shape)} is needed. Restore it or recreate it.")


def _finite(tensor: Any) -> bool:
    if isinstance(tensor, np.ndarray):
        return not np.issubdtype(tensor.dtype, np.inexact) or bool(np.isfinite(tensor).all())
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def in_words(error: BaseException) -> str:
    """Return an error's message on one line of bounded length, or its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
