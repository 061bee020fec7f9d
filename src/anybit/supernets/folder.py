"""The supernet's folder: written, and read strictly."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from anybit.calls import public
from anybit.data.batches import Batch
from anybit.data.options import TASK_NAMES
from anybit.errors import AnybitError, InvalidFile
from anybit.files.strict import in_words, read_tensors, validated
from anybit.methods.multiquant import SwitchableInput, SwitchableWeight
from anybit.networks import batchnorm
from anybit.networks.cost import CostModel, LayerSize
from anybit.networks.fingerprint import inputs_of
from anybit.networks.layers import QuantizedLayer, float_weight, from_rows, prepare, quantized_layers, rows_shape
from anybit.networks.rewrites import Rewrite
from anybit.networks.states import check_state, leftovers, spec_of
from anybit.numerics.packing import TensorSpec
from anybit.runs.fingerprint import check_fingerprint, read_fingerprint
from anybit.runs.names import REPORT, SUPERNET, SUPERNET_JSON
from anybit.runs.opened import float_model_of
from anybit.runs.report import read_report
from anybit.runs.scheme_file import check_folded, with_functions
from anybit.runs.trusted import is_trusted
from anybit.scheme import Scheme, check_names, check_whole
from anybit.sources.callables import absolute
from anybit.sources.preprocessing import Preprocessing
from anybit.supernets.prepared import fill_slots, prepared_multiquant, uniform
from anybit.supernets.settings import SupernetSettings
from anybit.supernets.statistics import KnownSubnet, statistics_of
from anybit.supernets.store import LayerTensors, StoredLayer, SupernetFile, check_parts, layer_specs, read_store, split_tensors
from anybit.supernets.supernet import Supernet


def read_supernet_file(folder: Path) -> SupernetFile:
    """Read supernet.json strictly, with the fields that `store` does not know: subnets, settings, preprocessing and task."""
    file, path = read_store(folder), folder / SUPERNET_JSON
    choices = {name: layer.choices for name, layer in file.stored().items()}
    try:
        for scheme in map(Scheme.parse, file.subnets):
            check_whole(scheme, choices)
        settings = SupernetSettings.from_json(file.settings)
        uniform_ones = [uniform(choices, bits).to_json() for bits in settings.bits]
        if settings.multiquant.batch_norm == "switch" and not all(one in file.subnets for one in uniform_ones):
            raise InvalidFile("the statistics of a bit-width's own batch norms are not among its subnets")
        Preprocessing.from_json(file.preprocessing)
        if file.task not in TASK_NAMES:
            raise InvalidFile(f"task {reprlib.repr(file.task)} is unknown. Choose from {', '.join(TASK_NAMES)}.")
    except AnybitError as error:
        raise InvalidFile(f"{path}: {in_words(error)}") from error
    return file


def read_supernet(folder: Path, float_model: nn.Module) -> Supernet:
    """Return the saved supernet, on a copy of the float network."""
    file = read_supernet_file(folder)
    layers = file.stored()
    settings = SupernetSettings.from_json(file.settings)
    rewrite = None if file.functions is None else validated(Rewrite, file.functions, str(folder / SUPERNET_JSON))
    float_model = with_functions(float_model, rewrite, layers, SUPERNET_JSON)
    check_names([*layers, *file.folded, *file.folded.values()], [name for name, _ in float_model.named_modules()], "The model")
    check_folded(file, float_model, SUPERNET_JSON)
    float_layers = [name for name, layer in layers.items() if not layer.has_codes]
    model = prepare(float_model, list(layers), float_layers)
    _fill_blank(folder, file, layers, model, settings)
    method = prepared_multiquant(model, {name: layer.choices for name, layer in layers.items()}, file.folded, settings, None)
    known = _load_tensors(folder, file, layers, model)
    check_state(model, folder / SUPERNET)
    if not all((gamma > 0).all() for gamma in batchnorm.folded_gammas(method.model, file.folded)):
        raise InvalidFile(f"{folder / SUPERNET}: a batch norm that folds has a factor that is not positive. Restore it or train again.")
    folded, _ = batchnorm.fold(float_model, file.folded)
    costs = CostModel.of(prepare(folded, list(layers), float_layers), list(layers), None, len(file.edges), float_model)
    costs = replace(costs, layers={name: LayerSize(one.rows, one.columns, one.macs, one.operands) for name, one in file.layers.items()})
    provenance = {"model": file.model, "data": file.data, "preprocessing": file.preprocessing}
    report = read_report(folder) if (folder / REPORT).is_file() else {}
    supernet = Supernet(float_model, method, settings, file.folded, costs, file.edges, file.task, known, provenance, report)
    for one in known:
        supernet.check_known(one, str(folder / SUPERNET))
    fingerprint = read_fingerprint(folder, file.fingerprint)
    if fingerprint is not None:
        check_fingerprint(folder, file.fingerprint, supernet.lowest_subnet())
        supernet.example = Batch(inputs_of(fingerprint.structure, fingerprint.inputs))
    return supernet


def _fill_blank(folder: Path, file: SupernetFile, layers: Mapping[str, StoredLayer], model: nn.Module, settings: SupernetSettings) -> None:
    """Fill the slots of the prepared model, in place, for tensors of the stored shapes; raise if a layer has another shape."""
    slots = quantized_layers(model)
    for name, layer in layers.items():
        shape = rows_shape(slots[name])
        if shape != (layer.rows, layer.columns):
            raise InvalidFile(
                f"Layer {name} is {shape[0]} x {shape[1]} in the model; {folder / SUPERNET_JSON} has {layer.rows} x {layer.columns}."
            )
        fill_slots(slots[name], *_blank(layer, file.layers[name].per_channel), settings.multiquant)


def _load_tensors(folder: Path, file: SupernetFile, layers: Mapping[str, StoredLayer], model: nn.Module) -> list[KnownSubnet]:
    """Load the file's tensors into the model, in place; return the subnets whose statistics and edge ranges are stored."""
    numbers, others = leftovers(model, [name for name, layer in layers.items() if layer.has_codes])
    statistics = statistics_of(model).numel()
    expected = _expected(layers, [tensor.numel() for tensor in numbers.values()], len(file.subnets), statistics, len(file.edges))
    expected |= {key: spec_of(tensor) for key, tensor in others.items()}
    tensors = read_tensors(folder / SUPERNET, expected)
    parts = split_tensors(layers, {name: tensor.numpy() for name, tensor in tensors.items() if name not in others})
    check_parts(parts, folder / SUPERNET)
    slots = quantized_layers(model)
    with torch.no_grad():
        for name, part in parts.items():
            _load(slots[name], part)
        flat = tensors.get("floats", torch.zeros(0)).split([tensor.numel() for tensor in numbers.values()])
        for target, values in zip(numbers.values(), flat, strict=True):
            target.copy_(values.view_as(target))
        for key, target in others.items():
            target.copy_(tensors[key])
    rows = tensors.get("statistics", torch.zeros(0)).view(len(file.subnets), statistics)
    ends = tensors.get("edges", torch.zeros(0)).view(len(file.subnets), len(file.edges), 2)
    return [KnownSubnet(Scheme.parse(scheme), row, end) for scheme, row, end in zip(file.subnets, rows, ends, strict=True)]


