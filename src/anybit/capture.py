"""A unit's inputs and outputs, held within a memory budget. The only place that spills to disk."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anybit.batches import Batch, call, tensors_in
from anybit.errors import UnsupportedModel


class _Stop(Exception):
    """Ends a forward pass once the captured module has run."""


@dataclass
class Store:
    """One captured tensor over all samples, [N, ...], in memory or in a file that the operating system pages."""

    tensor: Tensor
    filled: int = 0

    @classmethod
    def like(cls, sample: Tensor, count: int, budget: "MemoryBudget") -> "Store":
        shape = (count, *sample.shape[1:])
        return cls(budget.allocate(shape, sample.dtype))

    def add(self, part: Tensor) -> None:
        self.tensor[self.filled : self.filled + len(part)].copy_(part)
        self.filled += len(part)


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
        self.spilled += size
        with tempfile.NamedTemporaryFile(prefix="anybit-") as file:  # the name goes at once; the mapping keeps the bytes
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


@dataclass
class Captured:
    """What went into a module and what came out, sample by sample.

    `inputs` are the positional and keyword arguments of its forward with every tensor replaced by its Store; tensors whose first
    dimension is not the batch (a mask shared by all samples) are kept once.
    """

    arguments: tuple
    output: Store | None
    device: torch.device

    def batch(self, indices: Tensor) -> tuple[tuple, dict]:
        """(args, kwargs) of the samples `indices`, on the device they came from."""
        args, kwargs = self.arguments
        return tuple(self._pick(item, indices) for item in args), {key: self._pick(item, indices) for key, item in kwargs.items()}

    def outputs(self, indices: Tensor) -> Tensor:
        """The outputs of the samples `indices`."""
        return self._pick(self.output, indices)

    def _pick(self, item, indices: Tensor):
        return item.tensor[indices].to(self.device) if isinstance(item, Store) else item


@torch.no_grad()
def capture(model: nn.Module, name: str, batches: Iterable[Batch], count: int, budget: MemoryBudget, outputs: bool = False) -> Captured:
    """Inputs (and `outputs`, if asked) of module `name` over `batches`, which hold `count` samples together.

    Tensors are copied the moment they pass: a later in-place operation (`out += shortcut`) would rewrite them.
    The pass stops once the module has run.
    """
    captured: list[Captured] = []

    def stored(item, batch_size: int):
        if not isinstance(item, Tensor):
            return item
        return Store.like(item, count, budget) if item.dim() and len(item) == batch_size else item.clone()

    def before(module, args, kwargs) -> None:
        if not captured:
            first = tensors_in((args, kwargs))[0]
            kept = tuple(stored(a, len(first)) for a in args), {key: stored(value, len(first)) for key, value in kwargs.items()}
            captured.append(Captured(kept, None, first.device))
        flat = zip([*captured[0].arguments[0], *captured[0].arguments[1].values()], [*args, *kwargs.values()], strict=True)
        for store, item in flat:
            if isinstance(store, Store):
                store.add(item)
        if not outputs:
            raise _Stop

    def after(module, args, output) -> None:
        if not isinstance(output, Tensor):
            raise UnsupportedModel(f"Block {name} returns a {type(output).__name__}; a unit must return one tensor. Name another block.")
        if captured[0].output is None:
            captured[0].output = Store.like(output, count, budget)
        captured[0].output.add(output)
        raise _Stop

    module = model.get_submodule(name)
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        for batch in batches:
            try:
                call(model, batch.inputs)
            except _Stop:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return captured[0]


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
