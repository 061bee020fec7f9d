"""The epoch loop that the training roads share: batches, augmentation, distillation, checkpoints, several processes.

Every epoch draws its order and its augmentation from (seed, epoch) alone. A run that resumes from a checkpoint therefore ends with the
same bytes as an uninterrupted one, and several processes see the batches that one would. (A data set with its own augmentation draws from
torch's generator, seeded by seed, epoch and process; other generators are not seeded.)

Of several processes (`torchrun` or `accelerate launch`, which set the same environment), each takes its share of every batch, and
gradients are averaged. The model is not wrapped: the values that a method sets on its modules are the ones that run. Batch norm sees each
process's own share of a batch; running statistics are averaged after every epoch.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from anybit.data.augment import augmented, border_of, channels_last
from anybit.data.batches import Batch, first_tensor, naming_sample, predict
from anybit.data.samples import Samples, draw
from anybit.data.tasks import Task, correct, named_task, task_loss
from anybit.errors import AnybitError, InvalidInput, InvalidSetting
from anybit.loops.checkpoint import resume_checkpoint, save_checkpoint
from anybit.loops.processes import average, average_gradients, average_tensors, rank, world
from anybit.loops.settings import TrainSettings
from anybit.loops.trainee import SMALLEST_GAMMA, Trainee
from anybit.networks.norms import BATCH_NORMS
from anybit.progress import inside, tell, track

UPDATE = 3
"""Forward passes equal to an update of a sample."""


def train_epochs(
    trainee: Trainee,
    samples: Samples,
    settings: TrainSettings,
    task: Task | str,
    teacher: nn.Module | None = None,
    positive: Sequence[nn.Parameter] = (),
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    watch: Callable[[], dict[str, Any]] | None = None,
    passes: int = 0,
) -> list[dict[str, Any]]:
    """Train in place; returns one record per epoch.

    teacher     the float model, for distillation
    positive    parameters that are kept above zero
    checkpoint  file that is written after every epoch, and resumed from if it exists; `identity` are the settings that must agree
    watch       called after each epoch; its result is added to the record. `passes` is how many samples it passes forward, for the progress
    """
    if settings.half and emulates_bfloat16(next(trainee.model.parameters()).device):
        tell("note", note="this processor emulates bfloat16, which is slower than float32: leave --half out")
    groups = trainee.parameter_groups()
    forward = cast(nn.Module, torch.compile(trainee.model)) if settings.compile else trainee.model
    steps, rates = _steps(samples, settings, trainee.model), [group["lr"] for group in groups]
    run = _Run(trainee, settings, named_task(task), teacher, positive, forward, torch.optim.Adam(groups), rates, steps, checkpoint)
    records: list[dict[str, Any]] = []
    if checkpoint is not None and checkpoint.is_file():
        records = resume_checkpoint(checkpoint, trainee, run.optimizer, identity or {})
    share = UPDATE * len(samples) / (UPDATE * len(samples) + passes)  # of an epoch's time in its updates
    for epoch in track(range(len(records), settings.epochs), "training", lambda epoch: f"epoch {epoch + 1}"):
        began = time.monotonic()
        record = {"epoch": epoch + 1, **_epoch(run, samples, epoch, share), **trainee.summary()}
        trained = time.monotonic()
        records.append(record | (watch() if watch else {}))
        share = (trained - began) / max(time.monotonic() - began, 1e-9)
        tell("epoch", **records[-1], note=summary(records[-1], settings.epochs))
        if checkpoint is not None and rank() == 0:
            save_checkpoint(checkpoint, trainee, run.optimizer, records, identity or {})
    return records


@dataclass(frozen=True)
class _Run:
    """Hold the parts of a run that stay the same from epoch to epoch; `rates` are the groups' full learning rates."""

    trainee: Trainee
    settings: TrainSettings
    task: Task
    teacher: nn.Module | None
    positive: Sequence[nn.Parameter]
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    rates: Sequence[float]
    steps: int
    checkpoint: Path | None


