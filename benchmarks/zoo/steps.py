"""The steps of one network, each timed; a failure is recorded with its kind: refused by anybit, or crashed."""

import math
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import anybit
from anybit.data.batches import Batch, call, tensors_in, unpadded
from anybit.sources.inputs import samples_from
from benchmarks.zoo.inputs import Source
from benchmarks.zoo.lively import enliven
from benchmarks.zoo.network import ZooNetwork

PRECISIONS = {"W8A8": (8, 8), "W4A8": (4, 8)}
COMPARED = 64
"""Inputs on which file and simulation are compared with the float network. A code that float sums of another order round to the other side
moves later ones, so that both have noise of their own: over 16 inputs their ratios differ by up to 1 dB where they agree over 256."""


@dataclass
class Progress:
    """The results of a network so far; `keep` writes them, so that a killed process leaves them."""

    keep: Callable[[Mapping[str, Any]], None]
    entry: dict[str, Any] = field(default_factory=lambda: {"seconds": {}, "failures": []})

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step in processor seconds, since others may share the machine.

        An exception ends it, and is recorded with its kind, message and origin.
        """
        self.keep(self.entry | {"running": name})
        start = time.process_time()
        try:
            yield
        except Exception as error:
            self.entry["failures"].append({"step": name, **described(error)})
            raise Stopped from error
        finally:
            self.entry["seconds"][name] = time.process_time() - start
            self.keep(self.entry)


class Stopped(Exception):
    """A step has failed, so later ones cannot run."""


def described(error: Exception) -> dict[str, str]:
    """Describe the exception, and the function of anybit that raised it."""
    kind = "refusal" if isinstance(error, anybit.AnybitError) else "crash"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/anybit/" in frame.filename]
    place = f"{frames[-1].filename.split('/anybit/')[-1]}:{frames[-1].name}" if frames else ""
    message = re.sub(rf"{tempfile.gettempdir()}/\w+/", "", " ".join(str(error).split()))
    return {"kind": kind, "class": type(error).__name__, "message": message[:600], "place": place}


def run_steps(network: ZooNetwork, source: Source, all_steps: bool, keep: Callable[[Mapping[str, Any]], None]) -> None:
    """Run a network's steps, up to the first failure that prevents the next."""
    progress = Progress(keep)
    try:
        with progress.step("build"):
            torch.manual_seed(source.seed)
            model, loader = network.build(), network.inputs.loader(source)
            first = next(samples_from(loader, 0).batches(8))
            enliven(model, first.inputs, source.seed)
            compared = samples_from(network.inputs.loader(source, COMPARED), 0).batches(8)
            reference = Reference.of(model, list(compared))
            progress.entry |= {"compared": COMPARED, **reference.facts(model, first.head(2))}
        with progress.step("inspect"):
            report = anybit.inspect(model, loader, export=False)  # a later step exports
            progress.entry |= coverage(model, report)
    except Stopped:
        return
    with tempfile.TemporaryDirectory() as folder:  # the second file reuses the float graph of the first
        subject = Subject(model, loader, reference, report, Path(folder))
        for precision in PRECISIONS if all_steps else ():
            progress.entry[precision] = {}
            try:
                quantize(subject, precision, progress)
            except Stopped:
                if progress.entry["failures"][-1]["step"].startswith(("calibrate", "export")):
                    return  # the other precision would fail alike


