"""Refuse networks that no road supports: in one sentence that names the module and the remedy, before anything long begins.

The checks concern the whole network: how weights are held, whether a pass can be repeated, and what a pass consists of.
"""

import copy
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from anybit.data.batches import Batch, evaluating, not_plain, predict
from anybit.data.outputs import named_tensors
from anybit.errors import AnybitError, UnsupportedModel, some
from anybit.networks.layer_types import COVERED, type_of
from anybit.networks.layers import float_weight
from anybit.networks.states import STORED_TYPES
from anybit.networks.wiring import Wiring, observe_outputs

_REMOVERS = {
    WeightNorm: "torch.nn.utils.remove_weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm",
    prune.BasePruningMethod: "torch.nn.utils.prune.remove",
}


def check_network(model: nn.Module) -> None:
    """Raise UnsupportedModel for problems that show before the network runs: scripted code, and weights that are not plain tensors."""
    if torch.get_default_dtype() != torch.float32:
        raise UnsupportedModel(
            f"PyTorch's default type is {torch.get_default_dtype()}, and anybit computes and stores float32. Call "
            "torch.set_default_dtype(torch.float32) first."
        )
    if isinstance(model, COVERED):
        raise UnsupportedModel(f"The network itself is a {type(model).__name__}, but layers need names. Put it into an nn.Sequential.")
    for name, module in model.named_modules():
        where = name or "The network"
        _check_name(name)
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                f"{where} is TorchScript, whose layers cannot be changed. Give the Python module that it was scripted from."
            )
        if isinstance(module, COVERED) and type_of(module).has_weights:
            _check_not_computed(where, module)
        stored = {key for key in module._buffers if key not in module._non_persistent_buffers_set}
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            _check_name(key)
            _check_tensor(f"{name}.{key}".lstrip("."), tensor, key in module._parameters or key in stored)


def _check_name(name: str) -> None:
    if any("\ud800" <= one <= "\udfff" for one in name):
        raise UnsupportedModel(f"{name!r} is a name with half of a surrogate pair, which no file can hold. Give it another name.")


def _check_not_computed(name: str, layer: nn.Module) -> None:
    for key in ("weight", "bias"):
        is_attribute = key in layer._parameters
        if not is_attribute and getattr(layer, key, None) is not None:
            raise UnsupportedModel(
                f"{name}: the {key} is computed in every pass, not stored. Make it a plain parameter first: {_remover(layer, key)}."
            )


def _remover(layer: nn.Module, key: str) -> str:
    if parametrize.is_parametrized(layer, key):
        return f"torch.nn.utils.parametrize.remove_parametrizations(layer, {key!r})"
    for hook in layer._forward_pre_hooks.values():
        for kind, remover in _REMOVERS.items():
            if isinstance(hook, kind):
                return f"{remover}(layer, {key!r})"
    return f"layer.{key} = nn.Parameter(layer.{key}.detach())"


def _check_tensor(key: str, tensor: Tensor, is_stored: bool) -> None:
    if is_lazy(tensor):
        raise UnsupportedModel(f"{key} has no shape yet: its module is lazy. Run the network once on an input first.")
    if tensor.is_meta:
        raise UnsupportedModel(f"{key} is on the meta device and holds no numbers. Load the weights first.")
    if tensor.layout is not torch.strided:
        raise UnsupportedModel(f"{key} is sparse ({tensor.layout}). Make it dense first: to_dense().")
    if is_stored and tensor.dtype not in STORED_TYPES:
        raise UnsupportedModel(
            f"{key} is {tensor.dtype}, which a run's file cannot hold. Convert it, or register it as a buffer with persistent=False."
        )