def _epoch(run: _Run, samples: Samples, epoch: int, share: float = 1.0) -> dict[str, Any]:
    """Run one epoch, whose steps take `share` of its time; returns mean loss and, of labelled classes, training accuracy in percent."""
    model = run.trainee.model.train()
    results: list[Tensor] = []
    for step, batch in enumerate(_all_of(epoch_batches(samples, run.settings, epoch), run.steps, epoch)):
        inside(share * step, run.steps)
        results.append(_step(run, channels_last(batch), (epoch + step / run.steps) / run.settings.epochs))
        if not torch.isfinite(results[-1]).all():
            task, penalty, _ = results[-1].tolist()
            raise AnybitError(f"The loss became {task:g} (penalty {penalty:g}) in {_where(run, epoch, step)}")
    broken = [name for name, tensor in model.named_parameters() if torch.isnan(tensor).any()]
    if broken:  # by the last update, after which no loss was computed: do not store it
        raise AnybitError(f"{broken[0]} became NaN in {_where(run, epoch, run.steps - 1)}")
    average_tensors(run.trainee.state().values())
    run.trainee.end_of_epoch()
    average_tensors(model.buffers())
    if epoch + 1 == run.settings.epochs:
        run.trainee.before_step(1.0)
    loss, _, right = torch.stack(results).mean(0).tolist()
    labelled = run.task.of_one_class and samples.labelled
    return {"loss": loss, "train_top1": 100 * right if labelled else None}


def _step(run: _Run, batch: Batch, progress: float) -> Tensor:
    """Update once, unless a loss is not finite; returns (loss, penalty, share of right answers), means over passes and processes."""
    for parameter in run.trainee.before_step(progress):
        run.optimizer.state.pop(parameter, None)
    for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
        group["lr"] = rate * learning_rate(progress, run.settings.warmup)
    run.optimizer.zero_grad(set_to_none=True)
    results: list[Tensor] = []
    for _ in run.trainee.passes():
        results.append(_pass(run, batch))
        if not torch.isfinite(results[-1]).all():
            return results[-1]
    average_gradients(run.trainee.model)
    run.optimizer.step()
    with torch.no_grad():
        for parameter in run.positive:
            parameter.clamp_(min=SMALLEST_GAMMA)
    return torch.stack(results).mean(0)


def _pass(run: _Run, batch: Batch) -> Tensor:
    """Add one pass's gradients, unless its loss is not finite; returns the numbers of `_step` for this pass."""
    with _autocast(run.settings, batch):
        with naming_sample(run.forward, batch, "a training batch"):
            outputs = predict(run.forward, batch)
        loss = run.trainee.loss(outputs, batch, task_loss(outputs, batch, run.task, run.teacher, run.settings.distill))
    penalty = run.trainee.penalty().to(loss.device)
    labels = batch.labels if run.task.of_one_class else None
    right = correct(run.task.judged(outputs), labels).float().mean() if isinstance(labels, Tensor) else torch.zeros_like(loss)
    results = average(
        torch.stack([loss.detach().float(), penalty.detach(), right.detach()])
    )  # averaged, so that all processes stop together
    if torch.isfinite(results).all():
        (loss + penalty).backward()
    return results


def _where(run: _Run, epoch: int, step: int) -> str:
    resumable = f" The checkpoint of epoch {epoch} is in {run.checkpoint}." if run.checkpoint and epoch else ""
    advice = "Look for invalid inputs, or start again (--overwrite) with lower learning rates."
    return f"epoch {epoch + 1}, step {step + 1} of {run.steps}.{resumable} {advice}"


