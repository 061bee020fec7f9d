"""MiniLM-L6 (a six-layer BERT): the calibrate road measured on texts, and short runs of the other roads. One JSON entry per run; finished
entries are skipped.

    python -m benchmarks.studies.minilm STUDY --model minilm-sst2 --train sst2/train.tsv --test sst2/dev.tsv
    python -m benchmarks.studies.minilm embeddings --model all-minilm-l6-v2 --train stsb/sts-train.csv --test stsb/sts-test.csv
                                --columns text=5,pair=6,label=4

    uniform     SST-2: W8A8, W4A8, W4A4, W3A8 with the ladder of steps, calibrated on 512 unlabelled training sentences
    mixed       SST-2: 4 and 3 bits on average over embeddings, linear layers and matmuls; sequential AdaQuant from parallel AdaQuant's
                codes, and from the ranges
    groups      SST-2: weights only at 4 and 3 bits, one scale per channel, and per 128, 64 and 32 inputs
    embeddings  STS-B: sentence embeddings at W8A8, W4A8, W3A8, W4A4, and 4 and 3 bits on average
    exported    SST-2: the light pipeline at W8A8, W4A8 and W4 in groups of 32, as ONNX files: size, speed, accuracy of file and simulation
    roads       SST-2: grow to 4 bits, and a supernet of 4, 6 and 8 bits, one epoch of --sentences each

Differences from the float network have paired 95 % intervals: per sentence for accuracy, by bootstrap
over pairs for correlations.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import anybit
from anybit.data.samples import draw
from anybit.data.tasks import TASKS, distance, outputs_of, score
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing
from benchmarks.studies.study import Entries, packed_hits, parser

SAMPLES = 512


class Study(Entries):
    """A network, its texts, and the results file."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments, f"minilm_{arguments.study}")
        self.model = load_model(f"hf:{arguments.model}")
        self.texts = Preprocessing(columns=arguments.columns, length=128)
        self.train, self.test = (load_data(str(path), self.texts, model=self.model) for path in (arguments.train, arguments.test))
        self.task = self.test.reader.task
        self.batches = list(self.test.by_length().batches(64))
        self.labels = torch.cat([batch.labels for batch in self.batches])
        self.reference = outputs_of(self.model, self.batches)

    def calibrated(self, budget: str | None, **settings: Any) -> dict[str, Any]:
        unlabelled = draw(self.train, SAMPLES, 0)
        settings = {"samples": SAMPLES, "batch_size": 32, "memory": 2**33, **settings}
        return self.row(anybit.calibrate(self.model, unlabelled, budget, cache=False, **settings))

    def row(self, result: anybit.Result) -> dict[str, Any]:
        """Return scores on all test texts, differences from float, and the network's cost with and without its embeddings."""
        report, outputs = result.report, outputs_of(result.model, self.batches)
        embeddings = [name for name in report["layers"] if "embeddings" in name]
        scores = score(outputs, self.labels, self.task)
        distances = {TASKS[self.task].distance.key: distance(outputs, self.reference, self.task)}
        return {
            **scores,
            "float": score(self.reference, self.labels, self.task),
            **distances,
            **self.apart(outputs),
            **report["result"],
            "embedding_bytes": sum(report["layers"][name]["bytes"] for name in embeddings),
            "other_bytes": report["result"]["bytes"] - sum(report["layers"][name]["bytes"] for name in embeddings),
            "float_bytes": report["float_bytes"],
            "layers": {name: layer["precision"] for name, layer in report["layers"].items()},
            "ladder": report.get("ladder"),
            "chosen": report["certificate"].get("chosen"),
            "stages": report["stages"],
            "seconds": sum(stage["seconds"] for stage in report["stages"]),
            "peak_bytes": max(stage["peak_bytes"] for stage in report["stages"]),
            "settings": report["settings"],
        }

    def apart(self, outputs: torch.Tensor) -> dict[str, Any]:
        """Compute the difference from the float network with its 95 % interval, in points."""
        if self.task == "classification":
            right = [(one.argmax(-1) == self.labels).double() for one in (outputs, self.reference)]
            difference = 100 * (right[0] - right[1])
            half = 1.96 * float(difference.std()) / len(difference) ** 0.5
            return {"difference": float(difference.mean()), "low": float(difference.mean()) - half, "high": float(difference.mean()) + half,
                    "right": packed_hits(right[0].numpy().astype(bool))}  # fmt: skip
        cosines = [torch.nn.functional.cosine_similarity(one[0::2], one[1::2]).numpy() for one in (outputs, self.reference)]
        labels, random = self.labels[0::2].numpy(), np.random.default_rng(0)
        drawn = [random.integers(0, len(labels), len(labels)) for _ in range(1000)]
        many = [100 * (spearmanr(cosines[0][d], labels[d]).statistic - spearmanr(cosines[1][d], labels[d]).statistic) for d in drawn]
        whole = 100 * (spearmanr(cosines[0], labels).statistic - spearmanr(cosines[1], labels).statistic)
        return {"difference": float(whole), "low": float(np.quantile(many, 0.025)), "high": float(np.quantile(many, 0.975))}