def _first_sentence(error: Exception) -> str:
    """Return an error's message up to its first full stop."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text.partition('. ')[0].rstrip('.')}."


@dataclass(frozen=True)
class ObservedPass:
    """One pass of a network: its wiring, its output, and the name and checksum of each value, in order."""

    wiring: Wiring
    output: Any
    values: Sequence[tuple[str, int]]


def observed_pass(model: nn.Module, example: Batch) -> ObservedPass:
    """Run `model` once on `example`; all later questions about the pass are answered from the result."""
    values: list[tuple[str, int]] = []
    wiring, output = observe_outputs(model, example, lambda name, tensor: values.append((name, _checksum(tensor))))
    return ObservedPass(wiring, output, values)


def _checksum(tensor: Tensor) -> int:
    """Return a CRC-32: it certainly differs if one number does, and with many differences it agrees by chance once in four billion."""
    if torch._C._functorch.is_batchedtensor(tensor) or not_plain(tensor):  # its bytes are not accessible
        return 0
    flat = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)


def moving_state(
    model: nn.Module, example: Batch, before: Mapping[str, Tensor], first: ObservedPass
) -> tuple[dict[str, Tensor | None], ObservedPass]:
    """Run the network again; return (buffers changed by passes in evaluation mode -> values `before` any, or None; the last pass).

    Outputs must not depend on such buffers. Raises UnsupportedModel if a pass changes a parameter, or if the same inputs lead to other
    values the second time, on the way to the outputs: on other inputs, the outputs might differ. If only the `first` pass creates
    something, a third pass is compared with the second.
    """
    try:
        last = observed_pass(model, example)
        name = _first_difference(first, last)
        if name is not None:
            first, last = last, observed_pass(model, example)
            name = _first_difference(first, last)
    except Exception as error:
        raise UnsupportedModel(
            f"The network runs once on an input and not again ({_first_sentence(error)}). Reset its state in each pass."
        ) from error
    names = [[name for name, _ in named_tensors(one.output)] for one in (first, last)]
    if names[0] != names[1]:
        raise UnsupportedModel(
            f"The network's outputs are {some(names[0])} in one pass and {some(names[1])} in the next. Let {type(model).__name__} return "
            "the same ones in the same order in each pass."
        )
    moved = changed(before, model.state_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in moved:
        if key in parameters:
            raise UnsupportedModel(
                f"A pass in evaluation mode changes {key}, so its codes would not stay valid. Let {_owner(key)} change it in training "
                "mode only (for an embedding: max_norm=None)."
            )
    if name is not None:
        note = f" It keeps {', '.join(moved)}." if moved else ""
        raise UnsupportedModel(
            f"The same inputs give other outputs the second time, from {name} on: the network draws random numbers or keeps state."
            f"{note} Make it deterministic in evaluation mode."
        )
    return moved, last


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the entries of a state that changed -> their earlier value, or None."""
    return {key: before.get(key) for key in {**before, **after} if not _same(before.get(key), after.get(key))}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _owner(key: str) -> str:
    return key.rpartition(".")[0] or "the network"


def _first_difference(first: ObservedPass, second: ObservedPass) -> str | None:
    """Return the name of the first value in which two passes differ, among those on which the outputs depend."""
    wiring = first.wiring
    counts = set(wiring.output_values or (number for op in wiring.operations for number in op.outputs))
    for op in reversed(wiring.operations):
        counts.update(op.inputs if counts & set(op.outputs) else ())
    values = [*((number,) for number in wiring.input_values), *(op.outputs for op in wiring.operations if op.outputs)]
    for one, other, numbers in zip(first.values, second.values, values, strict=False):
        if one[0] != other[0] or (one != other and counts & set(numbers)):
            return one[0]
    return None if len(first.values) == len(second.values) else "its last operation"


def check_outputs(model: nn.Module, output: Tensor, example: Batch) -> None:
    """Raise UnsupportedModel unless the tensors read from the output on `example` are real numbers, with each sample's rows in order."""
    if not output.is_floating_point():
        raise UnsupportedModel(
            f"The network's first output is {output.dtype}, which has no distance. Let {type(model).__name__} return the "
            "numbers behind its decision, such as logits, first."
        )
    if example.reader is None and (not output.dim() or len(output) % len(example)):
        raise UnsupportedModel(_no_rows(model, output, len(example)))


def check_rows(model: nn.Module, outputs: Sequence[Tensor], batches: Sequence[Batch], example: Batch) -> None:
    """Raise UnsupportedModel if outputs do not have as many rows per input as on `example`."""
    with torch.no_grad(), evaluating(model):
        rows = len(predict(model, example))
    for output, batch in zip(outputs, batches, strict=True):
        if batch.reader is None and len(output) * len(example) != rows * len(batch):
            raise UnsupportedModel(_no_rows(model, output, len(batch)))


