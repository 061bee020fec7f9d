"""Allocation alone: the integer program at 200 layers x 49 choices x 2 budgets, solved by HiGHS (anybit) and by CBC (PuLP).

    python -m benchmarks.studies.allocation_scale --output benchmarks/results/allocation_scale.json        (needs `pip install pulp`)

The random losses resemble measured ones: they fall about fourfold per bit, and layers differ widely in size and sensitivity.
Both solvers get the same numbers; CBC gets the relative gap that HiGHS reaches. Both processor seconds and wall-clock seconds are
reported, since other processes on the machine increase the latter.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anybit.allocation.program import Problem, allocate
from anybit.environment import environment
from anybit.scheme import Precision


def random_problem(seed: int, layers: int = 200) -> Problem:
    """Draw losses: 2..8 bits for weights and activations, limits at half of the largest weight bits and a quarter of the largest BOPs."""
    rng = np.random.default_rng(seed)
    options = [Precision(w, a) for w in range(2, 9) for a in range(2, 9)]
    choices, losses, bits, bops = {}, {}, {}, {}
    for index in range(layers):
        name = f"layer{index}"
        weights, reuse = 10 ** rng.uniform(3, 6.5), 10 ** rng.uniform(0, 4)
        scale = 10 ** rng.uniform(-4, -1, size=2)
        choices[name] = options
        noise = rng.lognormal(0, 0.1, len(options))
        losses[name] = noise * np.array(
            [scale[0] * 4.0 ** (2 - p.weight_bits) + scale[1] * 4.0 ** (2 - p.activation_bits) for p in options]
        )
        bits[name] = np.array([weights * p.weight_bits for p in options])
        bops[name] = np.array([weights * reuse * p.weight_bits * p.activation_bits for p in options])
    limits = {"bits": sum(bits[n].max() for n in bits) / 2, "bops": sum(bops[n].max() for n in bops) / 4}
    return Problem(choices, losses, {"bits": bits, "bops": bops}, limits)


def solve_with_pulp(problem: Problem, gap: float) -> dict:
    """Solve the same program with PuLP and its bundled CBC."""
    import pulp  # the peer; anybit itself uses HiGHS

    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    pick = {(n, k): pulp.LpVariable(f"x_{n}_{k}", cat="Binary") for n in problem.choices for k in range(len(problem.choices[n]))}
    model += pulp.lpSum(problem.losses[n][k] * x for (n, k), x in pick.items())
    for name in problem.choices:
        model += pulp.lpSum(pick[name, k] for k in range(len(problem.choices[name]))) == 1
    for quantity, limit in problem.limits.items():
        model += pulp.lpSum(problem.costs[quantity][n][k] * x for (n, k), x in pick.items()) <= limit
    _, times = timed(lambda: model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=gap, threads=1, timeLimit=300)))
    return {**times, "objective": float(pulp.value(model.objective)), "status": pulp.LpStatus[model.status]}


def timed(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Call `function`; return its result, wall-clock seconds, and processor seconds (this process and its children)."""

    def processor() -> float:
        usages = [resource.getrusage(process) for process in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start, used = time.perf_counter(), processor()
    result = function()
    return result, {"seconds": time.perf_counter() - start, "processor_seconds": processor() - used}


def main() -> None:
    """Solve five problems with both solvers, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for seed in range(5):
        problem = random_problem(seed)
        allocation, times = timed(lambda problem=problem: allocate(problem))
        peer = solve_with_pulp(problem, max(allocation.gap, 1e-9))
        rows.append(
            {
                "seed": seed,
                "anybit": {**times, "objective": allocation.predicted_loss, "bound": allocation.bound, "gap": allocation.gap},
                "pulp": peer,
            }
        )
        print(rows[-1])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
