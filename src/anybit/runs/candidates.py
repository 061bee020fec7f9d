"""candidates.json and candidates.safetensors: the data from which further budgets are met."""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file

from anybit.errors import InvalidFile
from anybit.files.strict import read_header, read_sealed, read_tensors, sealed, sha256_of, validated, write_json
from anybit.networks.candidates import KEY, Candidates, from_tensors, to_tensors
from anybit.numerics.packing import TensorSpec, packed_bytes
from anybit.runs.folder import FORMAT_VERSION
from anybit.runs.names import MODEL
from anybit.scheme import Precision, check_names


def write_candidates(folder: Path, candidates: Candidates, provenance: Mapping[str, Any]) -> None:
    """Write candidates.safetensors (packed codes, scales and biases per candidate) and candidates.json with `provenance`."""
    save_file(to_tensors(candidates), folder / "candidates.safetensors")
    digests = {"sha256": sha256_of(folder / "candidates.safetensors"), "run": sha256_of(folder / MODEL)}
    write_json(folder / "candidates.json", sealed({"version": FORMAT_VERSION, **digests, **provenance}))


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
    network: str | None = None
    data: str | None = None
    digest: str


def read_candidates(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> tuple[Candidates, dict]:
    """Read (candidates, record) that `write_candidates` wrote, for layers of these row x column shapes."""
    again = "Run calibrate again."
    if not (folder / "candidates.json").is_file():
        raise InvalidFile(f"{folder} has no candidates.json: only runs of calibrate have candidates to allocate. Name such a run.")
    record = read_sealed(folder / "candidates.json", FORMAT_VERSION, again)
    file, path = validated(CandidatesFile, record, str(folder / "candidates.json")), folder / "candidates.safetensors"
    if not path.is_file() or sha256_of(path) != file.sha256:
        raise InvalidFile(f"{path} is missing or not the file that candidates.json was written with. {again}")
    if sha256_of(folder / MODEL) != file.run:
        raise InvalidFile(f"{folder / 'candidates.json'} belongs to a different run than {folder / MODEL}. {again}")
    stored, _ = read_header(path)
    tensors = read_tensors(path, _candidate_specs(path, stored, file.choices, shapes))
    try:
        return from_tensors(tensors, shapes), record
    except InvalidFile as error:
        raise InvalidFile(f"{path} cannot be read: {error}. {again}") from error


def _candidate_specs(
    path: Path, stored: Mapping[str, TensorSpec], choices: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, TensorSpec]:
    """Return the tensors that candidates.safetensors must hold: all that the layers may choose; and further bit-widths and biases if
    present."""
    check_names(choices, shapes, "scheme.json")
    parsed = {name: [Precision.parse(text) for text in texts] for name, texts in choices.items()}
    needed = {f"{name}|W{p.weight_bits}|codes" for name, options in parsed.items() for p in options if p.weight_bits}
    needed |= {f"{name}|A{p.activation_bits}" for name, options in parsed.items() for p in options if p.activation_bits}
    specs = {}
    for key in sorted({*needed, *stored}):
        match = KEY.fullmatch(key)
        if match is not None and match["edge"]:
            specs[key] = TensorSpec("F32", (2,))
            continue
        if match is None or match["name"] not in choices:
            raise InvalidFile(f"{path}: {reprlib.repr(key)} is not a candidate of a layer in candidates.json. Run calibrate again.")
        rows, columns = shapes[match["name"]]
        if match["activation_bits"]:
            specs[key] = TensorSpec("F32", (2,) if rows * columns else (2, 2))
            continue
        name, bits = match["name"], int(match["weight_bits"])
        specs |= {f"{name}|W{bits}|codes": TensorSpec("U8", (packed_bytes(rows * columns, bits),))}
        specs |= {f"{name}|W{bits}|scale": TensorSpec("F32", (rows,))}
        if match["part"] == "bias":
            specs[key] = TensorSpec("F32", stored[key].shape[:1])
    return specs
