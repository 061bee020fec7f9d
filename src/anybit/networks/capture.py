"""Capture a unit's inputs and outputs within a memory budget, spilling to disk beyond it."""

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, map_leaves, naming_sample, tensors_in, unpadded
from anybit.errors import AnybitError, UnsupportedModel
from anybit.networks.layer_types import type_of


class _Stop(Exception):
    """End a forward pass once the captured module has run."""


@dataclass
class CapturedTensor:
    """One captured tensor over all samples, [N, rows per sample, ...], in memory or in a memory-mapped file.

    Windows and flattened positions give a layer several rows per sample, which stay together.
    """

    tensor: Tensor
    filled: int = 0

    @classmethod
    def like(cls, values: Tensor, batch_size: int, count: int, budget: "MemoryBudget") -> "CapturedTensor":
        return cls(budget.allocate((count, len(values) // batch_size, *values.shape[1:]), values.dtype))

    def add(self, values: Tensor, batch_size: int) -> None:
        self.tensor[self.filled : self.filled + batch_size].copy_(values.view(batch_size, -1, *values.shape[1:]))
        self.filled += batch_size

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows of the samples `indices`, in the layer's layout."""
        return self.tensor[indices].flatten(0, 1)


@dataclass
class BatchStore:
    """One captured tensor as a list of batches: samples padded to the length of their batch cannot be stacked."""

    tensors: list[Tensor]

    def add(self, values: Tensor, budget: "MemoryBudget") -> None:
        self.tensors.append(budget.allocate(tuple(values.shape), values.dtype).copy_(values))

    def rows(self, indices: Tensor) -> Tensor:
        """Return a copy of the tensor of the one batch in `indices`: a forward may modify its input."""
        return self.tensors[int(indices)].clone()


class MemoryBudget:
    """Allocate a unit's tensors in memory up to `limit` bytes, then in temporary files that are deleted with the tensors."""

    def __init__(self, limit: int):
        self.limit, self.used, self.spilled = limit, 0, 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor, on disk if the memory is used up."""
        count = int(torch.Size(shape).numel())
        size = count * dtype.itemsize
        if self.used + size <= self.limit:
            self.used += size
            return torch.empty(shape, dtype=dtype)
        try:
            with tempfile.NamedTemporaryFile(prefix="anybit-") as file:  # the name is removed at once; the mapping keeps the bytes
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills later would kill the process without a message
                spilled = torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
        except OSError as error:
            raise AnybitError(
                f"{size:,} bytes of activations do not fit into the rest of the memory budget ({self.limit:,} bytes) nor on the disk of "
                f"{tempfile.gettempdir()} ({error.strerror}). Raise --memory, calibrate on fewer --samples, or set TMPDIR to a folder "
                "on a larger disk. Finished results are kept: the same command continues."
            ) from error
        self.spilled += size
        return spilled


def give_back() -> None:
    """Return freed memory to the system: the C library keeps blocks of some megabytes for later tensors."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # only in glibc
            ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Captured:
    """Inputs and outputs of a module, sample by sample.

    `arguments` are the (args, kwargs) of its forward, nested as received, with every tensor of the batch replaced by its store; a tensor
    that is equal for all samples (a mask) is kept once. Padded batches are kept whole, and `masks` mark their real tokens.
    `constant` means that the module reads the same in every batch (positions, for example), kept as one sample.
    """

    arguments: tuple[tuple, dict]
    output: CapturedTensor | BatchStore | None
    device: torch.device
    masks: list[Tensor | None] | None = None
    constant: bool = False

    def batch(self, indices: Tensor) -> tuple[tuple, dict]:
        """Return (args, kwargs) of the samples `indices` (for padded data: of one batch), on the device that they came from."""
        return map_leaves(self.arguments, (CapturedTensor, BatchStore), lambda store: store.rows(indices).to(self.device))

    def outputs(self, indices: Tensor) -> Tensor:
        """Return the outputs of the samples `indices` (for padded data: of one batch)."""
        assert self.output is not None  # captured with outputs=True
        return self.output.rows(indices).to(self.device)


@torch.no_grad()
def carry(
    source: Callable[[Tensor], Tensor], count: int, budget: "MemoryBudget", whole_batches: bool, size: int = 64
) -> CapturedTensor | BatchStore:
    """Return a store of `source(indices)`, computed `size` samples at a time, or one batch at a time for `count` whole batches."""
    if whole_batches:
        whole = BatchStore([])
        for index in chunks(count, 1):
            whole.add(source(index), budget)
        return whole
    store: CapturedTensor | None = None
    for indices in chunks(count, size):
        values = source(indices)
        store = store or CapturedTensor.like(values, len(indices), count, budget)
        store.add(values, len(indices))
    assert store is not None  # there is one chunk even without samples
    return store


@torch.no_grad()
def capture(model: nn.Module, name: str, batches: Iterable[Batch], count: int, budget: MemoryBudget, outputs: bool = False) -> Captured:
    """Capture the inputs, and `outputs` if asked, of module `name`, which runs once per pass, over `batches` with `count` samples in
    total."""
    (captured,) = capture_calls(model, name, batches, count, budget, outputs)
    return captured


@torch.no_grad()
def capture_calls(
    model: nn.Module,
    name: str,
    batches: Iterable[Batch],
    count: int,
    budget: MemoryBudget,
    outputs: bool = False,
    constant: Sequence[bool] = (True,),
) -> list[Captured]:
    """Capture each call of a module that runs several times per pass. `constant` says for each call whether it may turn out to be constant;
    the float network decides that for the quantized one, too.

    Tensors are copied immediately, since a later in-place operation (`out += shortcut`) would overwrite them. The pass stops after the
    module's last call. Raises UnsupportedModel if the module's rows cannot be assigned to samples; padded batches are kept whole.
    """
    batches = list(batches)
    padded = _differ_in_length([batch.mask for batch in batches])
    recorders = [_WholeBatches(name, budget, outputs) if padded else _Recorder(name, count, budget, outputs, may_be) for may_be in constant]
    turns, module = _Turns(recorders), model.get_submodule(name)
    hooks = [module.register_forward_pre_hook(turns.before, with_kwargs=True)]
    if outputs:
        hooks.append(module.register_forward_hook(turns.after))
    try:
        for batch in batches:
            turns.begin(len(batch))
            with suppress(_Stop):
                call(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(recorder.complete(len(batches)) for recorder in recorders):
        raise UnsupportedModel(f"Unit {name} does not run equally often for every input: it is skipped or repeated. Keep its layers float.")
    captured = [recorder.captured for recorder in recorders]
    for one in captured if padded else ():
        one.masks = [batch.mask for batch in batches]
    return captured


class _Turns:
    """Assign each call of a module in a pass to its own recorder, and end the pass after the last call."""

    def __init__(self, recorders: "Sequence[_Recorder | _WholeBatches]"):
        self.recorders, self.at = recorders, 0

    def begin(self, batch_size: int) -> None:
        self.at = 0
        for recorder in self.recorders:
            recorder.batch_size = batch_size

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.recorders[self.at].before(args, kwargs)
        if not self.recorders[self.at].outputs:
            self._proceed()

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.recorders[self.at].after(output)
        self._proceed()

    def _proceed(self) -> None:
        self.at += 1
        if self.at == len(self.recorders):
            raise _Stop


def _differ_in_length(masks: list[Tensor | None]) -> bool:
    """Return whether any batch is padded, or batches differ in length; samples of one length can be stacked, masked or not."""
    present = [mask for mask in masks if mask is not None]
    return len({mask.shape[1] for mask in present}) > 1 or not all(mask.all() for mask in present)


@dataclass(frozen=True)
class _Place:
    """Stand for one of the tensors among a module's arguments, by its number."""

    number: int


class _Recorder:
    """Record one call in every batch."""

    def __init__(self, name: str, count: int, budget: MemoryBudget, outputs: bool, may_be_constant: bool):
        self.name, self.count, self.budget, self.outputs, self.may_be_constant = name, count, budget, outputs, may_be_constant
        self.batch_size = self.calls = 0
        self.places: Any = None  # (args, kwargs) with a _Place for each tensor
        self.first: list[Tensor] = []  # the tensors of the first batch
        self.stores: list[CapturedTensor | None] = []  # None: its rows are not samples
        self.same: set[int] = set()  # tensors that have been equal in every batch so far
        self.output: CapturedTensor | None = None
        self.first_output: Tensor | None = None

    def complete(self, batches: int) -> bool:
        """Return whether every sample was seen once."""
        return self.constant or all(store is None or store.filled == self.count for store in [*self.stores, self.output])

    @property
    def constant(self) -> bool:
        """Return whether all arguments were equal in every batch."""
        return len(self.same) == len(self.first) and (self.calls > 1 or self.stores[0] is None)

    @property
    def captured(self) -> Captured:
        """Return the arguments, each tensor as its store or, if all samples share it, as it is."""

        def held(place: _Place) -> CapturedTensor | Tensor:
            store, same = self.stores[place.number], place.number in self.same and self.calls > 1
            return self.first[place.number] if store is None or same else store

        output = self.output
        if self.constant and self.first_output is not None:
            output = CapturedTensor(self.first_output[None])
        return Captured(map_leaves(self.places, _Place, held), output, self.first[0].device, constant=self.constant)

    def before(self, args: tuple, kwargs: dict) -> None:
        tensors = [tensor.detach() for tensor in tensors_in((args, kwargs))]  # a forward may compute gradients itself
        if not self.calls:
            numbers = iter(range(len(tensors)))
            self.places = map_leaves((args, kwargs), Tensor, lambda _: _Place(next(numbers)))
            self.first = [tensor.clone() for tensor in tensors]
            self.stores = [self._store(tensor) for tensor in tensors]
            self.same = set(range(0 if self.may_be_constant else 1, len(tensors)))
        self.calls += 1
        self.same = {number for number in self.same if torch.equal(tensors[number], self.first[number])}
        for number, (store, tensor) in enumerate(zip(self.stores, tensors, strict=True)):
            if store is not None and self._fits(tensor, store):
                store.add(tensor, self.batch_size)
            elif number in self.same:
                self.stores[number] = None
            else:
                raise UnsupportedModel(self._refusal(tensor))

    def after(self, output: Any) -> None:
        _check_tensor(self.name, output)
        if self.first_output is None:
            self.first_output, self.output = output.detach().clone(), self._store(output)
        if self.output is not None and self._fits(output, self.output):
            self.output.add(output.detach(), self.batch_size)
        elif self.same != set(range(len(self.first))):
            raise UnsupportedModel(self._refusal(output))

    def _store(self, values: Tensor) -> CapturedTensor | None:
        is_batched = values.dim() and len(values) % self.batch_size == 0
        return CapturedTensor.like(values, self.batch_size, self.count, self.budget) if is_batched else None

    def _fits(self, values: Tensor, store: CapturedTensor) -> bool:
        return len(values) == self.batch_size * store.tensor.shape[1]

    def _refusal(self, values: Tensor) -> str:
        return (
            f"Unit {self.name} reads a tensor of shape {tuple(values.shape)} for {self.batch_size} samples, whose rows cannot be assigned "
            "to samples. Name a larger block around it with --block, or keep its layers float."
        )


def _check_tensor(name: str, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise UnsupportedModel(f"Unit {name} returns a {type(output).__name__}; it must return one tensor. Name other blocks.")


class _WholeBatches:
    """Record one call in every batch, as a whole: padded batches differ in length and are not split by sample."""

    def __init__(self, name: str, budget: MemoryBudget, outputs: bool):
        self.name, self.budget, self.outputs, self.calls, self.batch_size = name, budget, outputs, 0, 0
        self.places: Any = None
        self.stores: list[BatchStore] = []
        self.output = BatchStore([]) if outputs else None
        self.device = torch.device("cpu")

    def complete(self, batches: int) -> bool:
        """Return whether every batch was seen once."""
        return all(len(store.tensors) == batches for store in [*self.stores, *([self.output] if self.output else [])])

    @property
    def captured(self) -> Captured:
        return Captured(map_leaves(self.places, _Place, lambda place: self.stores[place.number]), self.output, self.device)

    def before(self, args: tuple, kwargs: dict) -> None:
        tensors = tensors_in((args, kwargs))
        if not self.calls:
            numbers = iter(range(len(tensors)))
            self.places = map_leaves((args, kwargs), Tensor, lambda _: _Place(next(numbers)))
            self.stores, self.device = [BatchStore([]) for _ in tensors], tensors[0].device
        self.calls += 1
        for store, tensor in zip(self.stores, tensors, strict=True):
            store.add(tensor, self.budget)

    def after(self, output: Any) -> None:
        _check_tensor(self.name, output)
        assert self.output is not None  # else `before` stopped the pass
        self.output.add(output, self.budget)


@torch.no_grad()
def input_samples(model: nn.Module, layers: Iterable[str], batches: Iterable[Batch], values: int, seed: int) -> dict[str, list[Tensor]]:
    """Return about `values` values of each layer's input over all batches, flattened, including the smallest and the largest, without
    padding.

    One tensor per layer; two for a matmul, one per operand.
    """
    batches = list(batches)
    each = max(1, values // max(1, len(batches)))
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[list[Tensor]]] = {name: [] for name in layers}
    mask: Tensor | None = None

    def keep(name: str) -> Callable:
        def hook(module, args, kwargs) -> None:
            operands = tensors_in((args, kwargs))[: type_of(module).operands]
            samples[name].append([pick(name, operand.detach()) for operand in operands])

        return hook

    def pick(name: str, tensor: Tensor) -> Tensor:
        flat = unpadded(tensor, mask).reshape(-1)
        if not len(flat):
            raise UnsupportedModel(
                f"Layer {name} reads an input of shape {tuple(tensor.shape)}, which is empty. Keep it: --keep='{name}=float'."
            )
        picked = flat if len(flat) <= each else flat[torch.randint(len(flat), (each,), generator=generator)]
        return torch.cat([picked, flat.min()[None], flat.max()[None]]).float()

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in samples]
    try:
        for index, batch in enumerate(batches):
            mask = batch.mask
            with naming_sample(model, batch, f"batch {index} of the data"):
                call(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: [torch.cat(operand) for operand in zip(*parts, strict=True)] for name, parts in samples.items() if parts}


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """Yield indices 0 .. count - 1, `size` at a time."""
    yield from torch.arange(count).split(size)
