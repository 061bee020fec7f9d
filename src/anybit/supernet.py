"""A supernet: any of its subnets at once, in the canonical form, polished; and the folder that keeps it."""

import copy
import glob
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anybit import batchnorm, stages, store
from anybit.batches import Batch, Samples, draw, split
from anybit.candidates import ActivationCandidate, Candidates, frozen_candidate, to_tensors
from anybit.checkpoint import REPORT, Canonical, check_edges, check_folded, check_state, new_folder, read_report, remember, write_report
from anybit.cost import CostModel, LayerSize, leftovers, spec_of
from anybit.errors import AnybitError, InvalidFile, SchemeMismatch
from anybit.evaluation import TASKS, Metric, outputs_of
from anybit.evaluation import evaluate as evaluate_model
from anybit.files import in_words, read_tensors, sha256_of, write_json
from anybit.layers import float_weight, from_rows, prepare, quantized_layers, weight_rows
from anybit.methods.multiquant import MultiQuant, SwitchableInput, SwitchableWeight
from anybit.packing import TensorSpec
from anybit.quantizers import UniformQuantizer
from anybit.references import Preprocessing
from anybit.resume import Recall, digest
from anybit.scheme import FLOAT, Precision, Scheme, check_names
from anybit.sensitivity import SensitivityTable
from anybit.stages import CalibrateSettings
from anybit.store import JSON, LayerTensors, StoredLayer, SupernetFile, SupernetLayer
from anybit.subnets import (
    SupernetSettings,
    active_norms,
    distance,
    fill_slots,
    folded_gammas,
    prepared_multiquant,
    set_statistics,
    settings_from_json,
    statistics_of,
    to_store,
    uniform,
    widths_of,
)

POLISH = (
    "samples", "held_out", "batch_size", "seed", "unit", "blocks", "steps", "drop", "mirror", "sequential", "bn_tuning", "bias_tuning",
    "tune_scales", "bn_prior", "bn_target", "memory",
)  # fmt: skip
"""Settings of calibrate that polishing a subnet has a part for."""


@dataclass(frozen=True)
class Known:
    """A subnet whose batch-norm statistics and edge ranges are kept: statistics [numbers], edges [edges, 2]."""

    scheme: Scheme
    statistics: Tensor
    edges: Tensor


