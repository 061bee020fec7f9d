"""The epoch loop that the training roads share: batches, augmentation, distillation, checkpoints, several processes.

Every epoch draws its order and its augmentation from (seed, epoch) alone, so a run that is continued from a checkpoint ends with the same
bytes as one that was never stopped, and several processes see the batches that one would. (A data set that augments by itself draws from
torch's generator, seeded by seed, epoch and process; of other generators nothing is known here.)

On several processes (`torchrun` or `accelerate launch`; both set the same environment) each takes its share of every batch, and gradients
are averaged. There is no wrapper around the model: what a method sets on its modules is what runs. Batch norm sees each process's own
share of a batch; running statistics are averaged after every epoch.
"""

import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor, nn

from anybit.batches import Batch, Samples, first_tensor, predict
from anybit.checkpoint import check_state
from anybit.cost import spec_of
from anybit.errors import AnybitError, InvalidFile, InvalidInput, InvalidSetting
from anybit.evaluation import check_labels, compares_classes
from anybit.files import DIGEST, check_version, parse_json, read_header, read_tensors, validated, whole_file
from anybit.packing import TensorSpec
from anybit.processes import average, average_gradients, average_tensors, rank, world
from anybit.progress import tell, track
from anybit.wiring import BATCH_NORMS

SMALLEST_GAMMA = 1e-5
TRAINED_ON_CLASSES = ("classification", "language-model")


class Trainee(Protocol):
    """What a method tells the loop. `model` is prepared and unfolded; nothing else of it is known here."""

    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adam's groups: params and lr."""

    def at(self, progress: float) -> list[nn.Parameter]:
        """Called before each step with the share of the run that is done; returns parameters that it set anew, whose momentum is void."""

    def end_epoch(self) -> None:
        """Called after each epoch."""

    def passes(self) -> Iterator[None]:
        """Set the network for one forward and backward pass after another; their gradients are summed into one update."""

    def loss(self, outputs: Tensor, batch: Batch, task_loss: Tensor) -> Tensor:
        """The loss of a pass, 0-d, given the task's."""

    def penalty(self) -> Tensor:
        """Added to each pass's loss, 0-d."""

    def record(self) -> dict[str, Any]:
        """What an epoch's record tells of the method."""

    def state(self) -> dict[str, Tensor]:
        """Tensors of the method's own: averaged over the processes before `end_epoch`, kept in checkpoints."""

    def decisions(self) -> dict[str, Any]:
        """What was decided on the way, as JSON."""

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """Take `decisions` back."""

    def freeze(self, model: nn.Module) -> None:
        """Put uniform quantizers into the slots of `model`, a copy of its own."""


