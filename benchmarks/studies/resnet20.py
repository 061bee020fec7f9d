"""ResNet-20 on CIFAR-10 with the calibrate road. One JSON entry per run; finished entries are skipped.

    python -m benchmarks.studies.resnet20 STUDY --data cifar10.npz --weights resnet20_cifar10.safetensors

    uniform     W4A8, W4A4, W3A3, W2A4, W2A2, first and last layer at 8 bits, three seeds; below 4 bits also with more steps and dropping
    ladder      the gain of each step of calibrate at each of these precisions, one seed
    solver      with and without the closed-form solver: light, and 300 steps of AdaQuant; with processor times
    roundings   each rounding alone, 300 steps from ranges on 512 images, one seed; with processor times
    sensitivities  measured or predicted sensitivity: 3 and 2.5 weight bits on average, A8, light, with and without the solver; two seeds
    mixed       4, 3 and 2.5 weight bits on average, all layers in the budget: A8, and searched activation bits; three seeds
    small-sets  W4A4 on 8 to 1,024 images, drawn three times: ranges only, AdaQuant layer-wise and block-wise
    scatter     predicted against measured loss at 3 bits: integer program, 20 random schemes within the budget, uniform
    speed       W4A8 and W4A4 with few steps, to compare their time with a peer's (see peers/)

Images are training images without labels; only the report uses the test set.
"""

import random
import time
from collections.abc import Iterator
from typing import Any

import torch

import anybit
from anybit.allocation.choice import choose_scheme, measured_row
from anybit.budget import Budget
from anybit.data.samples import draw
from anybit.environment import StageClock
from anybit.methods.table import ROUNDINGS, SENSITIVITIES
from anybit.networks.observed import ObservedNetwork
from anybit.roads.calibrate import prepare_state
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import Precision, Scheme
from benchmarks.studies.cifar10 import ResNet20, cifar10_parser

ENDS = {"conv1": Precision(8, 8), "linear": Precision(8, 8)}
PRECISIONS = ((4, 8), (4, 4), (3, 3), (2, 4), (2, 2))
FULL = {"mirror": True, "steps": 300}
"""The last row of the ladder: the settings of every headline number at 4 bits and above."""
LONG = {"mirror": True, "steps": 1000, "drop": 0.5}
"""Below 4 bits more steps help, if dropping keeps them from memorizing the images."""

RUNGS: dict[str, dict[str, Any]] = {
    "ranges only": {"pipeline": "light", "bn_tuning": False, "solver": "none"},
    "light": {"pipeline": "light", "solver": "none"},
    "AdaQuant, parallel": {
        "parallel": True,
        "sequential": False,
        "bn_tuning": False,
        "bias_tuning": False,
        "candidate_steps": 300,
        "solver": "none",
    },
    "AdaQuant, sequential": {"unit": "layer", "bn_tuning": False, "bias_tuning": False, "steps": 300},
    "block-wise": {"bn_tuning": False, "bias_tuning": False, "steps": 300},
    "block-wise with dropping": {"drop": 0.5, "bn_tuning": False, "bias_tuning": False, "steps": 300},
    "block-wise + mirror images": {"bn_tuning": False, "bias_tuning": False, **FULL},
    "+ BN tuning": {"bias_tuning": False, **FULL},
    "+ bias tuning": FULL,
}


class Calibration(ResNet20):
    """The study of the calibrate road."""

    def calibrated(self, budget: Any = None, **settings: Any) -> list[dict[str, Any]]:
        """Calibrate and test; return a row per budget."""
        results = anybit.calibrate(self.network(), self.train, budget, cache=False, **settings)
        return [self.row(result) for result in (results if isinstance(results, list) else [results])]

    def timed(self, **settings: Any) -> dict[str, Any]:
        """Calibrate and test; add the processor time of calibration."""
        begin = time.process_time()
        result = anybit.calibrate(self.network(), self.train, cache=False, **settings)
        seconds = time.process_time() - begin
        return {**self.row(result), "processor_seconds": seconds}

    def row(self, result: anybit.Result) -> dict[str, Any]:
        report = result.report
        return super().row(result) | {
            "ladder": report["ladder"],
            "chosen": next((row["name"] for row in report["schemes"] if row["chosen"]), None),
            "schemes": [{k: v for k, v in row.items() if k != "scheme"} for row in report["schemes"]],
            "units": report["units"],
        }


def fixed(weight_bits: int, activation_bits: int) -> dict[str, Any]:
    """Return the settings of one precision for all layers but the first and the last."""
    return {"weight_bits": (weight_bits,), "activation_bits": (activation_bits,), "keep": ENDS}


def uniform(study: Calibration) -> None:
    for seed in range(study.seeds):
        for w, a in PRECISIONS:
            study.measured(f"W{w}A{a} seed {seed}", lambda w=w, a=a, seed=seed: study.calibrated(**fixed(w, a), seed=seed, **FULL)[0])
    for seed in range(study.seeds):
        for w, a in PRECISIONS[2:]:
            study.measured(f"W{w}A{a} long seed {seed}", lambda w=w, a=a, seed=seed: study.calibrated(**fixed(w, a), seed=seed, **LONG)[0])
    for w, a in ((3, 3), (2, 2)):  # other variants, one seed each
        for name, more in {"parallel first": {"parallel": True}, "1000 steps": {"steps": 1000}}.items():
            settings = {**fixed(w, a), **FULL, **more}
            study.measured(f"W{w}A{a} {name}", lambda settings=settings: study.calibrated(**settings)[0])


def ladder(study: Calibration) -> None:
    study.measured("float", lambda: {"top1": anybit.evaluate(study.network(), study.test)["top1"]})
    for w, a in PRECISIONS:
        for name, settings in RUNGS.items():
            study.measured(f"W{w}A{a} {name}", lambda w=w, a=a, settings=settings: study.calibrated(**fixed(w, a), **settings)[0])


