"""Measured latencies as part of a network's costs, if a budget limits them."""

from collections.abc import Sequence
from dataclasses import replace

from anybit.budget import LATENCY, Budget
from anybit.data.batches import Batch
from anybit.data.samples import Samples
from anybit.errors import InvalidSetting
from anybit.networks.canonical import Canonical
from anybit.networks.cost import CostModel
from anybit.networks.observed import ObservedNetwork
from anybit.supernets.prepared import observe_supernet
from anybit.supernets.supernet import Supernet


def with_latencies(network: ObservedNetwork, budgets: Sequence[Budget]) -> ObservedNetwork:
    """Return the network with this machine's measured latencies in its costs, if a budget limits latency. Raises InvalidSetting without a
    table."""
    if all(budget.limit(LATENCY.name) is None for budget in budgets):
        return network
    from anybit.onnx.latency import load_table  # optional packages

    loaded = load_table(network)
    if loaded is None:
        raise InvalidSetting(
            "A budget of latency needs a table measured on this machine: run `anybit profile` on this model and data first."
        )
    return replace(network, costs=replace(network.costs, latency=loaded[0]))


def supernet_with_latencies(supernet: Supernet, samples: Samples, budgets: Sequence[Budget]) -> Supernet:
    """Return the supernet with this machine's measured latencies in its costs, if a budget limits latency."""
    if all(budget.limit(LATENCY.name) is None for budget in budgets):
        return supernet
    from anybit.onnx.file import PROBE  # as in `profile`, since the length of padded texts depends on it

    first = next(samples.on("cpu").subset(range(min(PROBE, len(samples)))).batches(PROBE))
    network = with_latencies(observe_supernet(supernet.network, first, supernet.settings), budgets)
    return replace(supernet, costs=replace(supernet.costs, latency=network.costs.latency))


def measured_latencies(costs: CostModel, canonical: Canonical, example: Batch) -> dict[str, float]:
    """Return the predicted latency of the finished network and the measured one of its export, in seconds per sample."""
    from anybit.onnx.latency import latency_of

    assert costs.latency is not None  # budgets of latency require a table
    return {"predicted": costs.latency.total(canonical.scheme), **latency_of(canonical, example)}