def _blank(layer: StoredLayer, per_channel: bool) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """Return scales and ranges of the right shapes, to be overwritten."""
    scales = {bits: torch.ones(layer.rows if per_channel else 1, 1) for bits in layer.weight_bits if bits}
    shape = () if layer.operands == 1 else (layer.operands,)
    return scales, {bits: (torch.ones(shape), torch.zeros(shape)) for bits in layer.activation_bits if bits}


def _expected(layers: Mapping[str, StoredLayer], floats: Sequence[int], subnets: int, statistics: int, edges: int) -> dict[str, TensorSpec]:
    """Return the types and shapes of the file's shared tensors; empty ones are left out."""
    shared = layer_specs(layers) | {
        "floats": TensorSpec("F32", (sum(floats),)),
        "statistics": TensorSpec("F32", (subnets * statistics,)),
        "edges": TensorSpec("F32", (subnets * edges * 2,)),
    }
    return {name: spec for name, spec in shared.items() if spec.nbytes}


def _load(layer: QuantizedLayer, tensors: LayerTensors) -> None:
    """Load a layer's stored numbers into its blank slots. Raises InvalidFile if a scale is not valid."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if tensors.codes is not None:
        assert tensors.code_scale is not None and isinstance(weights, SwitchableWeight)  # a layer with codes has all three
        values = torch.from_numpy(tensors.codes.astype(np.float32) * tensors.code_scale[:, None])
        float_weight(layer).copy_(from_rows(layer, values))
        scales = torch.from_numpy(np.stack([scale for scale in tensors.weight_scales.values()]))[:, :, None]
        weights.load(scales if weights.start.shape[1] > 1 else scales[:, :1])
    if isinstance(inputs, SwitchableInput):
        scales, zeros = torch.tensor([list(zip(*operands, strict=True)) for operands in tensors.ranges.values()]).unbind(1)
        inputs.load(scales.view_as(inputs.start))
        inputs.offsets.copy_(zeros.view_as(inputs.offsets) / inputs.highest())


@public
def load_supernet(folder: str | Path, model: nn.Module | str | None = None) -> Supernet:
    """Return the supernet that `train` or `search` saved in `folder`, with `model` as in `load`. Raises InvalidFile if it is damaged."""
    folder = Path(folder)
    file = read_supernet_file(folder)
    supernet = read_supernet(folder, float_model_of(folder, file, model, SUPERNET_JSON))
    if not is_trusted(folder, SUPERNET_JSON):  # saving marks it as trusted, so no foreign reference may be passed on
        supernet.about |= {"model": {"reference": absolute(model)} if isinstance(model, str) else {}, "data": {}}
    return supernet
