"""Try, before any work, whether a network can be exported: at its uniform scheme, rounded to nearest."""

from pathlib import Path
from typing import Any

from anybit.data.batches import Batch
from anybit.errors import AnybitError, MissingPackage
from anybit.files.cache import open_cache
from anybit.networks.canonical import Canonical
from anybit.networks.observed import ObservedNetwork, rounded_to_nearest


def try_export(network: ObservedNetwork, batch: Batch, cache: str | Path | bool = True) -> dict[str, Any]:
    """Return `ok` (None if untested), else the `reason`, and of the file its `integer_layers`, `float_layers` and `text_length`, the only
    length of texts that it takes (None: any).

    Whether an export fails depends on the network but not on its weights, so that a file of the largest uniform scheme represents all.
    `cache` stores the graph, which the run's own export then reuses.
    """
    try:
        from anybit.onnx.file import exported, session
    except MissingPackage as error:
        return {"ok": None, "reason": str(error)}
    largest = network.uniform(network.options.weight_bits[-1], network.options.activation_bits[-1])
    canonical = Canonical(rounded_to_nearest(network, [batch], largest), network.norms)
    try:
        graphs = exported(canonical, batch, cache=open_cache(cache))
        session(graphs.integer)
    except Exception as error:  # torch's exporter runs the network's code, which may raise any error
        return {"ok": False, "reason": str(error) if isinstance(error, AnybitError) else f"{type(error).__name__}: {error}"}
    integer = [name for name in network.names if name in graphs.plan.integer]
    floating = [name for name in network.names if name not in graphs.plan.integer]
    return {"ok": True, "integer_layers": integer, "float_layers": floating, "text_length": graphs.length}