@dataclass(frozen=True)
class Reference:
    """The float network's outputs, by batch."""

    batches: Sequence[Batch]
    outputs: Sequence[list[Tensor]]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch]) -> "Reference":
        return cls(batches, [floats(model, batch) for batch in batches])

    def facts(self, model: nn.Module, two: Batch) -> dict[str, Any]:
        """Measure the size, multiply-accumulates of a sample, seconds of a pass over two samples (as many as `inspect` observes), the
        magnitude of the outputs and the share of it that differs between samples."""
        passes, start = 0, time.process_time()
        while passes < 3 or time.process_time() - start < 0.1:  # under a time limit, the process clock ticks only every few milliseconds
            floats(model, two)
            passes += 1
        pass_seconds = (time.process_time() - start) / passes
        with FlopCounterMode(display=False) as counter, torch.enable_grad():  # its hooks need gradients where a parameter is an input
            call(model, two.inputs)
        energies = [float(one.double().square().mean()) for one in self.outputs[0]]
        varied = [float((one - one.mean(0)).double().square().mean()) for one in self.outputs[0]]
        if not all(map(math.isfinite, energies)) or min(energies) == 0:
            raise ValueError(f"The outputs' mean squares are {energies}: these random weights are no fair test.")
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "macs": counter.get_total_flops() // 4,
            "pass_seconds": pass_seconds,
            "size": [math.sqrt(energy) for energy in energies][:4],
            "varied": [math.sqrt(a / b) for a, b in zip(varied, energies, strict=True)][:4],
        }

    def decibels(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """Return the signal-to-noise ratio of `outputs` in decibels; all outputs of a network are weighted equally."""
        noise = []
        for index in range(len(self.outputs[0])):
            signal = torch.cat([one[index].flatten() for one in self.outputs]).double()
            other = torch.cat([one[index].flatten() for one in outputs]).double()
            noise.append(float((signal - other).square().sum() / signal.square().sum()))
        return -10 * math.log10(max(sum(noise) / len(noise), 1e-20))


def floats(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Run the network on a batch and return its outputs except at padding."""
    with torch.no_grad():
        return float_outputs(tensors_in(call(model, batch.inputs)), batch)


def float_outputs(outputs: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    mask = batch.mask
    numbers = [one for one in outputs if one.is_floating_point()]
    return [one[mask] if mask is not None and one.shape == mask.shape else unpadded(one, mask) for one in numbers]


def coverage(model: nn.Module, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the covered share of all parameters that are not vectors, and the uncovered layers by reason."""
    matrices = [one for one in model.parameters() if sum(size > 1 for size in one.shape) > 1]
    modules = dict(model.named_modules())
    covered = {}
    for name, row in report["layers"].items():
        if row["weight"]:  # a shared weight counts once
            own = getattr(modules.get(name), "weight", None)
            covered[id(own) if isinstance(own, nn.Parameter) else name] = math.prod(row["weight"])
    share = sum(covered.values()) / max(sum(one.numel() for one in matrices), 1)
    reasons: dict[str, list[str]] = {}
    for name, why in report["uncovered"].items():
        reasons.setdefault(why, []).append(name)
    return {
        "layers": len(report["layers"]),
        "covered": min(share, 1.0),
        "uncovered": {why: names[:3] for why, names in reasons.items()},
    }


@dataclass(frozen=True)
class Subject:
    """A network with its data, float outputs, the report of `inspect`, and a folder for files."""

    model: nn.Module
    loader: DataLoader
    reference: Reference
    report: Mapping[str, Any]
    folder: Path


def quantize(subject: Subject, precision: str, progress: Progress) -> None:
    """Calibrate a network at one precision, export and verify it, and run the file."""
    model, reference, entry = subject.model, subject.reference, progress.entry[precision]
    weight_bits, activation_bits = PRECISIONS[precision]
    run, file = subject.folder / precision, subject.folder / f"{precision}.onnx"
    common = {"model": model, "data": subject.loader, "cache": subject.folder / "cache"}
    with progress.step(f"calibrate {precision}"):
        options = {"weight_bits": (weight_bits,), "activation_bits": (activation_bits,), "samples": 16, "held_out": 0.25, "batch_size": 8}
        result = anybit.calibrate(model, subject.loader, pipeline="light", cache=False, **options)
        result.save(run)
        simulation = anybit.load(run, model)
        entry["simulation_db"] = reference.decibels([floats(simulation, batch) for batch in reference.batches])
    with progress.step(f"export {precision}"):
        exported = anybit.export(run, file, **common)
        entry |= {"bytes": exported["bytes"], "integer_layers": exported["integer_layers"] / max(exported["layers"], 1)}
    verified = True
    try:
        with progress.step(f"verify {precision}"):
            verdict = anybit.verify(run, file, **common)
            macs = [subject.report["layers"][layer]["macs"] or 0 for layer in verdict["kernels"]]
            entry["integer_macs"] = sum(macs) / max(progress.entry["macs"], 1)
            if not verdict["ok"]:
                raise NotVerified(f"{len(verdict['failures'])} failures. {' '.join(verdict['failures'][:3])}")
    except Stopped:
        verified = False
    with progress.step(f"evaluate {precision}"):
        entry["file_db"] = reference.decibels([runtime_outputs(file, batch) for batch in reference.batches])
    if not verified:
        raise Stopped


class NotVerified(anybit.AnybitError):
    """`verify` reports that the file breaks a promise."""


def runtime_outputs(file: Path, batch: Batch) -> list[Tensor]:
    """Run the file in ONNX Runtime and return its outputs except at padding."""
    from anybit.onnx.file import outputs, session

    return float_outputs([torch.from_numpy(array) for array in outputs(session(file), [batch])], batch)
