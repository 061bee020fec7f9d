"""A run as a Hugging Face folder in the format compressed-tensors, "pack-quantized": transformers loads it as any other network.

    config.json        the network's own configuration, and quantization_config: a group for each precision, with the layers that have it
    model.safetensors  <layer>.weight_packed                     int32 [rows, ceil(columns bits / 32)]
                       <layer>.weight_shape                      int64 [2]
                       <layer>.weight_scale                      float32 [rows, 1], or [rows, groups] with a scale for each group
                       <layer>.input_scale, .input_zero_point    float32 [1], int8 [1], for a layer whose input is quantized
                       everything else under its own name, in float32
    tokenizer.json, ...  other files that came with the network

A row of a packed weight is one little-endian bit stream, padded to 32 bits. Weight codes are stored unsigned, as code + 2^(bits - 1).
Input codes are signed in this format, so the zero point is 2^(bits - 1) below anybit's. A pruned layer is one bit of zeros.

The format packs linears, and embeddings too, but transformers 5 cannot load the latter, so they are only packed on request. Other layers
are stored in float32 with the values of their codes; attention products, and the inputs of other layers, are float. `Packed` lists both.
"""

import io
import json
import tempfile
from collections.abc import Collection, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anybit.data.batches import check_finite
from anybit.data.tasks import Metric, check_metric_on, compare_exported, keeping_task, outputs_of
from anybit.environment import environment
from anybit.errors import InvalidFile, InvalidSetting, UnsupportedModel
from anybit.files.strict import json_text, load_tensors, read_header, read_json
from anybit.files.whole import check_place
from anybit.networks.canonical import Canonical
from anybit.networks.layer_types import COVERED, type_of
from anybit.networks.layers import Pruned, codes_of, emptied, float_weight, quantized_layers
from anybit.numerics.packing import TensorSpec
from anybit.numerics.quantizers import frozen
from anybit.progress import tell
from anybit.runs.folder import is_run, new_folder
from anybit.runs.names import MODEL
from anybit.runs.opened import first_of, inputs_for, opened
from anybit.runs.scheme_file import SchemeFile
from anybit.sources.inputs import compared
from anybit.sources.labels import task_of_labels
from anybit.sources.models import is_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
RUN = "anybit_run"
"""Key of config.json: the hash of the run's packed model."""

REMEDY = "Make room, or choose another --compressed-tensors."
WORD = 32
FLOAT_TOLERANCE = 1e-3
"""Largest difference of outputs from the simulation's when both compute the same in float, as a share of the largest output."""


# The format


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed codes [rows, columns] of `bits` bits, offset to be unsigned, as int32 [rows, ceil(columns bits / 32)]."""
    rows, columns = codes.shape
    fields = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    stream = np.unpackbits(fields[:, :, None], axis=2, count=bits, bitorder="little").reshape(rows, columns * bits)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % WORD)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32)


@dataclass(frozen=True)
class Packed:
    """tensors       contents of model.safetensors;   quantization  config.json's quantization_config
    packed        layers whose codes are stored;   dense  quantized layers whose weights are not packed, stored as float32 values
    float_inputs  layers whose quantized inputs the format cannot hold: attention products, and inputs of dense layers
    """

    tensors: dict[str, Tensor]
    quantization: dict[str, Any]
    packed: tuple[str, ...]
    dense: tuple[str, ...]
    float_inputs: tuple[str, ...]


def packed(canonical: Canonical, own: nn.Module, transposed: Collection[str] = (), embeddings: bool = False) -> Packed:
    """Pack the canonical model; `own` is a network of the class that loads it, possibly without weights.

    transposed  layers whose weight that class stores as [in, out];   embeddings  whether to pack these too
    """
    kinds = (nn.Linear, nn.Embedding) if embeddings else (nn.Linear,)
    layers = quantized_layers(canonical.model)
    modules = dict(own.named_modules())
    quantized = [name for name, layer in layers.items() if layer.weight_quantizer is not None]
    coded = [name for name in quantized if isinstance(modules.get(name), kinds)]
    if not coded:
        raise UnsupportedModel(
            f"{type(own).__name__} has no quantized Linear, which is what compressed-tensors packs. Export it with --onnx."
        )
    values = emptied(canonical.model).state_dict()
    tensors: dict[str, Tensor] = {}
    for key in own.state_dict():
        name = key.removesuffix(".weight")
        if name in coded and name != key:
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _of_layer(layers[name]).items()}
        elif key not in values:
            raise UnsupportedModel(f"{type(own).__name__} has {key}, which the run lost by folding. Export it with --onnx.")
        else:
            tensors[key] = values[key].T if name in transposed and name != key else values[key]
    others = [name for name, module in modules.items() if isinstance(module, COVERED) and type_of(module).grouped and name not in coded]
    return Packed(
        tensors={key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()},
        quantization=_quantization({name: layers[name] for name in coded}, others),
        packed=tuple(coded),
        dense=tuple(name for name in quantized if name not in coded),
        float_inputs=tuple(name for name, layer in layers.items() if layer.input_quantizer is not None and name not in coded),
    )


def _of_layer(layer: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer's weight and input quantizer."""
    rows, columns = float_weight(layer).shape
    pruned = isinstance(layer.weight_quantizer, Pruned)
    codes = torch.zeros(rows, columns, dtype=torch.int8) if pruned else codes_of(layer).reshape(rows, columns)
    scale = torch.ones(rows) if pruned else frozen(layer.weight_quantizer).scale
    tensors = {
        "weight_packed": torch.from_numpy(pack_words(codes.cpu().numpy(), _weight_bits(layer))),
        "weight_shape": torch.tensor([rows, columns]),
        "weight_scale": scale.reshape(rows, -1),
    }
    if layer.input_quantizer is not None:
        quantizer = frozen(layer.input_quantizer)
        tensors["input_scale"] = quantizer.scale.reshape(1)
        tensors["input_zero_point"] = (quantizer.zero_point.reshape(1) - 2 ** (quantizer.bits - 1)).to(torch.int8)
    return tensors


