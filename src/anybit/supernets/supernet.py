"""A supernet: any of its subnets in the canonical form, without training."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anybit.calls import public
from anybit.data.batches import Batch, in_evaluation_mode
from anybit.data.tasks import Metric
from anybit.data.tasks import evaluate as evaluate_model
from anybit.errors import InvalidFile
from anybit.files.strict import sha256_of, write_json
from anybit.methods.multiquant import MultiQuant, SwitchableInput, SwitchableWeight
from anybit.networks import batchnorm
from anybit.networks.canonical import Canonical
from anybit.networks.cost import CostModel
from anybit.networks.fingerprint import fingerprint_of
from anybit.networks.layers import float_weight
from anybit.networks.rewrites import rewrite_of
from anybit.networks.states import leftovers
from anybit.runs.fingerprint import write_fingerprint
from anybit.runs.folder import new_folder
from anybit.runs.names import SUPERNET, SUPERNET_JSON
from anybit.runs.report import write_report
from anybit.runs.scheme_file import check_edges
from anybit.runs.trusted import trust
from anybit.scheme import Precision, Scheme
from anybit.supernets.prepared import bit_distance, bit_widths, to_store, uniform
from anybit.supernets.settings import SupernetSettings
from anybit.supernets.statistics import KnownSubnet, active_norms, set_statistics, statistics_of
from anybit.supernets.store import StoredLayer, SupernetFile, SupernetLayer, to_json


@dataclass
class Supernet:
    """A trained supernet. `switch` turns its `model` into any subnet, immediately and in place.

    network  the float network that it was trained from
    norms    layer -> the batch norm that folds into it;   edges   names of the tensors between layers
    known    subnets with stored batch-norm statistics
    example  inputs, or random ones like them, for the fingerprint
    """

    network: nn.Module = field(repr=False)
    method: MultiQuant = field(repr=False)
    settings: SupernetSettings
    norms: Mapping[str, str]
    costs: CostModel
    edges: Sequence[str]
    task: str
    known: list[KnownSubnet] = field(default_factory=list, repr=False)
    about: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    example: Batch | None = field(default=None, repr=False)

    @property
    def model(self) -> nn.Module:
        return self.method.model

    @property
    def choices(self) -> Mapping[str, Sequence[Precision]]:
        return self.method.choices

    def uniform(self, bits: int) -> Scheme:
        """Return the scheme with every layer at `bits`; kept layers as they are."""
        return uniform(self.choices, bits)

    def switch(self, scheme: Scheme | Mapping[str, str], batches: Sequence[Batch] | None = None) -> str:
        """Turn the model into a subnet, in evaluation mode: the layers in `scheme` change, the others stay.

        batches   inputs to estimate batch-norm statistics from; without them, those of the nearest known subnet are taken (or, if none is
                  known,
                  those of each bit-width's own batch norm)
        Returns the origin of the statistics in words. Raises SchemeMismatch if a precision was not trained.
        """
        scheme = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)
        self.method.switch(scheme)
        self.model.eval()
        if batches is not None:
            batchnorm.reestimate(self.model, batches, active_norms(self.model))
            count, requested = sum(map(len, batches)), self.settings.bn_images
            return f"estimated on {count} inputs" + (f" ({requested} were asked for)" if count < requested else "")
        if not self.known:
            return "as trained"
        nearest = self.nearest(self.method.scheme)
        statistics, words = nearest.statistics, "stored for this scheme"
        if nearest.scheme != self.method.scheme:
            words = f"those stored for the nearest scheme, {bit_distance(nearest.scheme, self.method.scheme, self.costs):.2f} bits away"
            if self.method.norms:
                statistics, words = self.own_statistics(nearest), "those of each layer's own bit-width"
        set_statistics(self.model, statistics.to(next(self.model.parameters()).device))
        return words

    def own_statistics(self, nearest: KnownSubnet) -> Tensor:
        """Return the statistics from a batch norm per bit-width: each from the uniform subnet of its bits, others from the nearest
        subnet."""
        of_bits = {scheme[name].weight_bits: scheme for scheme in uniform_schemes(self).values() for name in self.method.norms}
        known = {bits: next(one.statistics for one in self.known if one.scheme == scheme) for bits, scheme in of_bits.items()}
        bits_of_norm = {id(norm.chosen()): norm.bits for norm in self.method.norms.values()}
        parts: list[Tensor] = []
        at = 0
        for norm in active_norms(self.model):
            source, count = known.get(bits_of_norm.get(id(norm)), nearest.statistics), 2 * norm.num_features
            parts.append(source[at : at + count])
            at += count
        return torch.cat(parts)

    def nearest(self, scheme: Scheme) -> KnownSubnet:
        """Return the known subnet whose bits differ least, weighted as the budget counts weights."""
        return min(self.known, key=lambda known: bit_distance(known.scheme, scheme, self.costs))

    def canonical(self) -> Canonical:
        """Return the canonical form of the current subnet: frozen and folded, with its current statistics."""
        model = copy.deepcopy(self.model)
        self.method.freeze(model)
        folded, _ = batchnorm.fold(model, self.norms)
        return Canonical(in_evaluation_mode(folded).requires_grad_(True), self.norms)

    def lowest_subnet(self) -> nn.Module:
        """Return the canonical model of the lowest subnet, with its stored statistics. The current subnet does not change."""
        scheme, statistics = self.method.scheme, statistics_of(self.model)
        self.switch(self.method.lowest)
        model = self.canonical().model.cpu()
        self.method.switch(scheme)
        set_statistics(self.model, statistics)
        return model

    @torch.no_grad()
    def as_float(self, batches: Sequence[Batch]) -> nn.Module:
        """Return the float network with the shared weights and no quantizers; its batch-norm statistics are those of `batches`."""
        self.method.switch(self.method.highest)
        frozen = copy.deepcopy(self.model)
        self.method.freeze(frozen)
        for name, layer in self.method.layers.items():
            float_weight(frozen.get_submodule(name)).copy_(float_weight(layer))
        float_network = copy.deepcopy(self.network).to(next(self.model.parameters()).device)
        state = frozen.state_dict()
        float_network.load_state_dict({key: state[key] for key in float_network.state_dict()})
        batchnorm.reestimate(float_network, batches)
        return in_evaluation_mode(float_network)

    def learn(
        self, scheme: Scheme, batches: Sequence[Batch] | None, edge_ranges: Callable[[nn.Module], Mapping[str, tuple[float, float]]]
    ) -> KnownSubnet:
        """Estimate a subnet's batch-norm statistics on `batches` (None: keep its current ones) and its edge ranges, and store them."""
        self.method.switch(scheme)
        if batches is not None:  # a batch norm per bit-width already has its own
            self.switch(scheme, batches)
        ends = edge_ranges(self.canonical().model)
        known = KnownSubnet(scheme, statistics_of(self.model).cpu(), torch.tensor([ends[name] for name in self.edges]).reshape(-1, 2))
        self.known = [*(one for one in self.known if one.scheme != scheme), known]
        return known

    def check_known(self, known: KnownSubnet, where: str) -> None:
        """Raise InvalidFile if a subnet's record in a file (`where`) is invalid: numbers, variances, ends of edges."""
        variances = known.statistics.split([norm.num_features for norm in active_norms(self.model) for _ in ("mean", "variance")])[1::2]
        if not (torch.isfinite(known.statistics).all() and all((variance >= 0).all() for variance in variances)):
            raise InvalidFile(f"{where}: a stored batch-norm variance of {known.scheme} is below zero. Restore it or train again.")
        check_edges({name: (float(low), float(high)) for name, (low, high) in zip(self.edges, known.edges, strict=True)}, where)

    @public
    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the supernet's folder, completely or not at all."""
        with new_folder(Path(folder), overwrite) as draft:
            write_supernet(draft, self)
            write_report(draft, self.report)
        trust(Path(folder), SUPERNET_JSON)
        return Path(folder)

    def stored_edges(self) -> dict[str, tuple[float, float]]:
        """Return the edge ranges of the nearest known subnet."""
        return {
            name: (float(low), float(high)) for name, (low, high) in zip(self.edges, self.nearest(self.method.scheme).edges, strict=True)
        }


def scores(supernet: Supernet, scheme: Scheme, bn: Sequence[Batch] | None, test: Sequence[Batch], metric: Metric | None = None) -> dict:
    """Score a subnet on `test`."""
    supernet.switch(scheme, bn)
    return evaluate_model(supernet.model, test, supernet.task, metric)


def uniform_schemes(supernet: Supernet) -> dict[str, Scheme]:
    """Return "4 bits" -> the scheme, for every bit-width."""
    return {f"{bits} bits": supernet.uniform(bits) for bits in sorted(supernet.settings.bits)}


def width_scores(supernet: Supernet, bn: Sequence[Batch] | None, test: Sequence[Batch], metric: Metric | None) -> dict[str, dict]:
    """Score every uniform subnet on `test`."""
    return {name: scores(supernet, scheme, bn, test, metric) for name, scheme in uniform_schemes(supernet).items()}


# The folder


def stored_layers(supernet: Supernet) -> dict[str, StoredLayer]:
    layers = {}
    for name, options in supernet.choices.items():
        size = supernet.costs.layers[name]
        weights, inputs = bit_widths(options)
        layers[name] = StoredLayer(size.rows, size.columns, tuple(weights) or (None,), tuple(inputs) or (None,), size.operands)
    return layers


def write_supernet(folder: Path, supernet: Supernet) -> None:
    """Write supernet.safetensors and supernet.json; the weights in memory are rounded to the store's."""
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
    rewrite = rewrite_of(supernet.model)
    file = SupernetFile(
        layers={
            name: SupernetLayer(**row, macs=supernet.costs.layers[name].macs, per_channel=method.settings.per_channel)
            for name, row in to_json(stored_layers(supernet)).items()
        },
        folded=dict(supernet.norms),
        edges=list(supernet.edges),
        functions=None if rewrite is None else rewrite.model_dump(),
        subnets=[known.scheme.to_json() for known in supernet.known],
        settings=supernet.settings.to_json(),
        task=supernet.task,
        sha256="",
        **supernet.about,
    )
    save_file(tensors, folder / SUPERNET, {"supernet": file.digest()})
    file.sha256 = sha256_of(folder / SUPERNET)
    if supernet.example is not None:
        file.fingerprint = write_fingerprint(folder, fingerprint_of(supernet.lowest_subnet(), supernet.example))
    write_json(folder / SUPERNET_JSON, file.to_json())
