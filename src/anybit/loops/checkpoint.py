"""Training checkpoints: saved after every epoch, checked and resumed."""

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor

from anybit.errors import InvalidFile, InvalidSetting
from anybit.files.strict import DIGEST, check_version, json_text, parse_json, read_header, read_tensors, validated
from anybit.files.whole import whole_file
from anybit.loops.trainee import Trainee
from anybit.networks.states import check_state, spec_of
from anybit.numerics.packing import TensorSpec

# A checkpoint is one safetensors file with its JSON in the header, replaced atomically


class EpochRecord(BaseModel):
    """The fields of every epoch's record; the method and the watcher add their own."""

    model_config = ConfigDict(extra="allow", strict=True)
    epoch: int
    loss: float
    train_top1: float | None


class CheckpointRecord(BaseModel):
    """The JSON of a checkpoint. Strict: a wrong type, a missing or an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[1] = 1
    records: list[EpochRecord] = Field(min_length=1)
    identity: dict[str, Any]
    decisions: dict[str, Any]


CONTENTS = "all of the data"
"""Entry of an identity that checkpoints of anybit 0.1 lack, as they lack those of modules."""
FIRST_BATCH = "data"
"""Entry of an identity: the first batch, as drawn by seed and batch size."""
AGAIN = "Remove it to start again, or restore it."


def save_checkpoint(
    path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, records: list[dict], identity: Mapping[str, Any]
) -> None:
    tensors = {f"model.{key}": tensor.contiguous().clone() for key, tensor in trainee.model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value).contiguous().clone() for key, value in state.items()}
    tensors |= {f"method.{key}": tensor.contiguous().clone() for key, tensor in trainee.state().items()}
    stored = json_text({"version": 1, "records": records, "identity": dict(identity), "decisions": trainee.decisions()})
    restart = "Make room, or choose another --checkpoint."
    on = f"Make room: the same command continues from the checkpoint of epoch {len(records) - 1}."
    with whole_file(path, on if path.is_file() else restart) as draft:
        save_file(tensors, draft, metadata={"anybit": stored, DIGEST: _digest(stored, tensors)})


def _digest(stored: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the checkpoint's contents."""
    whole = hashlib.sha256(stored.encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def resume_checkpoint(path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load a checkpoint into the trainee and its optimizer; returns its records. Raises InvalidSetting if a setting differs."""
    specs, metadata = read_header(path)
    content = parse_json(metadata.get("anybit", ""), f"{path}: its record")
    check_version(content, path, 1)
    stored = validated(CheckpointRecord, content, f"{path}: its record")
    if CONTENTS not in stored.identity:
        identity = {key: value for key, value in identity.items() if key != CONTENTS and not key.startswith("module ")}
    different = [key for key in {**stored.identity, **identity} if stored.identity.get(key) != json.loads(json.dumps(identity.get(key)))]
    if CONTENTS not in different and CONTENTS in identity and len(different) > 1:
        different = [key for key in different if key != FIRST_BATCH]  # of the same data, as drawn by the other settings
    if different:
        changes = "; ".join(
            f"{key} was {reprlib.repr(stored.identity.get(key))} and is now {reprlib.repr(identity.get(key))}" for key in sorted(different)
        )
        raise InvalidSetting(f"{path} holds an unfinished training with other settings: {changes}. Use the same, or another --checkpoint.")
    records = content["records"]
    _check_records(records, trainee, path)
    tensors = read_tensors(path, _expected(specs, trainee, optimizer))
    if metadata.get(DIGEST) != _digest(metadata["anybit"], tensors):
        raise InvalidFile(f"{path} is not as it was written: its {DIGEST} differs from its content's. {AGAIN}")
    try:
        trainee.restore(stored.decisions)
    except InvalidFile as error:
        raise InvalidFile(f"{path}: {error}") from error
    trainee.model.load_state_dict({key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")})
    check_state(trainee.model, path)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    for key, tensor in trainee.state().items():
        tensor.copy_(tensors[f"method.{key}"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return records


def _check_records(records: Sequence[Mapping[str, Any]], trainee: Trainee, path: Path) -> None:
    """Raise InvalidFile unless there is one record per epoch, all alike, with the method's fields."""
    model = {"epoch": 0, "loss": 0.0, "train_top1": records[0].get("train_top1"), **trainee.summary()}
    for number, record in enumerate(records, 1):
        if record["epoch"] != number:
            raise InvalidFile(f"{path}: record {number} is of epoch {record['epoch']}. {AGAIN}")
        if not _alike(record, records[0]) or not _alike({key: record.get(key) for key in model}, model):
            raise InvalidFile(f"{path}: the record of epoch {number} lacks fields that training records. {AGAIN}")


def _alike(one: Any, other: Any) -> bool:
    """Return whether two JSON values have the same keys and kinds of values; a number and null count as alike."""
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        both = isinstance(one, Mapping) and isinstance(other, Mapping) and {*map(str, one)} == {*map(str, other)}
        return both and all(_alike(value, {str(k): v for k, v in other.items()}[str(key)]) for key, value in one.items())
    kinds = [float if value is None or type(value) is int else type(value) for value in (one, other)]
    return kinds[0] is kinds[1]


def _expected(specs: Mapping[str, TensorSpec], trainee: Trainee, optimizer: torch.optim.Optimizer) -> dict[str, TensorSpec]:
    """Return the tensors of a checkpoint: network and method, and Adam's three for each parameter that has any in `specs`."""
    expected = {f"model.{key}": spec_of(tensor) for key, tensor in trainee.model.state_dict().items()}
    expected |= {f"method.{key}": spec_of(tensor) for key, tensor in trainee.state().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        if any(f"optimizer.{index}.{name}" in specs for name in ("step", "exp_avg", "exp_avg_sq")):
            expected[f"optimizer.{index}.step"] = TensorSpec("F32", ())
            expected |= {f"optimizer.{index}.{name}": spec_of(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return expected