def _no_rows(model: nn.Module, output: Tensor, count: int) -> str:
    return (
        f"The network's first output has shape {tuple(output.shape)} for {count} input(s), no fixed number of rows per input. Let "
        f"{type(model).__name__} return its prediction for each input first"
        + (", with flatten(1) in place of a squeeze() that drops a batch of one." if count == 1 else ".")
    )


def check_differentiable(model: nn.Module, blocks: Iterable[str], example: Batch) -> None:
    """Raise UnsupportedModel if no gradient flows back from the outputs, or from one of the blocks to its inside."""
    trial = copy.deepcopy(model)
    for parameter in trial.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    cut: list[str] = []
    entered: list[bool] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(torch.is_grad_enabled())

    def leave(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if entered.pop() and isinstance(output, Tensor) and not output.requires_grad:
                cut.append(name)

        return hook

    for name in blocks:
        trial.get_submodule(name).register_forward_pre_hook(enter)
        trial.get_submodule(name).register_forward_hook(leave(name))
    try:
        with torch.enable_grad(), evaluating(trial):
            output = predict(trial, example)
            if output.requires_grad:
                output.sum().backward()
    except AnybitError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"The network's outputs cannot be differentiated: {_first_sentence(error)} Use --pipeline=light.") from error
    if cut or not output.requires_grad:
        place = f"Block {cut[0]}" if cut else f"The forward of {type(model).__name__}"
        raise UnsupportedModel(
            f"{place} lets no gradient through (no_grad, inference_mode or detach inside it), and only --pipeline=light works without one. "
            "Remove it from the forward, or calibrate with --pipeline=light."
        )


def check_runs_again(names: Sequence[str], wiring: Wiring) -> None:
    """Raise UnsupportedModel for a layer that ran in the first pass and not in this later one."""
    if once := next((name for name in names if name not in wiring.calls), None):
        raise UnsupportedModel(
            f"Layer {once} runs in the first forward pass only: the network keeps its output. Compute it in every forward, or run the "
            "network once on an input before, which makes it a constant of the network."
        )


def check_curvature(model: nn.Module, names: Sequence[str], example: Batch) -> None:
    """Raise UnsupportedModel if the outputs have no second derivatives, or none by a weight of these layers of a prepared model."""
    trial = copy.deepcopy(model)
    layers = {name: trial.get_submodule(name) for name in names}
    weights = {name: float_weight(layer) for name, layer in layers.items() if type_of(layer).has_weights}
    if not weights:
        return
    for weight in weights.values():
        weight.requires_grad_(True)
    instead = "Hessian traces need second derivatives. Measure the sensitivity instead: --sensitivity=measured."
    try:
        with torch.enable_grad(), evaluating(trial), sdpa_kernel([SDPBackend.MATH]):  # fused attention has first derivatives alone
            output = predict(trial, example)
            cut = list(weights)[:1] if not output.requires_grad else []
            if not cut:
                gradients = torch.autograd.grad(output.square().sum(), list(weights.values()), create_graph=True, allow_unused=True)
                cut = [name for name, gradient in zip(weights, gradients, strict=True) if gradient is None]
                torch.stack([gradient.sum() for gradient in gradients if gradient is not None]).sum().backward()
    except AnybitError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"The network cannot be differentiated twice: {_first_sentence(error)} {instead}") from error
    if cut:
        raise UnsupportedModel(f"No gradient reaches layer {cut[0]} (no_grad, inference_mode or detach after it). {instead}")


@contextmanager
def as_observed(model: nn.Module, expected: Mapping[str, int]) -> Iterator[None]:
    """Require every pass inside the block to run each layer as often as the example did, `expected`. Raises UnsupportedModel naming one
    that does not."""
    calls: Counter[str] = Counter()

    def check(*_: Any) -> None:
        for name, count in expected.items():
            if calls[name] != count:
                raise UnsupportedModel(
                    f"Layer {name} runs {_times(calls[name])} on some inputs and {_times(count)} on others: its forward depends on "
                    f"the values or the number of its inputs. Keep it float: --keep='{name}=float'."
                )
        calls.clear()

    hooks = [model.register_forward_pre_hook(lambda *_: calls.clear()), model.register_forward_hook(check)]  # the last may have failed
    for name in expected:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