def uniform(study: Study) -> None:
    for weight_bits, activation_bits in ((8, 8), (4, 8), (3, 8), (4, 4)):
        key = f"W{weight_bits}A{activation_bits}"
        bits = {"weight_bits": (weight_bits,), "activation_bits": (activation_bits,)}
        study.measured(key, lambda bits=bits: study.calibrated(None, **bits))


def mixed(study: Study) -> None:
    for start in (None, "ranges"):
        for budget in ("4bit", "3bit"):
            key = budget if start is None else f"{budget}, from ranges"
            study.measured(key, lambda budget=budget, start=start: study.calibrated(budget, activation_bits=(8,), start=start))


def groups(study: Study) -> None:
    for bits in (4, 3):
        for group in (None, 128, 64, 32):
            key = f"W{bits}, " + ("a scale a channel" if group is None else f"groups of {group}")
            settings = {"weight_bits": (bits,), "activation_bits": (None,), "group": group}
            study.measured(key, lambda settings=settings: study.calibrated(None, **settings))


def embeddings(study: Study) -> None:
    uniform(study)
    for budget in ("4bit", "3bit"):
        study.measured(budget, lambda budget=budget: study.calibrated(budget, activation_bits=(8,)))


def exported(study: Study) -> None:
    for key, settings, packed in (
        ("W8A8", {"weight_bits": (8,), "activation_bits": (8,)}, False),
        ("W4A8", {"weight_bits": (4,), "activation_bits": (8,)}, False),
        ("W4, groups of 32, packed", {"weight_bits": (4,), "activation_bits": (None,), "group": 32}, True),
    ):
        study.measured(key, lambda settings=settings, packed=packed: as_file(study, settings, packed))


def as_file(study: Study, settings: dict[str, Any], packed: bool) -> dict[str, Any]:
    """Export a run, verify it on all test texts, and time it against float32 in the same runtime, one sentence at a time."""
    result = anybit.calibrate(
        study.model, draw(study.train, SAMPLES, 0), None, samples=SAMPLES, batch_size=32, pipeline="light", **settings
    )
    with tempfile.TemporaryDirectory() as place:
        run, file = result.save(Path(place) / "run"), Path(place) / "run.onnx"
        inputs: dict[str, Any] = {"model": study.model, "data": study.test}
        anybit.export(run, file, weight_only=packed, **inputs)
        verdict = anybit.verify(run, file, samples=None, **inputs)
        numbers = {name: value for name, value in verdict["numbers"].items() if name != "in_float"}
        timed = anybit.bench(run, file, **inputs)
    fields = ("ok", "failures", "skipped", "kernels", "floats", "simulation", "accuracy")
    return {"numbers": numbers, "tokens": int(study.test.dataset.lengths[0]), **{name: verdict[name] for name in fields}, **timed}


def roads(study: Study) -> None:
    some, few = draw(study.train, study.arguments.sentences, 0), {"epochs": 1, "batch_size": 64, "rate": 2e-5}

    def grown() -> dict[str, Any]:
        result = anybit.grow(study.model, some, "4bit", activation_bits=8, per_channel=True, distill=1.0, gate_rate=3e-3, **few)
        return study.row(result) | {"epochs": result.report["epochs"], "sentences": len(some)}

    def supernet() -> dict[str, Any]:
        trained = anybit.train(study.model, some, test=study.test, bits=(4, 6, 8), **few)
        extracted = {bits: study.row(anybit.extract(trained, scheme=trained.uniform(bits))) for bits in (4, 6, 8)}
        return {"test": trained.report["test"], "subnets": extracted, "epochs": trained.report["epochs"], "sentences": len(some)}

    study.measured("grow 4bit A8", grown)
    study.measured("supernet of 4, 6 and 8 bits", supernet)


STUDIES = {"uniform": uniform, "mixed": mixed, "groups": groups, "embeddings": embeddings, "exported": exported, "roads": roads}


def main() -> None:
    """Run one study."""
    options = parser(__doc__, STUDIES)
    options.add_argument("--model", required=True, type=Path)
    options.add_argument("--train", required=True, type=Path)
    options.add_argument("--test", required=True, type=Path)
    options.add_argument("--columns")
    options.add_argument("--sentences", type=int, default=12_800, help="for `roads`: sentences per epoch")
    options.add_argument("--threads", type=int, default=1)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    STUDIES[arguments.study](Study(arguments))


if __name__ == "__main__":
    main()
