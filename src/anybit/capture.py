"""A unit's inputs and outputs, held within a memory budget. The only place that spills to disk."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybit.batches import Batch, call, map_leaves, tensors_in
from anybit.errors import AnybitError, UnsupportedModel


class _Stop(Exception):
    """Ends a forward pass once the captured module has run."""


@dataclass
class Store:
    """One captured tensor over all samples, [N, rows a sample, ...], in memory or in a file that the operating system pages.

    Windows and flattened positions give a layer several rows a sample; they stay together.
    """

    tensor: Tensor
    filled: int = 0

    @classmethod
    def like(cls, part: Tensor, batch_size: int, count: int, budget: "MemoryBudget") -> "Store":
        return cls(budget.allocate((count, len(part) // batch_size, *part.shape[1:]), part.dtype))

    def add(self, part: Tensor, batch_size: int) -> None:
        self.tensor[self.filled : self.filled + batch_size].copy_(part.view(batch_size, -1, *part.shape[1:]))
        self.filled += batch_size

    def rows(self, indices: Tensor) -> Tensor:
        """The rows of the samples `indices`, as the layer saw them."""
        return self.tensor[indices].flatten(0, 1)


class MemoryBudget:
    """Hands out a unit's tensors: from memory while `limit` bytes last, then from temporary files that go with the tensors."""

    def __init__(self, limit: int):
        self.limit, self.used, self.spilled = limit, 0, 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor; contents of a spilled one live on disk."""
        count = int(torch.Size(shape).numel())
        size = count * dtype.itemsize
        if self.used + size <= self.limit:
            self.used += size
            return torch.empty(shape, dtype=dtype)
        if size > shutil.disk_usage(tempfile.gettempdir()).free:
            raise AnybitError(
                f"{size:,} bytes of activations do not fit into the rest of the memory budget ({self.limit:,} bytes) nor on the disk of "
                f"{tempfile.gettempdir()}. Raise --memory, calibrate on fewer --samples, or point TMPDIR at a larger disk."
            )
        self.spilled += size
        with tempfile.NamedTemporaryFile(prefix="anybit-") as file:  # the name goes at once; the mapping keeps the bytes
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


@dataclass
class Captured:
    """What went into a module and what came out, sample by sample.

    `arguments` are the (args, kwargs) of its forward, as nested as they came, every tensor of the batch replaced by its Store; a tensor
    that is the same for all samples (a mask) is kept once.
    """

    arguments: tuple[tuple, dict]
    output: Store | None
    device: torch.device

    def batch(self, indices: Tensor) -> tuple[tuple, dict]:
        """(args, kwargs) of the samples `indices`, on the device they came from."""
        return map_leaves(self.arguments, Store, lambda store: store.rows(indices).to(self.device))

    def outputs(self, indices: Tensor) -> Tensor:
        """The outputs of the samples `indices`."""
        return self.output.rows(indices).to(self.device)


@torch.no_grad()
def carry(source: Callable[[Tensor], Tensor], count: int, budget: "MemoryBudget", size: int = 64) -> Store:
    """A store of `source(indices)`, computed `size` samples at a time."""
    store: Store | None = None
    for indices in chunks(count, size):
        part = source(indices)
        store = store or Store.like(part, len(indices), count, budget)
        store.add(part, len(indices))
    return store


@torch.no_grad()
def capture(model: nn.Module, name: str, batches: Iterable[Batch], count: int, budget: MemoryBudget, outputs: bool = False) -> Captured:
    """Inputs (and `outputs`, if asked) of module `name` over `batches`, which hold `count` samples together.

    Tensors are copied the moment they pass: a later in-place operation (`out += shortcut`) would rewrite them.
    The pass stops once the module has run. Raises UnsupportedModel where the module's rows cannot be told apart by sample.
    """
    recorder = _Recorder(name, count, budget, outputs)
    module = model.get_submodule(name)
    hooks = [module.register_forward_pre_hook(recorder.before, with_kwargs=True), module.register_forward_hook(recorder.after)]
    try:
        for batch in batches:
            recorder.batch_size = len(batch)
            with suppress(_Stop):
                call(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if any(store is not None and store.filled != count for store in [*recorder.stores, recorder.output]):
        raise UnsupportedModel(f"Unit {name} does not run once for every input: it is skipped or repeated. Keep its layers float.")
    return recorder.captured


@dataclass(frozen=True)
class _Place:
    """Stands for the number-th tensor among a module's arguments."""

    number: int


