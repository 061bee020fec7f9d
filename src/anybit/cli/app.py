"""The command line: paths, options and printing. All work is done by `roads`."""

import inspect
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit import __version__
from anybit.budget import parse_size
from anybit.errors import AnybitError, InvalidSetting, printable
from anybit.scheme import Precision

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Turn a trained PyTorch network into a low-bit, mixed-precision one.",
)  # fmt: skip


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print anybit's version.")] = False) -> None:
    if version:
        print(f"anybit {__version__}")
        raise typer.Exit


class Pipeline(StrEnum):
    advanced = "advanced"
    light = "light"


class Estimator(StrEnum):
    mse = "mse"
    minmax = "minmax"
    percentile = "percentile"


class UnitKind(StrEnum):
    block = "block"
    layer = "layer"


Model = Annotated[
    str | None,
    typer.Option("--model", help="The network: package.module:function, FILE.py:function, hf:FOLDER or NAME, timm:NAME, torchvision:NAME."),
]
Weights = Annotated[str | None, typer.Option(help="State dict to load into it (.safetensors, .pt, .pth).")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Inputs: a folder of images, FILE.npz, FILE.npz#test, texts (.tsv, .csv, .jsonl, .txt), FILE.py:function."),
]
RunData = Annotated[str | None, typer.Option("--data", help="Inputs, preprocessed as the run's (default: what it was made with).")]
Test = Annotated[str | None, typer.Option("--test", help="Labelled data for the report; nothing is chosen on it.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option("--budget", help="4bit, 120kB, 12.5%, bops=2.1G, latency=3ms, loss=0.02, drop=1%; join with commas, or repeat."),
]
Keep = Annotated[list[str] | None, typer.Option("--keep", help="PATTERN=W8A8 or PATTERN=float: pin layers; patterns match whole names.")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.")]
Output = Annotated[Path, typer.Option("--output", help="The run folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished run.")]
Mean = Annotated[str | None, typer.Option(help="Mean of each channel, pixels scaled to 0..1: 0.485,0.456,0.406")]
Std = Annotated[str | None, typer.Option(help="Standard deviation of each channel.")]
Size = Annotated[int | None, typer.Option(help="Sides of the input picture.")]
Resize = Annotated[int | None, typer.Option(help="Short side before a centre crop to --size.")]
Interpolation = Annotated[str, typer.Option(help="nearest, bilinear, bicubic or lanczos.")]
Columns = Annotated[
    str | None,
    typer.Option(help="Of texts: text=NAME,pair=NAME,label=NAME or question=,context=,answers=; numbers from 0 where there is no header."),
]
Length = Annotated[int | None, typer.Option(help="Most tokens of a text; longer ones are cut (default: they are an error).")]
Stride = Annotated[int | None, typer.Option(help="Tokens by which the windows of a long context overlap (default: 128).")]
BatchSize = Annotated[int, typer.Option(help="Inputs a forward pass.")]
Workers = Annotated[int, typer.Option(help="Processes that load data; changes speed alone.")]
Memory = Annotated[str, typer.Option(help="Memory for captured activations; more spills to disk.")]
Threads = Annotated[int | None, typer.Option(help="Processor threads (default: PyTorch's choice).")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
MetricOption = Annotated[
    str | None, typer.Option("--metric", help="FILE.py:function of (outputs, labels), higher is better: reported, and what drop= counts.")
]
Task = Annotated[
    str | None,
    typer.Option(help="classification, regression, embedding, question-answering or language-model, where the network does not tell."),
]
Cache = Annotated[bool, typer.Option(help="Keep results of stages and take them up again, from the user's cache directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result alone.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print each event as it happens, in a line on stderr.")]
Log = Annotated[Path | None, typer.Option("--log", help="Append each event to this file as it happens, one JSON object a line.")]
TELLING = {
    name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
    for name, kind, default in (("log", Log, None), ("verbose", Verbose, False), ("quiet", Quiet, False))
}
Work = Callable[[], AbstractContextManager[None]]


@contextmanager
def _reported_errors() -> Iterator[None]:
    """anybit's own errors as one line and exit status 2; Ctrl-C as 130."""
    try:
        yield
    except AnybitError as error:
        print(f"anybit: {printable(str(error))}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print("anybit: interrupted", file=sys.stderr)
        raise typer.Exit(130) from error


def told(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that works for longer than a moment. `--log`, `--verbose` and `--quiet` join its options, where it has them not yet, and its
    first parameter is `work`: called with nothing, the block in which it works, told of as those options say, its errors reported."""

    @wraps(verb)
    def command(**options: Any) -> None:
        settings = {name: value for name, value in options.items() if name not in (*TELLING, "as_json")}
        telling = {name: options[name] for name in TELLING}

        def work() -> AbstractContextManager[None]:
            return _work(verb.__name__, settings, silent=options.get("as_json", False), **telling)

        verb(work, **{name: value for name, value in options.items() if name in own})

    own = {name: parameter for name, parameter in inspect.signature(verb).parameters.items() if name != "work"}
    command.__signature__ = inspect.Signature([*own.values(), *(option for name, option in TELLING.items() if name not in own)])
    return command


@contextmanager
def _work(verb: str, settings: Mapping[str, Any], silent: bool, log: Path | None, verbose: bool, quiet: bool) -> Iterator[None]:
    """Report errors, and tell of the work: how far it is on the terminal, each event in a line where `verbose`, and all into `log`."""
    with _reported_errors(), ExitStack() as stack:
        if verbose and quiet:
            raise InvalidSetting("--verbose and --quiet contradict each other. Give one of them.")
        if log is not None and "output" in settings and log.resolve().is_relative_to(settings["output"].resolve()):
            raise InvalidSetting(f"--log {log} is inside the run folder, which is written whole or not at all. Put the log beside it.")
        if os.environ.get("RANK", "0") == "0":  # of several processes one tells
            from anybit.cli.logs import appended, completing, readable, verb_told
            from anybit.progress import listening

            listener, show = stack.enter_context(_terminal(bars=not (quiet or silent)))
            sinks = [stack.enter_context(appended(log))] if log is not None else []
            if verbose:
                sinks.append(lambda record: show(readable(record)))
            elif not (quiet or silent):
                sinks.append(lambda record: "note" in record and show(printable(record["note"])))
            stack.enter_context(listening(listener, completing(*sinks)))
            stack.enter_context(verb_told(verb, settings))
        yield


@contextmanager
def _terminal(bars: bool) -> Iterator[tuple[Callable[[str, int, int], None] | None, Callable[[str], None]]]:
    """(what shows how far the work is, if it is to be shown; what shows a line): bars with time left on a terminal, plain lines elsewhere.

    All on stderr: stdout is for results.
    """
    if not bars or not sys.stderr.isatty():
        yield _line_listener() if bars else None, partial(print, file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        yield _bar_listener(shown), partial(shown.console.print, markup=False, highlight=False)


def _bar_listener(bars) -> Callable[[str, int, int], None]:
    current: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if done == 0:
            current[what] = bars.add_task(what, total=total)
        bars.update(current[what], completed=done)

    return show


def _line_listener() -> Callable[[str, int, int], None]:
    started: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        if done == 0:
            started[what] = time.monotonic()
            print(f"{what}: {total} steps", file=sys.stderr)
        elif done == total or (10 * done // total) > (10 * (done - 1) // total):
            passed = time.monotonic() - started[what]
            print(f"{what}: {done}/{total}, {passed:.0f} s, {passed / done * (total - done):.0f} s left", file=sys.stderr)

    return show


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidSetting(f"{option} {text!r} cannot be read. Write numbers with commas: 0.485,0.456,0.406.") from error


def _bits(text: str, option: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if part == "float" else int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidSetting(f"{option} {text!r} cannot be read. Write bit-widths with commas: 2,3,4,6,8.") from error


def _kept(patterns: list[str] | None) -> dict[str, Precision]:
    kept = {}
    for item in patterns or []:
        pattern, separator, precision = item.rpartition("=")
        if not separator or not pattern:
            raise InvalidSetting(f"--keep {item!r} cannot be read. Write PATTERN=W8A8 or PATTERN=float.")
        kept[pattern] = Precision.parse(precision)
    return kept


def _require(value: str | None, option: str) -> str:
    if value is None:
        raise InvalidSetting(f"{option} is missing. `anybit VERB --help` lists the options.")
    return value


def _preprocessing(mean, std, size, resize, interpolation, columns, length, stride):
    from anybit.sources.preprocessing import Preprocessing

    return Preprocessing(_numbers(mean, "--mean"), _numbers(std, "--std"), size, resize, interpolation, columns, length, stride)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        if threads < 1:
            raise InvalidSetting(f"--threads {threads} must be at least 1.")
        torch.set_num_threads(threads)


def _metric(reference: str | None):
    if reference is None:
        return None
    from anybit.sources.callables import load_callable

    return load_callable(reference, "--metric")


@app.command()
@told
def calibrate(
    work: Work,
    output: Output,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    test: Test = None,
    budget: Budgets = None,
    weight_bits: Annotated[str, typer.Option(help="Bit-widths a layer's weights may get.")] = "2,3,4,6,8",
    activation_bits: Annotated[str, typer.Option(help="Bit-widths its input may get; `float` leaves it float.")] = "4,6,8",
    keep: Keep = None,
    pipeline: Annotated[Pipeline, typer.Option(help="light: no back-propagation.")] = Pipeline.advanced,
    parallel: Annotated[bool | None, typer.Option(help="AdaQuant at every candidate bit-width before the allocation.")] = None,
    sequential: Annotated[bool | None, typer.Option(help="AdaQuant on the chosen scheme.")] = None,
    bn_tuning: Annotated[bool, typer.Option(help="Batch-norm tuning.")] = True,
    bias_tuning: Annotated[bool | None, typer.Option(help="Bias tuning on the outputs.")] = None,
    tune_scales: Annotated[bool, typer.Option(help="Bias tuning trains the scales too.")] = False,
    samples: Annotated[int, typer.Option(help="Inputs drawn, fitting and held-out together.")] = 1024,
    held_out: Annotated[float, typer.Option(help="Share of them that is held out.")] = 0.2,
    rounding: Annotated[str, typer.Option(help="How reconstruction rounds weights: adaquant or adaround.")] = "adaquant",
    steps: Annotated[int, typer.Option(help="Adam steps a unit on the chosen scheme.")] = 300,
    candidate_steps: Annotated[int, typer.Option(help="Adam steps a layer for each candidate.")] = 60,
    step_batch: Annotated[int, typer.Option(help="Inputs that such a step sees; of padded texts it sees a whole batch.")] = 32,
    unit: Annotated[UnitKind, typer.Option(help="What is reconstructed at once.")] = UnitKind.block,
    block: Annotated[list[str] | None, typer.Option(help="Name the blocks instead of finding them; repeat.")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Where sequential AdaQuant starts: ranges or matched (default: parallel AdaQuant's codes, else ranges)."),
    ] = None,
    drop: Annotated[float, typer.Option(help="Share of activation quantizations dropped while reconstructing.")] = 0.0,
    mirror: Annotated[bool, typer.Option(help="Fit to the mirror images too.")] = False,
    estimator: Annotated[Estimator, typer.Option(help="Range estimator.")] = Estimator.mse,
    sensitivity_base: Annotated[str, typer.Option(help="Precision of the other layers while one is measured.")] = "float",
    pairs: Annotated[bool, typer.Option(help="Measure every (W, A) pair instead of summing two measurements.")] = False,
    alternatives: Annotated[int, typer.Option(help="How many of the best schemes are measured.")] = 5,
    bn_prior: Annotated[float, typer.Option(help="Weight of the target in the measured batch-norm statistics, of candidates too.")] = 0.0,
    bn_target: Annotated[
        str, typer.Option(help="float: the float network's statistics; prior: beta and |gamma| (the paper's form).")
    ] = "float",
    group: Annotated[int | None, typer.Option(help="A weight scale for each so many inputs of a linear's or embedding's channel.")] = None,
    memory: Memory = "2GiB",
    cache: Cache = True,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    interpolation: Interpolation = "bilinear",
    columns: Columns = None,
    length: Length = None,
    stride: Stride = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    threads: Threads = None,
    metric: MetricOption = None,
    device: Device = "cpu",
    task: Task = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """From a trained network, a few hundred inputs and a budget to a low-bit network, its scheme and a measured report."""
    with work():
        from anybit.roads.calibrate import calibrate
        from anybit.roads.result import save_all
        from anybit.runs.folder import check_free

        check_free(output, overwrite)
        _set_threads(threads)
        results = calibrate(
            _require(model, "--model"),
            _require(data, "--data"),
            list(budget) if budget else None,
            weights=weights,
            preprocessing=_preprocessing(mean, std, size, resize, interpolation, columns, length, stride),
            test=test,
            metric=_metric(metric),
            workers=workers,
            device=device,
            cache=cache,
            weight_bits=_bits(weight_bits, "--weight-bits"),
            activation_bits=_bits(activation_bits, "--activation-bits"),
            keep=_kept(keep),
            pipeline=pipeline.value,
            parallel=parallel,
            sequential=sequential,
            bn_tuning=bn_tuning,
            bias_tuning=bias_tuning,
            tune_scales=tune_scales,
            samples=samples,
            held_out=held_out,
            rounding=rounding,
            steps=steps,
            candidate_steps=candidate_steps,
            step_batch=step_batch,
            unit=unit.value,
            blocks=tuple(block) if block else None,
            start=start,
            drop=drop,
            mirror=mirror,
            estimator=estimator.value,
            sensitivity_base=Precision.parse(sensitivity_base),
            pairs=pairs,
            alternatives=alternatives,
            bn_prior=bn_prior,
            bn_target=bn_target,
            memory=parse_size(memory),
            group=group,
            seed=seed,
            batch_size=batch_size,
            task=task,
        )
        folders = save_all(results, output, overwrite)
    _print_results(folders, as_json, quiet)


def _print_results(folders: list[Path], as_json: bool, quiet: bool) -> None:
    from anybit.reports.terminal import print_frontier, print_report, result_line
    from anybit.runs.report import read_report

    reports = [read_report(folder) for folder in folders]
    if as_json:
        summaries = [{"folder": str(folder), **_summary(report)} for folder, report in zip(folders, reports, strict=True)]
        print(json.dumps(summaries[0] if len(summaries) == 1 else {"runs": summaries}))
        return
    if not quiet:
        for report in reports:
            print_report(report)
        if len(reports) > 1:
            print_frontier(reports)
    for folder, report in zip(folders, reports, strict=True):
        print(f"{folder}: {result_line(report)}")


def _summary(report: dict) -> dict:
    return {key: report[key] for key in ("budget", "result", "test", "float_test") if key in report}


@app.command()
@told
def allocate(
    work: Work,
    run: Annotated[Path, typer.Argument(help="A run folder of calibrate.")],
    output: Output,
    budget: Budgets = None,
    data: Data = None,
    model: Model = None,
    batch_size: Annotated[int | None, typer.Option(help="Inputs a forward pass; the run's where left out.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory for captured activations; the run's where left out.")] = None,
    cache: Cache = True,
    workers: Workers = 0,
    threads: Threads = None,
    metric: MetricOption = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """New budgets from the candidates and table of a calibrate run, in seconds."""
    with work():
        from anybit.roads.allocate import allocate
        from anybit.roads.result import save_all
        from anybit.runs.folder import check_free

        check_free(output, overwrite)
        _set_threads(threads)
        room = parse_size(memory) if memory else None
        how = {"metric": _metric(metric), "device": device, "batch_size": batch_size, "memory": room, "cache": cache}
        _require(budget, "--budget")
        results = [allocate(run, one, data, model, workers, **how) for one in budget]
        folders = save_all(results if len(results) > 1 else results[0], output, overwrite)
    _print_results(folders, as_json, quiet)


@app.command()
@told
def grow(
    work: Work,
    output: Output,
    model: Model = None,
    weights: Weights = None,
    train: Annotated[str | None, typer.Option("--train", help="Labelled training data, named as for --data elsewhere.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Labelled data to report every epoch on; nothing is chosen on it.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Of weights: 3bit, 80kB, 12.5%.")] = None,
    scheme: Annotated[Path | None, typer.Option("--scheme", help="Instead of a budget: a run whose scheme is trained as it is.")] = None,
    method: Annotated[str | None, typer.Option(help="csq or lsq; lsq is of a --scheme, and the default with one.")] = None,
    activation_bits: Annotated[str, typer.Option(help="Bits of every layer's input, 2..8, or `float`.")] = "8",
    keep: Keep = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 10,
    planes: Annotated[int, typer.Option(help="Bit planes that a layer starts with; with the sign one bit more.")] = 7,
    per_channel: Annotated[bool, typer.Option("--per-channel", help="A scale for each output channel instead of each layer.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="A layer may lose all its planes.")] = False,
    strength: Annotated[float, typer.Option(help="Weight of the budget in the loss.")] = 0.3,
    anchor: Annotated[bool, typer.Option(help="Keep every layer's highest plane open until the planes are fixed.")] = True,
    ramp: Annotated[float, typer.Option(help="Share of the search in which the budget falls from all planes to the one given.")] = 0.8,
    weighting: Annotated[float, typer.Option(help="Power of a layer's weights that its planes are penalized by, 0 to 1.")] = 0.5,
    fix: Annotated[float, typer.Option(help="Share of the run after which the planes are fixed.")] = 0.15,
    harden: Annotated[float, typer.Option(help="Share of the run after which every weight's bits are fixed.")] = 0.9,
    phase: Annotated[str, typer.Option(help="How weights go on once the planes are fixed: restart, rewind or continue.")] = "restart",
    rate: Annotated[float, typer.Option(help="Learning rate of batch norm, biases, and of weights at a fixed scheme.")] = 1e-3,
    gate_rate: Annotated[float, typer.Option(help="Learning rate of weight gates.")] = 1e-2,
    plane_rate: Annotated[float, typer.Option(help="Learning rate of plane gates.")] = 1e-2,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Forget the trained weights; give --fix 0.6 --gate-rate 0.03 then.")
    ] = False,
    distill: Annotated[float, typer.Option(help="Weight of the float model's outputs in the loss, 0 to 1.")] = 0.0,
    augment: Annotated[str, typer.Option(help="Of pictures: flip, crop4 (shifts by up to 4 pixels), or both with a comma.")] = "",
    half: Annotated[bool, typer.Option("--half", help="Compute in bfloat16 where that is safe.")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the forward pass.")] = False,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    interpolation: Interpolation = "bilinear",
    columns: Columns = None,
    length: Length = None,
    stride: Stride = None,
    batch_size: Annotated[int, typer.Option(help="Inputs a training step, of all processes together.")] = 256,
    workers: Workers = 0,
    threads: Threads = None,
    metric: MetricOption = None,
    device: Device = "cpu",
    task: Task = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a network to a budget while its mixed-precision scheme grows; an interrupted run continues where it is started again."""
    with work():
        from anybit.loops.processes import rank
        from anybit.roads.grow import grow
        from anybit.runs.folder import check_free
        from anybit.runs.names import CHECKPOINT

        check_free(output, overwrite, unfinished=True)
        if overwrite and os.environ.get("RANK", "0") == "0":
            (output / CHECKPOINT).unlink(missing_ok=True)  # start anew
        _set_threads(threads)
        bits = _bits(activation_bits, "--activation-bits")
        if len(bits) != 1:
            raise InvalidSetting(f"--activation-bits {activation_bits}: grow trains one activation bit-width. Give one number, or float.")
        if budget is None and scheme is None:
            raise InvalidSetting("Say what the network should end at: --budget 3bit, or --scheme RUN for the scheme of a run.")
        result = grow(
            _require(model, "--model"),
            _require(train, "--train"),
            budget,
            scheme=scheme,
            weights=weights,
            preprocessing=_preprocessing(mean, std, size, resize, interpolation, columns, length, stride),
            test=test,
            metric=_metric(metric),
            checkpoint=output / CHECKPOINT,
            workers=workers,
            device=device,
            method=method,
            activation_bits=bits[0],
            keep=_kept(keep),
            epochs=epochs,
            planes=planes,
            per_channel=per_channel,
            prune=prune,
            strength=strength,
            anchor=anchor,
            ramp=ramp,
            weighting=weighting,
            fix=fix,
            harden=harden,
            phase=phase,
            rate=rate,
            gate_rate=gate_rate,
            plane_rate=plane_rate,
            from_scratch=from_scratch,
            distill=distill,
            augment=augment,
            half=half,
            compile=compile_,
            seed=seed,
            batch_size=batch_size,
            task=task,
        )
        if rank() != 0:  # one process of several writes
            return
        folder = result.save(output, overwrite=True)
    _print_results([folder], as_json, quiet)


@app.command()
@told
def train(
    work: Work,
    output: Output,
    model: Model = None,
    weights: Weights = None,
    train: Annotated[str | None, typer.Option("--train", help="Labelled training data, named as for --data elsewhere.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Labelled data to report every epoch on; nothing is chosen on it.")] = None,
    bits: Annotated[str, typer.Option(help="Bit-widths of weights and inputs, 2..8.")] = "2,4,6,8",
    keep: Keep = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 10,
    sandwich: Annotated[str, typer.Option(help="Networks of a step, in order: H highest, R random, L lowest bits.")] = "HRL",
    label: Annotated[str, typer.Option(help="one-hot, adaptive (online), or teacher (the wider network's outputs).")] = "one-hot",
    label_weight: Annotated[float, typer.Option(help="Share of the adaptive label, or of the teacher, in the loss.")] = 0.5,
    middle: Annotated[str, typer.Option(help="How R is drawn: uniform, worst, best or progressive.")] = "uniform",
    batch_norm: Annotated[
        str, typer.Option(help="reestimate: statistics anew for each subnet; switch: a batch norm for each bit-width of the layer.")
    ] = "reestimate",
    bn_images: Annotated[int, typer.Option(help="Training inputs that batch-norm statistics are estimated from.")] = 4096,
    held_out: Annotated[float, typer.Option(help="Share of the training data that is left to the search.")] = 0.1,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="A weight step for each layer instead of each channel.")] = False,
    rate: Annotated[float, typer.Option(help="Learning rate of weights, biases and batch norm.")] = 1e-3,
    step_rate: Annotated[float, typer.Option(help="Learning rate of the steps.")] = 1e-3,
    step_rates: Annotated[str | None, typer.Option(help="Factors on it for some bit-widths: 2=0.1,4=0.3.")] = None,
    offset_rate: Annotated[float, typer.Option(help="Learning rate of the inputs' offsets; 0 keeps them.")] = 0.0,
    distill: Annotated[float, typer.Option(help="Weight of the float model's outputs in the loss, 0 to 1.")] = 0.0,
    augment: Annotated[str, typer.Option(help="Of pictures: flip, crop4 (shifts by up to 4 pixels), or both with a comma.")] = "",
    half: Annotated[bool, typer.Option("--half", help="Compute in bfloat16 where that is safe.")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the forward pass.")] = False,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    interpolation: Interpolation = "bilinear",
    columns: Columns = None,
    length: Length = None,
    stride: Stride = None,
    batch_size: Annotated[int, typer.Option(help="Inputs a training step, of all processes together.")] = 256,
    workers: Workers = 0,
    threads: Threads = None,
    metric: MetricOption = None,
    device: Device = "cpu",
    task: Task = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train one network for every bit-width; `search` and `extract` take subnets from it. An interrupted run continues where it began."""
    with work():
        from anybit.loops.processes import rank
        from anybit.roads.train import train as roads_train
        from anybit.runs.folder import check_free
        from anybit.runs.names import CHECKPOINT

        check_free(output, overwrite, unfinished=True)
        if overwrite and os.environ.get("RANK", "0") == "0":
            (output / CHECKPOINT).unlink(missing_ok=True)  # start anew
        _set_threads(threads)
        supernet = roads_train(
            _require(model, "--model"),
            _require(train, "--train"),
            weights=weights,
            preprocessing=_preprocessing(mean, std, size, resize, interpolation, columns, length, stride),
            test=test,
            metric=_metric(metric),
            checkpoint=output / CHECKPOINT,
            workers=workers,
            device=device,
            bits=_widths(bits),
            keep=_kept(keep),
            epochs=epochs,
            sandwich=sandwich,
            label=label,
            label_weight=label_weight,
            middle=middle,
            batch_norm=batch_norm,
            bn_images=bn_images,
            held_out=held_out,
            per_channel=not per_tensor,
            rate=rate,
            step_rate=step_rate,
            step_rates=_factors(step_rates),
            offset_rate=offset_rate,
            distill=distill,
            augment=augment,
            half=half,
            compile=compile_,
            seed=seed,
            batch_size=batch_size,
            task=task,
        )
        if rank() != 0:  # one process of several writes
            return
        folder = supernet.save(output, overwrite=True)
    if as_json:
        report = supernet.report
        print(json.dumps({"folder": str(folder), **{key: report[key] for key in ("subnets", "test", "float_test") if key in report}}))
    else:
        from anybit.reports.terminal import print_supernet

        if not quiet:
            print_supernet(supernet.report)
        print(f"{folder}: a supernet of {', '.join(supernet.report['subnets'])}")


def _widths(text: str) -> tuple[int, ...]:
    bits = _bits(text, "--bits")
    if None in bits:
        raise InvalidSetting("--bits takes bit-widths alone: a float network has no step to train. Keep layers float with --keep.")
    return tuple(width for width in bits if width is not None)


def _factors(text: str | None) -> dict[int, float]:
    try:
        return {int(width): float(factor) for width, factor in (part.split("=") for part in text.split(","))} if text else {}
    except ValueError as error:
        raise InvalidSetting(f"--step-rates {text!r} cannot be read. Write bit-widths and factors: 2=0.1,4=0.3.") from error


@app.command()
@told
def search(
    work: Work,
    run: Annotated[Path, typer.Argument(help="A supernet's folder.")],
    output: Output,
    data: Data = None,
    budget: Annotated[list[str] | None, typer.Option("--budget", help="3bit, 80kB, 12.5%, bops=2.1G, latency=3ms; repeat.")] = None,
    evaluations: Annotated[int, typer.Option(help="Subnets that are evaluated.")] = 150,
    strategy: Annotated[str, typer.Option(help="monte-carlo, uniform or integer-program.")] = "monte-carlo",
    quantity: Annotated[str, typer.Option(help="The cost of the front: bits, bytes or bops.")] = "bits",
    images: Annotated[int, typer.Option(help="Held-out inputs a subnet is evaluated on; others measure the front again.")] = 2500,
    bn_images: Annotated[
        int | None, typer.Option(help="Training inputs that batch norm is estimated on while searching; left out, as many as in training.")
    ] = None,
    cache: Cache = True,
    seed: Seed = 0,
    model: Model = None,
    workers: Workers = 0,
    threads: Threads = None,
    metric: MetricOption = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """The best schemes of a supernet along the range of costs, and the best for each budget; what was evaluated once is not again."""
    with work():
        from anybit.roads.search import search
        from anybit.runs.folder import check_free

        check_free(output, overwrite)
        _set_threads(threads)
        wanted = {"evaluations": evaluations, "strategy": strategy, "quantity": quantity, "seed": seed}
        how = {
            "model": model,
            "images": images,
            "bn_images": bn_images,
            "metric": _metric(metric),
            "workers": workers,
            "device": device,
            "cache": cache,
        }
        found = search(run, data, budget or (), **how, **wanted)
        folder = found.save(output, overwrite)
    if as_json:
        told = {key: found.report[key] for key in ("budgets", "hypervolume", "rank_correlation", "recalled")}
        print(json.dumps({"folder": str(folder), **told}))
    else:
        from anybit.reports.terminal import print_search

        print_search(found.report, front=not quiet)
        print(f"{folder}: {len(found.report['front'])} schemes on the front of {len(found.report['evaluated'])} evaluated")


@app.command()
@told
def extract(
    work: Work,
    run: Annotated[Path, typer.Argument(help="A supernet's folder, or a search's.")],
    output: Output,
    budget: Annotated[str | None, typer.Option("--budget", help="The best known subnet that fits it.")] = None,
    scheme: Annotated[Path | None, typer.Option("--scheme", help="A run folder, or a JSON file of layer: precision.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Training inputs for batch-norm statistics; else stored ones.")] = None,
    polish: Annotated[bool, typer.Option("--polish", help="Then sequential AdaQuant, batch-norm and bias tuning on --data.")] = False,
    samples: Annotated[int, typer.Option(help="Inputs drawn to polish on.")] = 1024,
    steps: Annotated[int, typer.Option(help="Adam steps a unit when polishing.")] = 300,
    cache: Cache = True,
    test: Test = None,
    model: Model = None,
    workers: Workers = 0,
    threads: Threads = None,
    metric: MetricOption = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A subnet of a supernet or of a search as an ordinary run folder, polished by calibrate where that is asked for."""
    with work():
        from anybit.roads.extract import extract
        from anybit.runs.folder import check_free

        check_free(output, overwrite)
        _set_threads(threads)
        how = {"scheme": scheme, "data": data, "test": test, "model": model, "metric": _metric(metric), "workers": workers}
        wanted = {"polish": True, "samples": samples, "steps": steps, "cache": cache} if polish else {}
        folder = extract(run, budget, **how, **wanted).save(output, overwrite)
    _print_results([folder], as_json, quiet)


@app.command()
@told
def evaluate(
    work: Work,
    run: Annotated[Path | None, typer.Argument(help="A run folder; or give --model for the float network.")] = None,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    interpolation: Interpolation = "bilinear",
    columns: Columns = None,
    length: Length = None,
    stride: Stride = None,
    batch_size: BatchSize = 128,
    workers: Workers = 0,
    threads: Threads = None,
    metric: MetricOption = None,
    device: Device = "cpu",
    task: Task = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy and loss of a run, or of a float network, on labelled data."""
    with work():
        from anybit.roads.evaluate import evaluate
        from anybit.runs.opened import load, recorded_preprocessing, recorded_task
        from anybit.sources.inputs import load_data
        from anybit.sources.models import load_model, with_model_defaults
        from anybit.sources.preprocessing import overridden

        _set_threads(threads)
        given = _preprocessing(mean, std, size, resize, interpolation, columns, length, stride)
        if run is not None:
            network = load(run, model)
            preprocessing = overridden(recorded_preprocessing(run), given)
            task = task or recorded_task(run)
        else:
            network = load_model(_require(model, "RUN or --model"), weights, task)
            preprocessing = with_model_defaults(given, network)
        samples = load_data(_require(data, "--data"), preprocessing, workers, network)
        scores = evaluate(network, samples, _metric(metric), task, batch_size, device=device)
    if as_json:
        print(json.dumps(scores))
    else:
        from anybit.reports.terminal import scores_line

        print(scores_line(scores))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, of any roads; one that holds several runs counts as each of them.")],
    output: Annotated[Path, typer.Option("--output", help="The HTML file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Several runs side by side on one page that asks nothing of the network."""
    with _reported_errors():
        from anybit.reports.page import report

        print(report(*runs, output=output, overwrite=overwrite))


@app.command()
@told
def export(
    work: Work,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    onnx: Annotated[Path | None, typer.Option("--onnx", help="The file to write, for ONNX Runtime and others.")] = None,
    compressed_tensors: Annotated[
        Path | None, typer.Option("--compressed-tensors", help="The folder to write, for transformers: Hugging Face networks.")
    ] = None,
    data: RunData = None,
    model: Model = None,
    tables: Annotated[bool, typer.Option("--tables", help="SiLU, GELU and the like as tables of codes: exact, slower.")] = False,
    weight_only: Annotated[bool, typer.Option("--weight-only", help="Linears with float inputs run on packed weights.")] = False,
    pack_embeddings: Annotated[bool, typer.Option("--pack-embeddings", help="In the folder too; transformers 5 cannot load it.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a run as an ONNX file, with packed weights and integer kernels when it runs, or as a folder that transformers loads."""
    with work():
        if (onnx is None) == (compressed_tensors is None):
            raise InvalidSetting("Name what to write: --onnx FILE, or --compressed-tensors FOLDER.")
        if compressed_tensors is not None and (tables or weight_only or data):
            raise InvalidSetting("--tables, --weight-only and --data belong to --onnx; a folder of compressed-tensors takes none of them.")
        if onnx is not None and pack_embeddings:
            raise InvalidSetting("--pack-embeddings belongs to --compressed-tensors; an ONNX file packs them always.")
        if compressed_tensors is not None:
            from anybit.exports.compressed_tensors import export_folder

            found = export_folder(run, compressed_tensors, model=model, embeddings=pack_embeddings, overwrite=overwrite)
        else:
            from anybit.exports.verbs import export

            found = export(run, onnx, model=model, data=data, tables=tables, weight_only=weight_only, overwrite=overwrite)
    if as_json:
        print(json.dumps(found))
        return
    if compressed_tensors is not None:
        from anybit.reports.terminal import print_folder

        print_folder(found, details=not quiet)
        return
    from anybit.reports.words import human_bytes

    over = 100 * (found["bytes"] / found["ideal_bytes"] - 1) if found["ideal_bytes"] else 0
    print(f"{onnx}: {human_bytes(found['bytes'])}, {over:.1f} % above the {human_bytes(found['ideal_bytes'])} of its weights' bits")
    if quiet:
        return
    print(f"{found['integer_layers']} of {found['layers']} layers on integers")
    if found["measured_edges"]:
        count = len(found["measured_edges"])
        print(f"{count} tensors between operators have no range in the run: it was measured on the inputs of this export.")


@app.command()
@told
def verify(
    work: Work,
    run: Annotated[Path, typer.Argument(help="The run folder that was exported.")],
    exported: Annotated[Path, typer.Argument(help="The exported file or folder.")],
    data: RunData = None,
    samples: Annotated[int | None, typer.Option(help="Inputs to run, the first of the data (default: all).")] = None,
    model: Model = None,
    metric: MetricOption = None,
    workers: Workers = 0,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check an exported file or folder against its run: contents, integer kernels, numbers. Exit status 1 where a promise fails."""
    with work():
        _set_threads(threads)
        how = {"model": model, "data": data, "samples": samples, "metric": _metric(metric), "workers": workers}
        if exported.is_dir():
            from anybit.exports.compressed_tensors import verify_folder

            found = verify_folder(run, exported, **how)
        else:
            from anybit.exports.verbs import verify

            found = verify(run, exported, **how)
    if as_json:
        print(json.dumps(found))
    elif exported.is_dir():
        from anybit.reports.terminal import print_folder_verdict

        print_folder_verdict(found, numbers=not quiet)
    else:
        from anybit.reports.terminal import print_verdict

        print_verdict(found, numbers=not quiet)
    raise typer.Exit(0 if found["ok"] else 1)


@app.command()
@told
def bench(
    work: Work,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    onnx: Annotated[Path | None, typer.Argument(help="The exported file (default: what the run would be exported as).")] = None,
    data: RunData = None,
    model: Model = None,
    rounds: Annotated[int, typer.Option(help="Turns of float32 and exported, each about a twentieth of a second.")] = 20,
    batch_size: BatchSize = 1,
    threads: Annotated[int, typer.Option(help="Processor threads of the runtime.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Size of the exported file against its bits, and latency against the same runtime's float32 file, in turns."""
    with work():
        from anybit.exports.verbs import bench

        found = bench(run, onnx, model=model, data=data, rounds=rounds, batch_size=batch_size, threads=threads)
    if as_json:
        print(json.dumps(found))
    else:
        from anybit.reports.terminal import print_bench

        print_bench(found)


@app.command()
@told
def profile(
    work: Work,
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    keep: Keep = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    interpolation: Interpolation = "bilinear",
    columns: Columns = None,
    length: Length = None,
    stride: Stride = None,
    rounds: Annotated[int, typer.Option(help="Turns of float32, 8 bits and alternating, each about a twentieth of a second.")] = 20,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again what was measured before.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """How long each layer takes in float and on integers on this machine: the table behind --budget latency=3ms."""
    with work():
        from anybit.exports.verbs import profile

        given = _preprocessing(mean, std, size, resize, interpolation, columns, length, stride)
        found = profile(
            _require(model, "--model"),
            _require(data, "--data"),
            weights=weights,
            preprocessing=given,
            keep=_kept(keep),
            rounds=rounds,
            overwrite=overwrite,
        )
    if as_json:
        print(json.dumps(found))
    else:
        from anybit.reports.terminal import print_profile

        print_profile(found, layers=not quiet)


@app.command()
def inspect(
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    weight_bits: Annotated[str, typer.Option(help="Bit-widths to count.")] = "2,3,4,6,8",
    keep: Keep = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    interpolation: Interpolation = "bilinear",
    columns: Columns = None,
    length: Length = None,
    stride: Stride = None,
    task: Task = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Layers, shapes, what is covered, and what each bit-width would cost; --data shows shapes of inputs and outputs, and BOPs."""
    with _reported_errors():
        from anybit.roads.inspect import inspect
        from anybit.sources.inputs import load_data
        from anybit.sources.models import load_model, with_model_defaults

        _set_threads(threads)
        network = load_model(_require(model, "--model"), weights, task)
        given = with_model_defaults(_preprocessing(mean, std, size, resize, interpolation, columns, length, stride), network)
        samples = None if data is None else load_data(data, given, model=network)
        found = inspect(network, samples, weight_bits=_bits(weight_bits, "--weight-bits"), keep=_kept(keep))
    if as_json:
        print(json.dumps(found))
    else:
        from anybit.reports.terminal import print_inspection

        print_inspection(found, layers=not quiet)


@app.command()
def diff(
    run: Annotated[Path, typer.Argument(help="A run folder, of any road.")],
    run2: Annotated[Path, typer.Argument(help="Another.")],
    as_json: AsJson = False,
) -> None:
    """What differs between two runs: settings, versions, references, bits, size, errors, accuracy, and whether the weights are the same."""
    with _reported_errors():
        from anybit.reports.comparison import diff

        found = diff(run, run2)
    if as_json:
        print(json.dumps(found))
    else:
        from anybit.reports.terminal import print_difference

        print_difference(found)


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    layer: Annotated[str, typer.Argument(help="One of its layers.")],
    as_json: AsJson = False,
) -> None:
    """Why a layer has its bits: what each precision would lose and cost, the shadow price, one step more or less, reconstruction errors."""
    with _reported_errors():
        from anybit.reports.explanation import explain

        found = explain(run, layer)
    if as_json:
        print(json.dumps(found))
    else:
        from anybit.reports.terminal import print_explanation

        print_explanation(found)


@app.command()
def cache(
    trim: Annotated[str | None, typer.Option(help="Remove the least recently used results until so much is left: 500MB, 0B.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every result; name and remove the damaged ones.")] = False,
    as_json: AsJson = False,
) -> None:
    """Results that were kept to be taken up again: where they are, how much they take; --trim makes room."""
    with _reported_errors():
        from anybit.files.cache import LIMIT, entries, remove_damaged, results_folder, trim_cache

        folder = results_folder()
        removed = 0 if trim is None else trim_cache(folder, parse_size(trim))
        damaged = remove_damaged(folder) if check else {}
        kept = entries(folder)
    found = {
        "folder": str(folder), "results": len(kept), "bytes": sum(entry.bytes for entry in kept), "limit": LIMIT,
        "removed_bytes": removed, "damaged": {str(path): reason for path, reason in damaged.items()},
    }  # fmt: skip
    if as_json:
        print(json.dumps(found))
    else:
        from anybit.reports.terminal import print_cache

        print_cache(found)


def main() -> None:
    """Entry point of the `anybit` command."""
    warnings.formatwarning = lambda message, *where, **line: f"warning: {printable(' '.join(str(message).split()))}\n"
    app()