@dataclass
class Supernet:
    """A trained supernet: `switch` makes its `model` any subnet, at once and in place.

    network  the float network that it was made of
    norms    layer -> the batch norm that folds into it;   edges   names of the tensors between layers
    known    subnets whose batch-norm statistics are kept
    """

    network: nn.Module = field(repr=False)
    method: MultiQuant = field(repr=False)
    settings: SupernetSettings
    norms: Mapping[str, str]
    costs: CostModel
    edges: Sequence[str]
    task: str
    known: list[Known] = field(default_factory=list, repr=False)
    about: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.method.model

    @property
    def choices(self) -> Mapping[str, Sequence[Precision]]:
        return self.method.choices

    def uniform(self, bits: int) -> Scheme:
        """Every layer at `bits`; kept layers as they are kept."""
        return uniform(self.choices, bits)

    def switch(self, scheme: Scheme | Mapping[str, str], batches: Sequence[Batch] | None = None) -> str:
        """Make the model a subnet, in evaluation mode: `scheme`'s layers changed, the others as they were.

        batches   from which its batch-norm statistics are estimated anew; without, those of the nearest subnet that is known are taken
                  (before any is known, those that each bit-width's own batch norm has).
        Returns what the statistics are, in words. Raises SchemeMismatch where a precision was not trained.
        """
        scheme = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
        self.method.switch(scheme)
        self.model.eval()
        if batches is not None:
            batchnorm.reestimate(self.model, batches, active_norms(self.model))
            count, wanted = sum(map(len, batches)), self.settings.bn_images
            return f"estimated anew on {count} inputs" + (f" ({wanted} were asked for)" if count < wanted else "")
        if not self.known:
            return "as trained"
        nearest = self.nearest(self.method.scheme)
        statistics, words = nearest.statistics, "stored for this scheme"
        if nearest.scheme != self.method.scheme:
            words = f"those stored for the nearest scheme, {distance(nearest.scheme, self.method.scheme, self.costs):.2f} bits away"
            if self.method.norms:
                statistics, words = self.own_statistics(nearest), "those of each layer's own bit-width"
        set_statistics(self.model, statistics.to(next(self.model.parameters()).device))
        return words

    def own_statistics(self, nearest: Known) -> Tensor:
        """With a batch norm for each bit-width of a layer: each as the uniform subnet of those bits has it, others as the nearest does."""
        of_bits = {scheme[name].weight_bits: scheme for scheme in uniform_schemes(self).values() for name in self.method.norms}
        known = {bits: next(one.statistics for one in self.known if one.scheme == scheme) for bits, scheme in of_bits.items()}
        bits_of_norm = {id(norm.chosen()): norm.bits for norm in self.method.norms.values()}
        parts, at = [], 0
        for norm in active_norms(self.model):
            source, count = known.get(bits_of_norm.get(id(norm)), nearest.statistics), 2 * norm.num_features
            parts.append(source[at : at + count])
            at += count
        return torch.cat(parts)

    def nearest(self, scheme: Scheme) -> Known:
        """The known subnet whose bits differ least, weighted as the budget counts weights."""
        return min(self.known, key=lambda known: distance(known.scheme, scheme, self.costs))

    def canonical(self) -> Canonical:
        """The canonical form of the subnet at hand: frozen and folded, with the statistics that it has."""
        model = copy.deepcopy(self.model)
        self.method.freeze(model)
        folded, _ = batchnorm.fold(model, self.norms)
        return Canonical(folded.eval().requires_grad_(True), self.norms)

    @torch.no_grad()
    def as_float(self, batches: Sequence[Batch]) -> nn.Module:
        """The float network with the shared weights and no quantizers; its batch-norm statistics are those of `batches`."""
        self.method.switch(self.method.highest)
        frozen = copy.deepcopy(self.model)
        self.method.freeze(frozen)
        for name, layer in self.method.layers.items():
            float_weight(frozen.get_submodule(name)).copy_(float_weight(layer))
        twin = copy.deepcopy(self.network).to(next(self.model.parameters()).device)
        state = frozen.state_dict()
        twin.load_state_dict({key: state[key] for key in twin.state_dict()})
        batchnorm.reestimate(twin, batches)
        return twin.eval()

    def learn(
        self, scheme: Scheme, batches: Sequence[Batch] | None, edge_ranges: Callable[[nn.Module], Mapping[str, tuple[float, float]]]
    ) -> Known:
        """Estimate a subnet's batch-norm statistics (without `batches` those that it has) and edge ranges, and keep them."""
        self.method.switch(scheme)
        if batches is not None:  # a batch norm for each bit-width has its own
            self.switch(scheme, batches)
        ends = edge_ranges(self.canonical().model)
        known = Known(scheme, statistics_of(self.model).cpu(), torch.tensor([ends[name] for name in self.edges]).reshape(-1, 2))
        self.known = [*(one for one in self.known if one.scheme != scheme), known]
        return known

    def check_known(self, known: Known, where: str) -> None:
        """Raise InvalidFile where what a file, `where`, keeps of a subnet cannot be: numbers, variances, ends of edges."""
        variances = known.statistics.split([norm.num_features for norm in active_norms(self.model) for _ in ("mean", "variance")])[1::2]
        if not (torch.isfinite(known.statistics).all() and all((variance >= 0).all() for variance in variances)):
            raise InvalidFile(f"{where}: a batch-norm variance kept of {known.scheme} is below zero. Restore it or train again.")
        check_edges({name: (float(low), float(high)) for name, (low, high) in zip(self.edges, known.edges, strict=True)}, where)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the supernet's folder, all of it or nothing."""
        with new_folder(Path(folder), overwrite) as draft:
            write_supernet(draft, self)
            write_report(draft, self.report)
        remember(Path(folder), JSON)
        return Path(folder)

    def stored_edges(self) -> dict[str, tuple[float, float]]:
        """Edge ranges of the nearest subnet that is known."""
        return {
            name: (float(low), float(high)) for name, (low, high) in zip(self.edges, self.nearest(self.method.scheme).edges, strict=True)
        }


