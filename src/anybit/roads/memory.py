"""Estimate the memory that each step of a run needs, and the batch sizes that fit."""

import torch

from anybit.data.batches import Batch
from anybit.data.samples import Calibration
from anybit.errors import InvalidSetting
from anybit.methods.table import rounding_named
from anybit.networks.observed import ObservedNetwork
from anybit.networks.wiring import Wiring
from anybit.roads.settings import CalibrateSettings

RUNNING = 5
"""Copies of its largest tensor that a forward pass holds at once."""
TRAINED = 3
"""Copies of each tensor that a forward and backward pass holds at once: the value, its quantized form, a gradient."""


LEAST = 256_000_000
"""Bytes that a run needs besides activations, however small the network: a layer's second moments, samples of inputs, allocator
overhead. A lower limit may be exceeded."""
OBSERVED = 2
"""Copies of each tensor that an observing pass holds."""


def sample_bytes(wiring: Wiring) -> dict[str, int]:
    """Return operation's edge name -> bytes of one sample in its output."""
    return {op.edge: 4 * torch.Size(op.shape).numel() // wiring.batch_size for op in wiring.operations}


def working_memory(network: ObservedNetwork, padded: bool, settings: CalibrateSettings) -> dict[str, tuple[int, str]]:
    """Return the smallest activation memory of each kind of step: step -> (bytes, options that reduce it)."""
    sizes = sample_bytes(network.wiring)
    needs = {"a forward pass": (RUNNING * settings.batch_size * max(sizes.values()), "--batch-size")}
    if settings.does("sequential") or settings.does("parallel"):
        step = settings.batch_size if padded else settings.step_batch
        inside = [
            sum(sizes[op.edge] for op in network.wiring.operations if op.name in unit.layers or f"{op.owner}.".startswith(f"{unit.name}."))
            for unit in network.units
        ]
        name = f"a step of {rounding_named(settings.rounding).__name__}"
        needs[name] = (
            TRAINED * step * max(inside, default=0),
            "--batch-size" if padded else "--step-batch",
        )
    if settings.does("bias_tuning"):
        needs["tuning biases on one input"] = (TRAINED * sum(sizes.values()), "--no-bias-tuning")
    needs["observing one input"] = (OBSERVED * sum(sizes.values()), "smaller inputs")
    return needs


def check_memory(network: ObservedNetwork, calibration: Calibration, settings: CalibrateSettings, floor: int | None = None) -> None:
    """Raise InvalidSetting with the smallest limit that works if a single step exceeds the memory limit, or the limit is below `floor`
    (default: LEAST)."""
    floor = LEAST if floor is None else floor
    needs = working_memory(network, calibration.fitting[0].mask is not None, settings)
    step, (least, instead) = max(needs.items(), key=lambda item: item[1][0])
    if settings.memory < floor and least < floor:
        raise InvalidSetting(
            f"memory {settings.memory / 1e6:.4g}MB is less than the {_megabytes(floor)} that a run may need however small the network is. "
            f"Give at least --memory={_megabytes(floor)}."
        )
    if settings.memory < least:
        raise InvalidSetting(
            f"memory {settings.memory / 1e6:.4g}MB is less than the {_megabytes(least)} of activations that {step} needs. "
            f"Give at least --memory={_megabytes(least)}, or reduce the step: {instead}."
        )


def _megabytes(count: int) -> str:
    return f"{-(-count // 10**6)}MB"


def memory_to_capture(network: ObservedNetwork, calibration: Calibration, settings: CalibrateSettings) -> int:
    """Return the bytes left for captured activations beside a reconstruction step."""
    needs = working_memory(network, calibration.fitting[0].mask is not None, settings)
    return max(0, settings.memory - max(least for least, _ in needs.values()))


def samples_at_once(wiring: Wiring, copies: int, memory: int, most: int) -> int:
    """Return how many samples fit into a pass that holds this many copies of every tensor, from 1 to `most`."""
    return min(most, max(1, memory // (copies * sum(sample_bytes(wiring).values()))))


def within_memory(wiring: Wiring, batches: list[Batch], memory: int) -> list[Batch]:
    """Return as many of the first batches as fit into one joint forward pass."""
    room = max(1, memory // (RUNNING * max(sample_bytes(wiring).values())))
    first: list[Batch] = []
    count = 0
    for batch in batches:
        if first and count + len(batch) > room:
            break
        first.append(batch)
        count += len(batch)
    return first