class _Recorder:
    """The two hooks of `capture`, and what they have kept."""

    def __init__(self, name: str, count: int, budget: MemoryBudget, outputs: bool):
        self.name, self.count, self.budget, self.outputs = name, count, budget, outputs
        self.batch_size = self.calls = 0
        self.places: Any = None  # (args, kwargs) with a _Place for each tensor
        self.first: list[Tensor] = []  # the tensors of the first batch
        self.stores: list[Store | None] = []  # None: the rows are not the batch's
        self.same: set[int] = set()  # tensors that were the same in every batch so far
        self.output: Store | None = None

    @property
    def captured(self) -> Captured:
        """The arguments, each tensor as its Store or, where all samples share it, as it is."""

        def held(place: _Place) -> Store | Tensor:
            shared = self.stores[place.number] is None or (place.number in self.same and self.calls > 1)
            return self.first[place.number] if shared else self.stores[place.number]

        return Captured(map_leaves(self.places, _Place, held), self.output, self.first[0].device)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        parts = tensors_in((args, kwargs))
        if not self.calls:
            numbers = iter(range(len(parts)))
            self.places = map_leaves((args, kwargs), Tensor, lambda _: _Place(next(numbers)))
            self.first = [part.clone() for part in parts]
            self.stores = [self._store(part) for part in parts]
            self.same = set(range(1, len(parts)))  # the first tensor is the data, whatever it holds
        self.calls += 1
        self.same = {number for number in self.same if torch.equal(parts[number], self.first[number])}
        for number, (store, part) in enumerate(zip(self.stores, parts, strict=True)):
            if store is not None:
                self._check(part, store)
                store.add(part, self.batch_size)
            elif number not in self.same:
                raise UnsupportedModel(self._refusal(part))
        if not self.outputs:
            raise _Stop

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise UnsupportedModel(f"Unit {self.name} returns a {type(output).__name__}; it must return one tensor. Name other blocks.")
        self.output = self.output or self._store(output)
        self._check(output, self.output)
        self.output.add(output, self.batch_size)
        raise _Stop

    def _store(self, part: Tensor) -> Store | None:
        is_batched = part.dim() and len(part) % self.batch_size == 0
        return Store.like(part, self.batch_size, self.count, self.budget) if is_batched else None

    def _check(self, part: Tensor, store: Store | None) -> None:
        if store is None or len(part) != self.batch_size * store.tensor.shape[1]:
            raise UnsupportedModel(self._refusal(part))

    def _refusal(self, part: Tensor) -> str:
        return (
            f"Unit {self.name} sees a tensor of shape {tuple(part.shape)} for {self.batch_size} samples, whose rows cannot be told "
            "apart by sample. Name a larger block around it with --block, or keep its layers float."
        )


@torch.no_grad()
def input_samples(model: nn.Module, layers: Iterable[str], batches: Iterable[Batch], values: int, seed: int) -> dict[str, Tensor]:
    """About `values` values of each layer's input over all batches, flat, always with the smallest and the largest one."""
    batches = list(batches)
    each = max(1, values // max(1, len(batches)))
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable:
        def hook(module, args, kwargs) -> None:
            flat = tensors_in((args, kwargs))[0].detach().reshape(-1)
            picked = flat if len(flat) <= each else flat[torch.randint(len(flat), (each,), generator=generator)]
            samples[name].append(torch.cat([picked, flat.min()[None], flat.max()[None]]).float())

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in samples]
    try:
        for batch in batches:
            call(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in samples.items() if parts}


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """Indices 0 .. count - 1, `size` at a time."""
    yield from torch.arange(count).split(size)