def scores(supernet: Supernet, scheme: Scheme, bn: Sequence[Batch] | None, test: Sequence[Batch], metric: Metric | None = None) -> dict:
    """What a subnet scores on `test`."""
    supernet.switch(scheme, bn)
    return evaluate_model(supernet.model, test, supernet.task, metric)


def check_whole(scheme: Scheme, choices: Mapping[str, Sequence[Precision]]) -> None:
    """Raise SchemeMismatch where the scheme leaves a layer out, names another, or has a precision that was not trained."""
    store.check_choices(scheme, choices)
    lacking = [name for name in choices if name not in scheme]
    if lacking:
        raise SchemeMismatch(f"The scheme names {len(scheme)} of {len(choices)} layers; {lacking[0]!r} is lacking. Name every layer.")


def uniform_schemes(supernet: Supernet) -> dict[str, Scheme]:
    """ "4 bits" -> the scheme."""
    return {f"{bits} bits": supernet.uniform(bits) for bits in sorted(supernet.settings.bits)}


def width_scores(supernet: Supernet, bn: Sequence[Batch] | None, test: Sequence[Batch], metric: Metric | None) -> dict[str, dict]:
    """What every uniform subnet scores on `test`."""
    return {name: scores(supernet, scheme, bn, test, metric) for name, scheme in uniform_schemes(supernet).items()}


@torch.no_grad()
def candidates_of(canonical: Canonical) -> Candidates:
    """What stands in the slots of a canonical model."""
    found = Candidates()
    for name, layer in quantized_layers(canonical.model).items():
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        if isinstance(weights, UniformQuantizer):
            found.weights[name, weights.bits] = frozen_candidate(layer)
        if isinstance(inputs, UniformQuantizer):
            found.activations[name, inputs.bits] = ActivationCandidate(inputs.scale, inputs.zero_point)
    return found


def polished(
    supernet: Supernet,
    canonical: Canonical,
    samples: Samples,
    bn: Sequence[Batch],
    settings: CalibrateSettings,
    recall: Recall = Recall(),
) -> tuple[Canonical, list[dict[str, Any]]]:
    """The subnet after calibrate's last steps, from its own codes and ranges, towards the outputs of the shared weights without quantizers:
    sequential AdaQuant, batch-norm tuning, bias tuning, each kept where held-out inputs say so. Returns (canonical, ladder)."""
    scheme = canonical.scheme
    calibration = split(draw(samples, settings.samples, settings.seed), settings.seed, settings.held_out, settings.batch_size)
    if settings.mirror:
        calibration = stages.mirrored(calibration)
    example = calibration.fitting[0].head(2)
    fixed = replace(settings, keep={glob.escape(name): precision for name, precision in scheme.items()})
    network = stages.observe_network(supernet.as_float(bn), example, fixed)
    stages.check_memory(network, calibration, settings)
    own = candidates_of(canonical)
    with torch.no_grad():
        references = [outputs_of(network.folded, [batch]) for batch in calibration.fitting]
        reference = outputs_of(network.folded, calibration.held_out)
    targets = stages.batch_norm_targets(network, calibration, settings)
    table = SensitivityTable({(name, precision): 0.0 for name, precision in scheme.items()}, FLOAT, 0)
    recall = stages.recall_of_run(recall, network, calibration, [*references, reference], settings)
    recall = recall.under(digest(to_tensors(own).values()), settings.to_json())
    judge = stages.Judge(network, own, calibration.held_out, reference, supernet.task, recall=recall)
    bench = stages.Bench(network, calibration, settings, own, own, table, judge, targets, references, own)
    model, ladder, _ = stages.polish(bench, scheme)
    supernet.method.switch(scheme)  # as it was before the float network was made
    return Canonical(model.eval(), network.norms, stages.edge_ranges(model, network.wiring, calibration.fitting)), ladder[1:]


# The folder


def stored_layers(supernet: Supernet) -> dict[str, StoredLayer]:
    found = {}
    for name, options in supernet.choices.items():
        size = supernet.costs.layers[name]
        weights, inputs = widths_of(options)
        found[name] = StoredLayer(size.rows, size.columns, tuple(weights) or (None,), tuple(inputs) or (None,), size.operands)
    return found