def summary(record: Mapping[str, Any], epochs: int) -> str:
    """Write an epoch's record as one line."""
    parts = [f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}"]
    for kind in ("soft", "frozen"):
        parts += [f"{kind} {key} {record[kind][key]:.4g}" for key in ("top1", "loss") if key in record.get(kind, {})][:1]
    if not {"frozen", "widths"} & set(record) and record["train_top1"] is not None:
        parts.append(f"training top1 {record['train_top1']:.4g}")
    above = record.get("above_budget")
    if "weight_bits" in record:
        parts.append(f"{record['weight_bits']:.2f} bits" + ("" if above is None else f" ({above:+.2f} to the budget)"))
    for width, scores in record.get("widths", {}).items():
        parts += [f"{width} {key} {scores[key]:.4g}" for key in ("top1", "loss") if key in scores][:1]
    if "undecided" in record:
        parts.append(f"{100 * record['undecided']:.1f} % of gates undecided, temperature {record['temperature']:.3g}")
    return ", ".join(parts)


def learning_rate(progress: float, warmup: float) -> float:
    """Return the factor on every learning rate: linear warm-up to 1, then a cosine to 0."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def emulates_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 convolutions are known to be slower than float32 there: on x86 processors without AVX-512."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return able.get("architecture") == "x86_64" and not (able.get("avx512_bw") or able.get("avx_ne_convert"))


def _autocast(settings: TrainSettings, batch: Batch):
    if not settings.half:
        return nullcontext()
    return torch.autocast(first_tensor(batch.inputs).device.type, dtype=torch.bfloat16)


# Batches


def _steps(samples: Samples, settings: TrainSettings, model: nn.Module) -> int:
    """Return the number of full batches per epoch; if there is none, the whole data set is one batch."""
    if len(samples) == 0:
        raise InvalidInput("The training data is empty.")
    size = min(settings.batch_size, len(samples))
    if size % world():
        fitting = size // world() * world()
        advice = f"Give --batch-size={fitting}, a multiple of {world()}" if fitting else "Use fewer processes"
        raise InvalidSetting(f"batch size {size} does not divide among {world()} processes. {advice}.")
    if settings.batch_size // world() < 2 and any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise InvalidSetting(f"batch size {settings.batch_size} leaves batch norm one sample per process. Choose at least {2 * world()}.")
    return max(1, len(samples) // settings.batch_size)


def epoch_batches(samples: Samples, settings: TrainSettings, epoch: int, share: tuple[int, int] | None = None) -> Iterator[Batch]:
    """Yield this process's share of every full batch of an epoch, shuffled and augmented by (seed, epoch) alone.

    `share` is (index, number) of a process other than this one: (0, 1) yields everything.
    """
    which, of = (rank(), world()) if share is None else share
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    size = min(settings.batch_size, len(samples))
    count = len(samples) // size
    order = torch.randperm(len(samples), generator=generator)[: count * size].view(count, size)
    mine = order[:, which::of].flatten().tolist()
    seed = (settings.seed * 100_003 + epoch) * of + which
    torch.manual_seed(seed)  # for data sets that augment by themselves, and for dropout
    border = border_of(samples, settings.augment, settings.border, settings.seed)
    for batch in replace(samples, seed=seed).subset(mine).batches(size // of):
        yield augmented(batch, settings.augment, size, generator, (which, of), border)


def drawn_batches(samples: Samples, settings: TrainSettings, count: int) -> list[Batch]:
    """Return `count` training inputs, drawn once and augmented as in training, in batches of one size; the same in every process."""
    with torch.random.fork_rng(devices=[]):
        few = replace(settings, batch_size=min(settings.batch_size, 256))
        return list(epoch_batches(draw(samples, count, settings.seed), few, -1, share=(0, 1)))


def _all_of(batches: Iterator[Batch], steps: int, epoch: int) -> Iterator[Batch]:
    """Yield the batches. Raises InvalidInput, naming epoch and batch, if the data fails before `steps` of them."""
    seen = 0
    try:
        for batch in batches:
            yield batch
            seen += 1
    except InvalidInput as error:
        raise InvalidInput(f"The training stopped after {seen} of {steps} batches of epoch {epoch + 1}. {error}") from error
