"""Verbs of exported files: export, verify, bench, profile."""

from pathlib import Path

import anybit
from anybit.calls import Amounts
from anybit.cli.options import load_metric
from anybit.cli.work import Outcome
from anybit.exports.formats import chosen_format, format_of, onnx_format
from anybit.roads.settings import CalibrateSettings
from anybit.runs.folder import check_run
from anybit.settings import argument, option, same_as
from anybit.sources.preprocessing import Preprocessing
from anybit.sources.references import check_data, check_file, check_there

RUN_DATA = "Inputs, preprocessed as in the run (default: the run's own data)."


def export(
    run: Path = argument("A run folder.", ready=check_run),
    *,
    onnx: Path | None = option(None, "ONNX file to write.", panel="Output"),
    compressed_tensors: Path | None = option(None, "Folder to write, for transformers.", panel="Output"),
    data: str | None = option(None, RUN_DATA, panel="Input", ready=check_data), model=None,
    tables: bool = option(False, "Write SiLU, GELU and similar as lookup tables: exact, slower.", switch=True),
    weight_only: bool = option(False, "Keep weights packed in linear layers with float inputs.", switch=True),
    pack_embeddings: bool = option(False, "Pack embeddings in the folder too; transformers 5 cannot load them.", switch=True, rare=True),
    cache=True, overwrite=False,
) -> Outcome:  # fmt: skip
    """Write a run as an ONNX file of packed weights, or as a folder for transformers.

    anybit export runs/mine --onnx mine.onnx
    anybit export runs/sentences --compressed-tensors sentences/
    """
    options = {"data": data, "tables": tables, "weight-only": weight_only, "pack-embeddings": pack_embeddings}
    chosen, target = chosen_format({"onnx": onnx, "compressed-tensors": compressed_tensors}, options)
    return Outcome(chosen.run_export(run, target, options, model=model, overwrite=overwrite, cache=cache), chosen.table)


def verify(
    run: Path = argument("The run folder that was exported.", ready=check_run),
    exported: Path = argument("The exported file or folder.", ready=check_there),
    *,
    data: str | None = option(None, RUN_DATA, panel="Input", ready=check_data),
    samples: int = same_as(Amounts, "samples", default=64, doc="Inputs to run, from the first."),
    model=None, metric=None, cache=True, workers=0,
) -> Outcome:  # fmt: skip
    """Check an exported file against its run; exit status 1 if it fails.

    anybit verify runs/mine mine.onnx
    anybit verify runs/mine mine.onnx --data labelled/ --samples 256
    """
    chosen = format_of(exported)
    verdict = chosen.run_verify(
        run, exported, model=model, data=data, samples=samples, metric=load_metric(metric), workers=workers, cache=cache
    )
    return Outcome(verdict, chosen.verdict, status=0 if verdict["ok"] else 1)


def bench(
    run: Path = argument("A run folder.", ready=check_run),
    onnx: Path | None = argument("The exported file (default: export in memory).", None, ready=check_file),
    *,
    data: str | None = option(None, RUN_DATA, panel="Input", ready=check_data), model=None,
    rounds: int = same_as(Amounts, "rounds", doc="Rounds of float32 and exported file, about 0.05 s each."),
    batch_size: int = same_as(CalibrateSettings, "batch_size", default=1),
    threads: int = same_as(Amounts, "threads", default=1, doc="Threads of the runtime."),
    cache=True,
) -> Outcome:  # fmt: skip
    """Measure size and latency of an exported file against float32.

    anybit bench runs/mine mine.onnx
    anybit bench runs/mine mine.onnx --batch-size 8 --threads 4
    """
    onnx_format().check_installed()
    measured = anybit.bench(run, onnx, model=model, data=data, rounds=rounds, batch_size=batch_size, threads=threads, cache=cache)
    return Outcome(measured, "print_bench")


def profile(
    *, model, weights=None, data, keep=None, preprocessing: Preprocessing,
    rounds: int = same_as(Amounts, "rounds", doc="Rounds of float32, 8-bit and alternating layers, about 0.05 s each."),
    overwrite: bool = option(False, "Measure again, replacing the stored table.", switch=True),
    cache=True,
) -> Outcome:  # fmt: skip
    """Time each layer on this machine: the table behind --budget latency=3ms.

    anybit profile --model torchvision:resnet18 --data images/
    anybit profile --model net.py:net --data x.npz --keep 'head=float'
    """
    onnx_format().check_installed()
    measured = anybit.profile(
        model, data, weights=weights, preprocessing=preprocessing, keep=keep, rounds=rounds, overwrite=overwrite, cache=cache
    )
    return Outcome(measured, "print_profile")