def write_supernet(folder: Path, supernet: Supernet) -> None:
    """supernet.safetensors and supernet.json; the live weights are rounded to the store's."""
    stored, method = to_store(supernet.method), supernet.method
    slots = [method.layers[name] for name in supernet.choices]
    weights = [layer.weight_quantizer for layer in slots if isinstance(layer.weight_quantizer, SwitchableWeight)]
    inputs = [layer.input_quantizer for layer in slots if isinstance(layer.input_quantizer, SwitchableInput)]
    numbers, others = leftovers(supernet.model, list(stored))
    rows = {id(layer.weight_quantizer): supernet.costs.layers[name].rows for name, layer in method.layers.items()}
    shared = {
        "codes": [codes.flatten() for codes, _ in stored.values()],
        "code_scales": [scale.flatten() for _, scale in stored.values()],
        "weight_scales": [scale.expand(rows[id(slot)], 1).flatten() for slot in weights for scale in slot.scales()],
        "activation_scales": [slot.scales().flatten() for slot in inputs],
        "activation_zero_points": [slot.zero_points().to(torch.uint8).flatten() for slot in inputs],
        "floats": [tensor.flatten() for tensor in numbers.values()],
        "statistics": [torch.stack([known.statistics for known in supernet.known]).flatten()],
        "edges": [torch.stack([known.edges for known in supernet.known]).flatten()],
    }
    tensors = {name: torch.cat([part.detach().cpu() for part in parts]).contiguous() for name, parts in shared.items() if parts}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    tensors |= {key: tensor.detach().cpu().contiguous().clone() for key, tensor in others.items()}
    about = SupernetFile(
        layers={
            name: SupernetLayer(**row, macs=supernet.costs.layers[name].macs, per_channel=method.settings.per_channel)
            for name, row in store.to_json(stored_layers(supernet)).items()
        },
        folded=dict(supernet.norms),
        edges=list(supernet.edges),
        subnets=[known.scheme.to_json() for known in supernet.known],
        settings=supernet.settings.to_json(),
        task=supernet.task,
        sha256="",
        **supernet.about,
    )
    save_file(tensors, folder / store.FILE, {"supernet": about.digest()})
    about.sha256 = sha256_of(folder / store.FILE)
    write_json(folder / JSON, about.model_dump())


def read_supernet_file(folder: Path) -> SupernetFile:
    """supernet.json, strictly, with what `store` does not know of: subnets, settings, preprocessing and task."""
    file, path = store.read_store(folder), folder / JSON
    choices = {name: layer.choices for name, layer in file.stored().items()}
    try:
        for scheme in map(Scheme.parse, file.subnets):
            check_whole(scheme, choices)
        settings = settings_from_json(file.settings)
        uniform_ones = [uniform(choices, bits).to_json() for bits in settings.bits]
        if settings.multiquant.batch_norm == "switch" and not all(one in file.subnets for one in uniform_ones):
            raise InvalidFile("the statistics of a bit-width's own batch norms are not among its subnets")
        Preprocessing.from_json(file.preprocessing)
        if file.task not in TASKS:
            raise InvalidFile(f"task {reprlib.repr(file.task)} is unknown. Choose from {', '.join(TASKS)}.")
    except AnybitError as error:
        raise InvalidFile(f"{path}: {in_words(error)}") from error
    return file


