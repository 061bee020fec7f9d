"""Latency of an exported file against the same runtime's float32 file: alternating, on one thread, as a ratio."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Runner = Callable[[], Any]


def in_turns(runners: Mapping[str, Runner], rounds: int, seconds: float = 0.05) -> dict[str, list[float]]:
    """Time calls of each runner; returns one number per round, in which every runner is called for about `seconds`, one after the other.

    A slow phase of the machine slows all of them, so ratios within a round mean more than the times themselves.
    """
    repeats = {}
    for name, runner in runners.items():
        runner()
        start = time.perf_counter()
        runner()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                runner()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def faster(times: Mapping[str, Sequence[float]], of: str, than: str) -> dict[str, float]:
    """Return how many times faster `of` is than `than`: the median of the rounds' ratios, and their quartiles."""
    ratios = np.array(times[than]) / np.array(times[of])
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return {"ratio": float(median), "low": float(low), "high": float(high)}


def openvino_runner(file: bytes, feeds: Sequence[np.ndarray], threads: int) -> Runner | None:
    """Return a runner of the file in OpenVINO; None if that is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(file), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer(list(feeds))