@dataclass(frozen=True)
class TrainSettings:
    """epochs, batch_size (of all processes together), seed
    warmup         share of the run in which learning rates rise; afterwards they fall to zero along a cosine
    augment        of 4-d inputs: "flip" (mirror images), "crop4" (shifts by up to 4 pixels), joined by commas
    distill        weight of the divergence from the float model's outputs in the loss; the rest is the labels'
    half           compute in bfloat16 where autocast finds it safe
    compile        compile the training step's forward pass
    """

    epochs: int = 10
    batch_size: int = 256
    seed: int = 0
    warmup: float = 0.05
    augment: str = ""
    distill: float = 0.0
    half: bool = False
    compile: bool = False

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1:
            raise InvalidSetting(f"epochs {self.epochs} and batch size {self.batch_size} must be at least 1.")
        if not 0 <= self.distill <= 1 or not 0 <= self.warmup < 1:
            raise InvalidSetting(f"distill {self.distill} must be from 0 to 1, warmup {self.warmup} from 0 to below 1.")
        _augmentations(self.augment)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train(
    trainee: Trainee,
    samples: Samples,
    settings: TrainSettings,
    task: str,
    teacher: nn.Module | None = None,
    positive: Sequence[nn.Parameter] = (),
    checkpoint: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    watch: Callable[[], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Train in place; returns one record an epoch.

    teacher     the float model, for distillation
    positive    parameters that are kept above zero
    checkpoint  file that is written after every epoch and continued from where it is found; `identity` are the settings that must agree
    watch       called after each epoch; what it returns joins the record
    """
    if settings.half and emulates_bfloat16(next(trainee.model.parameters()).device):
        tell("note", note="this processor emulates bfloat16, which is slower than float32: leave --half out")
    groups = trainee.parameter_groups()
    forward = torch.compile(trainee.model) if settings.compile else trainee.model
    steps, rates = _steps(samples, settings, trainee.model), [group["lr"] for group in groups]
    run = _Run(trainee, settings, task, teacher, positive, forward, torch.optim.Adam(groups), rates, steps, checkpoint)
    records: list[dict[str, Any]] = []
    if checkpoint is not None and checkpoint.is_file():
        records = _resume(checkpoint, trainee, run.optimizer, identity or {})
    for epoch in track(range(len(records), settings.epochs), "epochs"):
        record = {"epoch": epoch + 1, **_epoch(run, samples, epoch), **trainee.record()}
        records.append(record | (watch() if watch else {}))
        tell("epoch", **records[-1], note=summary(records[-1], settings.epochs))
        if checkpoint is not None and rank() == 0:
            _save(checkpoint, trainee, run.optimizer, records, identity or {})
    return records


@dataclass(frozen=True)
class _Run:
    """What does not change from epoch to epoch; `rates` are the groups' full learning rates."""

    trainee: Trainee
    settings: TrainSettings
    task: str
    teacher: nn.Module | None
    positive: Sequence[nn.Parameter]
    forward: Callable
    optimizer: torch.optim.Optimizer
    rates: Sequence[float]
    steps: int
    checkpoint: Path | None


def _epoch(run: _Run, samples: Samples, epoch: int) -> dict[str, Any]:
    """Every batch once; returns mean loss and, of a classifier with labels, training accuracy in percent."""
    model = run.trainee.model.train()
    told: list[Tensor] = []
    for step, batch in enumerate(_all_of(epoch_batches(samples, run.settings, epoch), run.steps, epoch)):
        told.append(_step(run, batch, (epoch + step / run.steps) / run.settings.epochs))
        if not torch.isfinite(told[-1]).all():
            task, penalty, _ = told[-1].tolist()
            raise AnybitError(f"The loss became {task:g} (penalty {penalty:g}) in {_where(run, epoch, step)}")
    broken = [name for name, tensor in model.named_parameters() if torch.isnan(tensor).any()]
    if broken:  # the last update's doing, which no loss has shown yet: not to be kept
        raise AnybitError(f"{broken[0]} became NaN in {_where(run, epoch, run.steps - 1)}")
    average_tensors(run.trainee.state().values())
    run.trainee.end_epoch()
    average_tensors(model.buffers())
    if epoch + 1 == run.settings.epochs:
        run.trainee.at(1.0)
    loss, _, right = torch.stack(told).mean(0).tolist()
    labelled = run.task in TRAINED_ON_CLASSES and samples.labelled
    return {"loss": loss, "train_top1": 100 * right if labelled else None}


def _step(run: _Run, batch: Batch, progress: float) -> Tensor:
    """One update, unless a loss is no number; returns (loss, penalty, share of right answers), means over passes and processes."""
    for parameter in run.trainee.at(progress):
        run.optimizer.state.pop(parameter, None)
    for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
        group["lr"] = rate * learning_rate(progress, run.settings.warmup)
    run.optimizer.zero_grad(set_to_none=True)
    told: list[Tensor] = []
    for _ in run.trainee.passes():
        told.append(_pass(run, batch))
        if not torch.isfinite(told[-1]).all():
            return told[-1]
    average_gradients(run.trainee.model)
    run.optimizer.step()
    with torch.no_grad():
        for parameter in run.positive:
            parameter.clamp_(min=SMALLEST_GAMMA)
    return torch.stack(told).mean(0)


def _pass(run: _Run, batch: Batch) -> Tensor:
    """Add one pass's gradients, unless its loss is no number; returns what `_step` does, of this pass."""
    with _autocast(run.settings, batch):
        outputs = predict(run.forward, batch)
        loss = run.trainee.loss(outputs, batch, task_loss(outputs, batch, run.task, run.teacher, run.settings.distill))
    penalty = run.trainee.penalty().to(loss.device)
    classes = run.task in TRAINED_ON_CLASSES and batch.labels is not None
    right = (outputs.argmax(-1) == batch.labels).float().mean() if classes else torch.zeros_like(loss)
    told = average(torch.stack([loss.detach().float(), penalty.detach(), right.detach()]))  # of all, so that all stop together
    if torch.isfinite(told).all():
        (loss + penalty).backward()
    return told


def _where(run: _Run, epoch: int, step: int) -> str:
    kept = f" The checkpoint of epoch {epoch} is kept in {run.checkpoint}." if run.checkpoint and epoch else ""
    advice = "Look for broken inputs, or start anew (--overwrite) with lower learning rates."
    return f"epoch {epoch + 1}, step {step + 1} of {run.steps}.{kept} {advice}"


def summary(record: Mapping[str, Any], epochs: int) -> str:
    """An epoch's record in one line."""
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
    """Factor on every learning rate: a line up to 1, then a cosine down to 0."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def task_loss(outputs: Tensor, batch: Batch, task: str, teacher: nn.Module | None, distill: float) -> Tensor:
    """Cross-entropy of a classifier (squared error of a regression), joined by the divergence from the teacher's outputs."""
    loss = torch.zeros((), device=outputs.device)
    classes = task in TRAINED_ON_CLASSES
    if distill < 1 and task not in (*TRAINED_ON_CLASSES, "regression"):
        raise InvalidSetting(f"A network for {task} is trained on the float network's outputs alone here: give --distill 1.")
    if distill < 1:
        if batch.labels is None:
            raise InvalidInput("Training needs labels, and this data has none. Give labelled data, or --distill 1.")
        labels = batch.labels
        check_labels(outputs, labels, task)
        loss = F.cross_entropy(outputs.float(), labels) if classes else F.mse_loss(outputs.float().flatten(), labels.float().flatten())
        loss = (1 - distill) * loss
    if distill > 0:
        with torch.no_grad():
            target = predict(teacher, batch).float()
        if compares_classes(task):
            apart = F.kl_div(F.log_softmax(outputs.float(), -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean")
        else:
            apart = F.mse_loss(outputs.float(), target)
        loss = loss + distill * apart
    return loss


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether convolutions in bfloat16 are known to be slower than in float32 there: on x86 processors without AVX-512."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return able.get("architecture") == "x86_64" and not (able.get("avx512_bw") or able.get("avx_ne_convert"))


def _autocast(settings: TrainSettings, batch: Batch):
    if not settings.half:
        return nullcontext()
    return torch.autocast(first_tensor(batch.inputs).device.type, dtype=torch.bfloat16)


# Batches


def _steps(samples: Samples, settings: TrainSettings, model: nn.Module) -> int:
    """Full batches an epoch; where there is not one, the whole set is the batch."""
    if len(samples) == 0:
        raise InvalidInput("The training data is empty.")
    if settings.batch_size % world() or (len(samples) < settings.batch_size and len(samples) % world()):
        raise InvalidSetting(f"batch size {settings.batch_size} does not divide among {world()} processes. Choose a multiple of {world()}.")
    if settings.batch_size // world() < 2 and any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise InvalidSetting(f"batch size {settings.batch_size} leaves batch norm one sample a process. Choose at least {2 * world()}.")
    return max(1, len(samples) // settings.batch_size)


def epoch_batches(samples: Samples, settings: TrainSettings, epoch: int, share: tuple[int, int] | None = None) -> Iterator[Batch]:
    """This process's share of every full batch of an epoch, shuffled and augmented by (seed, epoch) alone.

    `share` is (which process, of how many), where it is not this one: (0, 1) gives everything.
    """
    which, of = (rank(), world()) if share is None else share
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    size = min(settings.batch_size, len(samples))
    count = len(samples) // size
    order = torch.randperm(len(samples), generator=generator)[: count * size].view(count, size)
    mine = order[:, which::of].flatten().tolist()
    seed = (settings.seed * 100_003 + epoch) * of + which
    torch.manual_seed(seed)  # for data sets that augment by themselves, and for dropout
    for batch in replace(samples, seed=seed).subset(mine).batches(size // of):
        yield channels_last(augmented(batch, settings.augment, size, generator, (which, of)))


def _all_of(batches: Iterator[Batch], steps: int, epoch: int) -> Iterator[Batch]:
    """The batches; raises InvalidInput where they end before `steps` of them came."""
    seen = 0
    try:
        for batch in batches:
            yield batch
            seen += 1
    except IndexError as error:
        raise InvalidInput(
            f"The training data ended after {seen} of {steps} batches in epoch {epoch + 1}: it has fewer samples than its length says, or "
            f"its __getitem__ is at fault ({error}). Repair it."
        ) from error


def augmented(batch: Batch, augment: str, global_size: int, generator: torch.Generator, share: tuple[int, int] = (0, 1)) -> Batch:
    """The batch with each of its pictures mirrored or shifted at random; the draws are of the global batch, of which this is a `share`."""
    inputs, (which, of) = batch.inputs, share
    for kind, pixels in _augmentations(augment):
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            raise InvalidSetting(f"augment {augment!r} needs pictures: one 4-d input tensor. Leave it off for this data.")
        if kind == "flip":
            flips = torch.rand(global_size, generator=generator)[which::of] < 0.5
            inputs = inputs.clone()
            inputs[flips] = inputs[flips].flip(-1)
        else:
            shifts = torch.randint(0, 2 * pixels + 1, (global_size, 2), generator=generator)[which::of].tolist()
            padded, (height, width) = F.pad(inputs, (pixels,) * 4), inputs.shape[-2:]
            inputs = torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, shifts, strict=True)])
    return replace(batch, inputs=inputs)


def channels_last(batch: Batch) -> Batch:
    """Pictures with their channels innermost in memory: convolutions hand the layout on."""
    if isinstance(batch.inputs, Tensor) and batch.inputs.dim() == 4:
        return replace(batch, inputs=batch.inputs.contiguous(memory_format=torch.channels_last))
    return batch


def _augmentations(text: str) -> list[tuple[str, int]]:
    """[("flip", 0), ("crop", 4)] of "flip,crop4"."""
    found = []
    for part in filter(None, text.split(",")):
        if part == "flip":
            found.append(("flip", 0))
        elif part.startswith("crop") and part[4:].isdigit():
            found.append(("crop", int(part[4:])))
        else:
            raise InvalidSetting(f"augment {part!r} is unknown. Write flip, crop4 (shifts by up to 4 pixels), or both with a comma.")
    return found


# Checkpoints: one safetensors file, its JSON in the header; replaced in one move


class EpochRecord(BaseModel):
    """What every epoch's record tells; the method and who watches add to it."""

    model_config = ConfigDict(extra="allow", strict=True)
    epoch: int
    loss: float
    train_top1: float | None


class CheckpointRecord(BaseModel):
    """The JSON of a checkpoint. Strict: a wrong type, a missing or an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[1] = 1
    records: list[EpochRecord] = Field(min_length=1)
    identity: dict[str, Any]
    decisions: dict[str, Any]


AGAIN = "Remove it to start again, or restore it."


def _save(path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, records: list[dict], identity: Mapping[str, Any]) -> None:
    tensors = {f"model.{key}": tensor.contiguous().clone() for key, tensor in trainee.model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value).contiguous().clone() for key, value in state.items()}
    tensors |= {f"method.{key}": tensor.contiguous().clone() for key, tensor in trainee.state().items()}
    about = json.dumps({"version": 1, "records": records, "identity": dict(identity), "decisions": trainee.decisions()})
    anew = "Make room, or choose another --output."
    on = f"Make room: the same command continues from the checkpoint of epoch {len(records) - 1}, which is kept."
    with whole_file(path, on if path.is_file() else anew) as draft:
        save_file(tensors, draft, metadata={"anybit": about, DIGEST: _digest(about, tensors)})


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that a checkpoint holds."""
    whole = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _resume(path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load a checkpoint into the trainee and its optimizer; returns its records. Refused where a setting differs."""
    specs, metadata = read_header(path)
    told = parse_json(metadata.get("anybit", ""), f"{path}: its record")
    check_version(told, path, 1)
    about = validated(CheckpointRecord, told, f"{path}: its record")
    different = [key for key in {**about.identity, **identity} if about.identity.get(key) != json.loads(json.dumps(identity.get(key)))]
    if different:
        said = "; ".join(
            f"{key} was {reprlib.repr(about.identity.get(key))} and is now {reprlib.repr(identity.get(key))}" for key in sorted(different)
        )
        raise InvalidSetting(f"{path.parent} holds an unfinished run with other settings: {said}. Use the same, or another --output.")
    records = told["records"]
    _check_records(records, trainee, path)
    tensors = read_tensors(path, _expected(specs, trainee, optimizer))
    if metadata.get(DIGEST) != _digest(metadata["anybit"], tensors):
        raise InvalidFile(f"{path} is not as it was written: its {DIGEST} differs from its content's. {AGAIN}")
    try:
        trainee.restore(about.decisions)
    except InvalidFile as error:
        raise InvalidFile(f"{path}: {error}") from error
    trainee.model.load_state_dict({key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")})
    check_state(trainee.model, path)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    for key, tensor in trainee.state().items():
        tensor.copy_(tensors[f"method.{key}"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return records


def _check_records(records: Sequence[Mapping[str, Any]], trainee: Trainee, path: Path) -> None:
    """Raise InvalidFile where the records are not one for each epoch, all alike, with what the method tells."""
    model = {"epoch": 0, "loss": 0.0, "train_top1": records[0].get("train_top1"), **trainee.record()}
    for number, record in enumerate(records, 1):
        if record["epoch"] != number:
            raise InvalidFile(f"{path}: record {number} is of epoch {record['epoch']}. {AGAIN}")
        if not _alike(record, records[0]) or not _alike({key: record.get(key) for key in model}, model):
            raise InvalidFile(f"{path}: the record of epoch {number} does not tell what training records. {AGAIN}")


def _alike(one: Any, other: Any) -> bool:
    """Whether two JSON values have the same keys and kinds of values; a number and null are alike."""
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        both = isinstance(one, Mapping) and isinstance(other, Mapping) and {*map(str, one)} == {*map(str, other)}
        return both and all(_alike(value, {str(k): v for k, v in other.items()}[str(key)]) for key, value in one.items())
    kinds = [float if value is None or type(value) is int else type(value) for value in (one, other)]
    return kinds[0] is kinds[1]


def _expected(specs: Mapping[str, TensorSpec], trainee: Trainee, optimizer: torch.optim.Optimizer) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint: network and method whole, and Adam's three of each parameter that has any in `specs`."""
    expected = {f"model.{key}": spec_of(tensor) for key, tensor in trainee.model.state_dict().items()}
    expected |= {f"method.{key}": spec_of(tensor) for key, tensor in trainee.state().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        if any(f"optimizer.{index}.{name}" in specs for name in ("step", "exp_avg", "exp_avg_sq")):
            expected[f"optimizer.{index}.step"] = TensorSpec("F32", ())
            expected |= {f"optimizer.{index}.{name}": spec_of(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return expected