def _weight_bits(layer: nn.Module) -> int:
    return 1 if isinstance(layer.weight_quantizer, Pruned) else frozen(layer.weight_quantizer).bits


def _quantization(layers: Mapping[str, nn.Module], others: Collection[str]) -> dict[str, Any]:
    """Return config.json's quantization_config: layers of the same precision and group size share a group; `others` stay float."""
    groups: dict[tuple, list[str]] = {}
    for name, layer in layers.items():
        inputs = None if layer.input_quantizer is None else frozen(layer.input_quantizer).bits
        groups.setdefault((_weight_bits(layer), inputs, layer.weight_group), []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(others),
        "config_groups": {
            f"group_{number}": {
                "targets": names,
                "weights": _numbers(bits, symmetric=True, strategy="channel" if group is None else "group", group=group),
                "input_activations": None if inputs is None else _numbers(inputs, symmetric=False, strategy="tensor", group=None),
                "output_activations": None,
                "format": "pack-quantized",
            }
            for number, ((bits, inputs, group), names) in enumerate(groups.items())
        },
    }


def _numbers(bits: int, symmetric: bool, strategy: str, group: int | None) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group, "dynamic": False}


# The verbs


def export_folder(
    run: str | Path,
    folder: str | Path,
    *,
    model: nn.Module | str | None = None,
    embeddings: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a run of a Hugging Face network as a folder that transformers loads (with the package compressed-tensors).

    model   as for `load`;   embeddings  pack these too, for runtimes that read them: transformers 5 does not

    Returns the file's bytes, and which layers are packed, are dense, or lose the quantizer of their input. Raises UnsupportedModel if the
    network is not one of transformers, or has nothing that the format packs; no folder is left then.
    """
    path = Path(folder)
    _check_free(path, overwrite)
    canonical, file = opened(run, model)
    exported, files = _exported(canonical, file, embeddings)
    with new_folder(path, overwrite, _check_free, REMEDY) as draft:
        _write(draft, exported, files, file)
    report = {
        "folder": str(path),
        "bytes": (path / MODEL).stat().st_size,
        "layers": len(exported.packed) + len(exported.dense),
        "packed": len(exported.packed),
        "dense": list(exported.dense),
        "dense_bytes": sum(exported.tensors[f"{name}.weight"].nbytes for name in exported.dense),
        "float_inputs": list(exported.float_inputs),
    }
    tell("result", **report)
    return report


def _write(folder: Path, exported: Packed, files: Mapping[str, bytes], file: SchemeFile) -> None:
    save_file(exported.tensors, folder / MODEL, {"format": "pt"})  # one key, since the order of several varies
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _transformers_network(canonical: Canonical) -> "PreTrainedModel":
    """Return the canonical model. Raises UnsupportedModel unless it is a network of transformers."""
    network = canonical.model
    if not is_transformers(network):
        raise UnsupportedModel(
            f"{type(network).__name__} is not a network of transformers, which compressed-tensors folders are for. Export it with --onnx."
        )
    return network


def _exported(canonical: Canonical, file: SchemeFile, embeddings: bool) -> tuple[Packed, dict[str, bytes]]:
    """Return (the tensors, the folder's other files)."""
    network = _transformers_network(canonical).cpu()
    from anybit.sources.huggingface.folder import files_beside, own_config, own_network, transposed_layers

    own = own_network(network)
    tensors = packed(canonical, own, transposed_layers(own), embeddings)
    config = own_config(network) | {"quantization_config": tensors.quantization, RUN: file.sha256}
    return tensors, {CONFIG: (json_text(config, indent=1) + "\n").encode(), **files_beside(network)}


def _check_free(path: Path, overwrite: bool) -> None:
    """Raise InvalidSetting if `path` is taken: by an exported folder that may not be overwritten, or by anything else."""
    check_place(path, "--compressed-tensors")
    if is_run(path.resolve().parent):
        raise InvalidSetting(f"{path} is inside a run folder, which only holds its run. Choose another --compressed-tensors.")
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir():
        raise InvalidSetting(f"{path} exists and is not a folder. Choose another --compressed-tensors.")
    files = {item.relative_to(path).as_posix() for item in path.rglob("*") if not item.is_dir()}
    if not files:
        return
    if not {CONFIG, MODEL} <= files <= {CONFIG, MODEL, *huggingface_files()} or any(item.is_symlink() for item in path.rglob("*")):
        raise InvalidSetting(
            f"{path} exists and is not a folder that anybit exported, or holds other files. Choose another --compressed-tensors."
        )
    if not overwrite:
        raise InvalidSetting(f"{path} exists. Choose another --compressed-tensors, or give --overwrite.")


@keeping_task()
def verify_folder(
    run: str | Path,
    folder: str | Path,
    *,
    model: nn.Module | str | None = None,
    data: Any = None,
    metric: Metric | None = None,
    samples: int | None = 64,
    workers: int = 0,
) -> dict[str, Any]:
    """Check an exported folder against its run: every stored number, and the outputs of transformers on real inputs.

    data      inputs, labelled if accuracy is wanted; by default those of the run
    samples   number of inputs to run (None: all)

    Returns a report: `ok` says whether all promises hold, and `failures` lists those that do not. The files must be those of the run; and
    if only weights are quantized, transformers must compute what the simulation does up to float rounding. If inputs are quantized, codes
    may round differently, and some inputs stay float; the resulting difference is reported, not judged.
    """
    # Long by its arguments and their documentation.
    path = Path(folder)
    canonical, file = opened(run, model)
    exported, packs_embeddings, failures = _checked_files(path, canonical, file)
    report: dict[str, Any] = {
        "ok": not failures,
        "failures": failures,
        "skipped": {},
        "packed": len(exported.packed),
        "dense": list(exported.dense),
        "float_inputs": list(exported.float_inputs),
        "environment": environment("transformers", "compressed-tensors"),
    }
    if failures:  # only the run's own files are passed to transformers
        tell("result", ok=False, failures=failures)
        return report
    inputs = inputs_for(run, file, canonical.model, data, workers, metric)
    inputs = compared(canonical.model, inputs, {}, task_of_labels(None, file.task))
    inputs = first_of(inputs, samples)
    batches = list(inputs.batches(64))
    check_finite(batches)
    check_metric_on(canonical.model, batches, metric)
    loaded = _loaded_if_possible(path, canonical, file, packs_embeddings, report["skipped"])
    if loaded is None:
        tell("result", ok=True, failures=[])
        return report
    with redirect_stderr(io.StringIO()):  # unpacking, at the first inputs, prints a progress bar
        there = outputs_of(loaded, batches)
    simulated = outputs_of(canonical.model, batches)
    report |= {"inputs": len(inputs)} | compare_exported(simulated, there, batches, file.task, metric)
    floats = all(precision.activation_bits is None for precision in canonical.scheme.values())
    apart, largest = report["simulation"]["largest_difference"], report["simulation"]["largest_output"]
    if floats and not apart <= FLOAT_TOLERANCE * largest:  # also fails for NaN
        failures.append(f"Outputs differ from the simulation's by up to {apart:.4g} (the largest is {largest:.4g}), in float alone.")
    report["ok"] = not failures
    tell("result", ok=report["ok"], failures=failures, accuracy=report.get("accuracy"))
    return report


def _read_exported(path: Path) -> tuple[dict[str, TensorSpec], dict[str, Any]]:
    """Return (the specs of an exported folder's tensors, its config.json). Raises InvalidFile unless anybit exported it."""
    if not (path / CONFIG).is_file() or not (path / MODEL).is_file():
        raise InvalidFile(f"{path} has no {CONFIG} or no {MODEL}. Write it with `anybit export --compressed-tensors`.")
    try:
        specs, settings = read_header(path / MODEL)[0], read_json(path / CONFIG)
    except InvalidFile as error:
        raise InvalidFile(f"{error} Export the run again, with --overwrite.") from error
    if not isinstance(settings, dict) or RUN not in settings:
        raise InvalidFile(f"{path} is not a folder that anybit exported. Write one with `anybit export --compressed-tensors`.")
    return specs, settings


def _checked_files(path: Path, canonical: Canonical, file: SchemeFile) -> tuple[Packed, bool, list[str]]:
    """Return (what the run exports to, whether embeddings are packed in it, the differences of the folder from it)."""
    specs, settings = _read_exported(path)
    embeddings = {name for name, layer in quantized_layers(canonical.model).items() if not type_of(layer).reads_numbers}
    exported, files = _exported(canonical, file, any(f"{name}.weight_packed" in specs for name in embeddings))
    if settings[RUN] != file.sha256:
        failures = ["The folder was exported from another run than this one, or the run has changed since."]
    else:
        failures = _differences(path, specs, settings, exported, files)
    return exported, bool(embeddings & set(exported.packed)), failures


def _loaded_if_possible(
    path: Path, canonical: Canonical, file: SchemeFile, packs_embeddings: bool, skipped: dict[str, str]
) -> nn.Module | None:
    """Return the network as transformers loads it; None if it does not load the format. Add to `skipped` what was left out, and why."""
    with tempfile.TemporaryDirectory() as place:
        if packs_embeddings:  # the same network with these in float32
            skipped["loading"] = "transformers 5 does not load packed embeddings; outputs are those with them in float32"
            path = Path(place)
            _write(path, *_exported(canonical, file, embeddings=False), file)
        try:
            return _loaded(path, canonical)
        except ImportError as error:
            skipped["outputs"] = f"transformers does not load the format here: {' '.join(str(error).split())}"
            return None


def _loaded(path: Path, canonical: Canonical) -> nn.Module:
    """Return the network of an exported folder, loaded by transformers. Raises ImportError if a package is missing."""
    from anybit.sources.huggingface.folder import loaded_folder

    return loaded_folder(path, _transformers_network(canonical))


def _differences(
    path: Path, specs: Collection[str], settings: Mapping[str, Any], exported: Packed, files: Mapping[str, bytes]
) -> list[str]:
    """Compare the folder with the run's export; each difference is a sentence that names the layer or the setting."""
    failures = [f"{key} is missing from {MODEL}." for key in exported.tensors if key not in specs]
    failures += [f"{key} is in {MODEL} but not in the run's export." for key in specs if key not in exported.tensors]
    there = load_tensors(path / MODEL, [key for key in exported.tensors if key in specs])
    for key, tensor in there.items():
        expected = exported.tensors[key]
        if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
            failures.append(f"{key} is {tensor.dtype} {list(tensor.shape)}; the run gives {expected.dtype} {list(expected.shape)}.")
        elif (different := int((tensor != expected).sum())) > 0:
            failures.append(f"{key}: {different} of {expected.numel()} stored numbers are not the run's.")
    own = json.loads(files[CONFIG])
    keys = [key for key in {**settings, **own} if key != "transformers_version"]  # the version may differ
    failures += [f"{CONFIG}: {key} is not that of the run's export." for key in keys if settings.get(key) != own.get(key)]
    failures += [f"{name} is not what came with the network." for name in files if name != CONFIG and _content(path / name) != files[name]]
    read_too = [name for name in (*huggingface_files(), "adapter_config.json") if name not in files and (path / name).exists()]
    return failures + [f"{name} did not come with the network, and transformers may read it. Remove it." for name in read_too]


def huggingface_files() -> tuple[str, ...]:
    """Return the names of files that may come with a network. Imports transformers, only when called."""
    from anybit.sources.huggingface.folder import BESIDE

    return BESIDE


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