def read_supernet(folder: Path, float_model: nn.Module) -> Supernet:
    """The supernet that was saved, on a copy of the float network."""
    file = read_supernet_file(folder)
    layers = file.stored()
    settings = settings_from_json(file.settings)
    check_names([*layers, *file.folded, *file.folded.values()], [name for name, _ in float_model.named_modules()], "The model")
    check_folded(file, float_model, JSON)
    kept_float = [name for name, layer in layers.items() if not layer.has_codes]
    model = prepare(float_model, list(layers), kept_float)
    for name, layer in layers.items():
        target = model.get_submodule(name)
        shape = tuple(weight_rows(target, float_weight(target)).shape)
        if shape != (layer.rows, layer.columns):
            raise InvalidFile(f"Layer {name} is {shape[0]} x {shape[1]} in the model; {folder / JSON} has {layer.rows} x {layer.columns}.")
        fill_slots(target, *_blank(layer, file.layers[name].per_channel), settings.multiquant)
    method = prepared_multiquant(model, {name: layer.choices for name, layer in layers.items()}, file.folded, settings, None)
    numbers, others = leftovers(model, [name for name in layers if name not in kept_float])
    statistics = statistics_of(model).numel()
    expected = _expected(layers, [tensor.numel() for tensor in numbers.values()], len(file.subnets), statistics, len(file.edges))
    expected |= {key: spec_of(tensor) for key, tensor in others.items()}
    tensors = read_tensors(folder / store.FILE, expected)
    parts = store.split_tensors(layers, {name: tensor.numpy() for name, tensor in tensors.items() if name not in others})
    store.check_parts(parts, folder / store.FILE)
    with torch.no_grad():
        for name, part in parts.items():
            _load(model.get_submodule(name), part)
        flat = tensors.get("floats", torch.zeros(0)).split([tensor.numel() for tensor in numbers.values()])
        for target, values in zip(numbers.values(), flat, strict=True):
            target.copy_(values.view_as(target))
        for key, target in others.items():
            target.copy_(tensors[key])
    rows = tensors.get("statistics", torch.zeros(0)).view(len(file.subnets), statistics)
    ends = tensors.get("edges", torch.zeros(0)).view(len(file.subnets), len(file.edges), 2)
    known = [Known(Scheme.parse(scheme), row, end) for scheme, row, end in zip(file.subnets, rows, ends, strict=True)]
    check_state(model, folder / store.FILE)
    if not all((gamma > 0).all() for gamma in folded_gammas(method, file.folded)):
        raise InvalidFile(f"{folder / store.FILE}: a batch norm that folds has a factor of zero or below. Restore it or train again.")
    folded, _ = batchnorm.fold(float_model, file.folded)
    costs = CostModel.of(prepare(folded, list(layers), kept_float), list(layers), None, len(file.edges), float_model)
    costs = replace(costs, layers={name: LayerSize(one.rows, one.columns, one.macs, one.operands) for name, one in file.layers.items()})
    about = {"model": file.model, "data": file.data, "preprocessing": file.preprocessing}
    report = read_report(folder) if (folder / REPORT).is_file() else {}
    supernet = Supernet(float_model, method, settings, file.folded, costs, file.edges, file.task, known, about, report)
    for one in known:
        supernet.check_known(one, str(folder / store.FILE))
    return supernet


def _blank(layer: StoredLayer, per_channel: bool) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """Scales and ranges of the right shapes, to be overwritten."""
    scales = {bits: torch.ones(layer.rows if per_channel else 1, 1) for bits in layer.weight_bits if bits}
    shape = () if layer.operands == 1 else (layer.operands,)
    return scales, {bits: (torch.ones(shape), torch.zeros(shape)) for bits in layer.activation_bits if bits}


def _expected(layers: Mapping[str, StoredLayer], floats: Sequence[int], subnets: int, statistics: int, edges: int) -> dict[str, TensorSpec]:
    """The shared tensors of the file; those with nothing in them are left out."""
    shared = store.layer_specs(layers) | {
        "floats": TensorSpec("F32", (sum(floats),)),
        "statistics": TensorSpec("F32", (subnets * statistics,)),
        "edges": TensorSpec("F32", (subnets * edges * 2,)),
    }
    return {name: spec for name, spec in shared.items() if spec.nbytes}


def _load(layer: nn.Module, part: LayerTensors) -> None:
    """Put a layer's stored numbers into its blank slots. Raises InvalidFile where a scale is none."""
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if part.codes is not None:
        values = torch.from_numpy(part.codes.astype(np.float32) * part.code_scale[:, None])
        float_weight(layer).copy_(from_rows(layer, values))
        scales = torch.from_numpy(np.stack([scale for scale in part.weight_scales.values()]))[:, :, None]
        weights.load(scales if weights.start.shape[1] > 1 else scales[:, :1])
    if inputs is not None:
        scales, zeros = torch.tensor([list(zip(*operands, strict=True)) for operands in part.ranges.values()]).unbind(1)
        inputs.load(scales.view_as(inputs.start))
        inputs.offsets.copy_(zeros.view_as(inputs.offsets) / inputs.highest())
