"""fingerprint.safetensors: a network's outputs on random inputs, with which a network is compared when the run is loaded."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from anybit.errors import InvalidFile, SchemeMismatch
from anybit.files.strict import in_words, json_text, load_tensors, parse_json, read_header, sha256_of
from anybit.networks.fingerprint import NUMBERS, OUTPUTS, TOLERANCE, VALUES, Fingerprint, distance, outputs_on
from anybit.runs.names import FINGERPRINT

AGAIN = "Restore it, or remove it: then the network is not compared."


def write_fingerprint(folder: Path, fingerprint: Fingerprint | None) -> str | None:
    """Write the file and return its SHA-256; None without a fingerprint."""
    if fingerprint is None:
        return None
    parts = {"input": fingerprint.inputs, "output": fingerprint.outputs, "float": fingerprint.floats}
    tensors = {f"{part}.{index}": tensor.contiguous() for part, group in parts.items() for index, tensor in enumerate(group)}
    save_file(tensors, folder / FINGERPRINT, {"structure": json_text(fingerprint.structure)})
    return sha256_of(folder / FINGERPRINT)


def read_fingerprint(folder: Path, sha256: str | None) -> Fingerprint | None:
    """Read the file strictly; None if the run has none, or the file was removed."""
    path = folder / FINGERPRINT
    if sha256 is None or not path.is_file():
        return None
    if sha256_of(path) != sha256:
        raise InvalidFile(f"{path} is not the file that the run was written with (its SHA-256 differs). {AGAIN}")
    specs, metadata = read_header(path)
    parts: dict[str, list[Tensor]] = {"input": [], "output": [], "float": []}
    for part, tensors in parts.items():
        names = [f"{part}.{index}" for index in range(len(specs)) if f"{part}.{index}" in specs]
        tensors += load_tensors(path, names).values()
    values = [*parts["output"], *parts["float"]]
    numbers = sum(tensor.numel() for tensor in parts["input"])
    if sum(map(len, parts.values())) != len(specs) or not parts["output"] or numbers > NUMBERS or len(values) > 2 * OUTPUTS:
        raise InvalidFile(f"{path} does not hold inputs and outputs of a network. {AGAIN}")
    if not all(tensor.is_floating_point() and tensor.dim() == 1 and len(tensor) <= VALUES for tensor in values):
        raise InvalidFile(f"{path}: outputs are not lists of at most {VALUES} numbers. {AGAIN}")
    return Fingerprint(parse_json(metadata.get("structure", ""), f"{path}: its structure"), *parts.values())


def check_fingerprint(folder: Path, sha256: str | None, model: nn.Module) -> None:
    """Raise SchemeMismatch if a loaded canonical model has other outputs than the saved one."""
    fingerprint = read_fingerprint(folder, sha256)
    if fingerprint is not None:
        _compare(folder, fingerprint, fingerprint.outputs, model)


def check_float(folder: Path, sha256: str | None, model: nn.Module) -> None:
    """Raise SchemeMismatch if a float network has other outputs than the one from which the run was made."""
    fingerprint = read_fingerprint(folder, sha256)
    if fingerprint is not None and fingerprint.floats:
        _compare(folder, fingerprint, fingerprint.floats, model)


def _compare(folder: Path, fingerprint: Fingerprint, expected: list[Tensor], model: nn.Module) -> None:
    remedy = (
        "Everything outside of the run's files must be unchanged: buffers that are not persistent, attributes, the code itself. Check "
        f"--model, and build it as before. ({folder / FINGERPRINT} holds the outputs to compare.)"
    )
    try:
        apart = distance(outputs_on(model, fingerprint), expected)
    except InvalidFile as error:
        raise InvalidFile(f"{folder / FINGERPRINT}: {error}. {AGAIN}") from error
    except Exception as error:  # the network's own code may raise any error
        raise SchemeMismatch(
            f"The model does not accept the inputs of the network that {folder} was made from: {in_words(error)}. {remedy}"
        ) from error
    if apart > TOLERANCE:
        raise SchemeMismatch(
            f"The model is not the one that {folder} was made from: outputs on the same inputs differ by {_share(apart)}. {remedy}"
        )


def _share(apart: Any) -> str:
    return f"{100 * apart:.2g} %" if apart < 1e6 else "more than they are"