def solver(study: Calibration) -> None:
    pipelines: dict[str, dict[str, Any]] = {"light": {"pipeline": "light"}, "advanced": {}}
    for pipeline, settings in pipelines.items():
        for w, a in ((4, 8), (3, 8), *PRECISIONS[1:]):
            for name in ("none", "gptq"):
                study.measured(
                    f"W{w}A{a} {pipeline} {name}",
                    lambda w=w, a=a, name=name, settings=settings: study.timed(**fixed(w, a), solver=name, **settings),
                )


def roundings(study: Calibration) -> None:
    settings = {"solver": "none", "steps": 300, "samples": 512}
    for w, a in ((3, 3), (4, 4), (2, 4), (4, 8)):
        for name in ROUNDINGS:
            study.measured(f"W{w}A{a} {name}", lambda w=w, a=a, name=name: study.timed(**fixed(w, a), rounding=name, **settings))


def sensitivities(study: Calibration) -> None:
    settings = {"activation_bits": (8,), "pipeline": "light"}
    for seed in range(2):
        for chosen in ("none", "gptq"):
            for name in SENSITIVITIES:
                study.measured(
                    f"solver {chosen} {name} seed {seed}",
                    lambda chosen=chosen, name=name, seed=seed: {
                        "rows": study.calibrated(["3bit", "2.5bit"], solver=chosen, sensitivity=name, seed=seed, **settings)
                    },
                )


def mixed(study: Calibration) -> None:
    budgets = ["4bit", "3bit", "2.5bit"]
    searched = ["4bit,bops=650M", "3bit,bops=490M"]
    for seed in range(study.seeds):
        for label, limits, activation_bits in (("A8", budgets, (8,)), ("searched", searched, (3, 4, 6, 8))):
            study.measured(
                f"{label} seed {seed}",
                lambda seed=seed, limits=limits, bits=activation_bits: {
                    "rows": study.calibrated(limits, activation_bits=bits, seed=seed, **FULL)
                },
            )
        for w, a in ((4, 8), (3, 8), (4, 4)):  # of equal size, no layer kept at 8 bits
            settings = {"weight_bits": (w,), "activation_bits": (a,), "seed": seed, **FULL}
            study.measured(f"uniform W{w}A{a} seed {seed}", lambda settings=settings: study.calibrated(**settings)[0])


def small_sets(study: Calibration) -> None:
    rungs = {
        "ranges only": RUNGS["ranges only"],
        "AdaQuant layer-wise": {"unit": "layer", "bn_tuning": False, "bias_tuning": False, "steps": 200},
        "AdaQuant block-wise": {"bn_tuning": False, "bias_tuning": False, "steps": 200},
    }
    for count in (8, 32, 128, 512, 1024):
        for seed in range(study.seeds):
            for name, settings in rungs.items():
                study.measured(
                    f"{count} images, draw {seed}, {name}",
                    lambda count=count, seed=seed, settings=settings: study.calibrated(**fixed(4, 4), samples=count, seed=seed, **settings)[
                        0
                    ],
                )


def random_schemes(network: ObservedNetwork, bits: float, count: int) -> Iterator[Scheme]:
    """Draw schemes at A8 with random weight bits, on average at most `bits` and at most 0.1 below."""
    generator = random.Random(0)
    while count:
        tilt = generator.uniform(0.2, 3)
        scheme = Scheme(
            {n: Precision(generator.choices((2, 3, 4, 6, 8), [tilt**-b for b in (2, 3, 4, 6, 8)])[0], 8) for n in network.names}
        )
        if bits - 0.1 <= network.costs.weight_bits(scheme) <= bits:
            count -= 1
            yield scheme


def scatter(study: Calibration) -> None:
    def run() -> dict[str, Any]:
        settings = CalibrateSettings(activation_bits=(8,), alternatives=10)
        clock = StageClock()
        state = prepare_state(study.network(), draw(study.train, 1024, 0), settings, [], clock)
        choice = choose_scheme(state.network, state.table, Budget.parse("3bit"), settings.alternatives, state.judge)
        rows = [{k: v for k, v in row.items() if k != "scheme"} for row in choice.measured]
        for index, scheme in enumerate(random_schemes(state.network, 3, 20)):
            row = measured_row(state.network, state.table, f"random {index}", scheme, state.judge)
            rows.append({k: v for k, v in row.items() if k != "scheme"})
        return {"rows": rows, "stages": clock.stages}

    study.measured("3bit A8", run)


def speed(study: Calibration) -> None:
    for w, a in ((4, 8), (4, 4)):
        for name, settings in {"light": {"pipeline": "light"}, "40 steps": {"steps": 40, "bn_tuning": False, "bias_tuning": False}}.items():
            for seed in range(study.seeds):
                study.measured(
                    f"W{w}A{a} {name} seed {seed}",
                    lambda w=w, a=a, settings=settings, seed=seed: study.calibrated(**fixed(w, a), seed=seed, **settings)[0],
                )


STUDIES = {
    "uniform": uniform,
    "ladder": ladder,
    "solver": solver,
    "roundings": roundings,
    "sensitivities": sensitivities,
    "mixed": mixed,
    "small-sets": small_sets,
    "scatter": scatter,
    "speed": speed,
}


def main() -> None:
    """Run one study."""
    arguments = cifar10_parser(__doc__, STUDIES, seeds=3).parse_args()
    torch.set_num_threads(arguments.threads)
    STUDIES[arguments.study](Calibration(arguments, "resnet20"))


if __name__ == "__main__":
    main()
