"""Normalization by running statistics: which modules do it, and what remains of one after its statistics are folded into a layer.

A norm's forward may continue after the normalization: with dropout and an activation (timm's BatchNormAct2d), or with custom code. That
part stays in the folded network, at the norm's place and under its name: the norm's class becomes a subclass of *its own* class whose
forward skips the normalization.
"""

import copy
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybit.data.batches import tensors_in

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_PLAIN_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
_AFFINE = {"batch_norm", "addcmul", *(f"{prefix}{name}" for prefix in ("", "r", "i") for name in ("add", "sub", "mul", "div", "truediv"))}


def is_norm(module: nn.Module) -> bool:
    """Return whether `module` normalizes channels: a batch norm of torch, or any module with its four tensors (frozen ones).

    False for a norm that has been folded.
    """
    if isinstance(module, FoldedNorm):
        return False
    return isinstance(module, BATCH_NORMS) or _has_tensors_of_a_norm(module)


def _has_tensors_of_a_norm(module: nn.Module) -> bool:
    if module._buffers.get("running_mean") is None and module._parameters.get("running_mean") is None:  # nearly all, so first
        return False
    own = module._parameters | module._buffers
    shapes = {tensor.shape for tensor in map(own.get, _TENSORS) if tensor is not None}
    return set(_TENSORS) <= set(own) and len(shapes) == 1 and len(shapes.pop()) == 1


def keeps_statistics(norm: nn.Module) -> bool:
    """Return whether the norm has running statistics, by which it normalizes in evaluation mode."""
    return getattr(norm, "running_mean", None) is not None and getattr(norm, "running_var", None) is not None


def tracking_norms(model: nn.Module) -> list[BatchNorm]:
    """Return the batch norms whose running statistics can be re-estimated, in order of definition."""
    return [m for m in model.modules() if isinstance(m, BATCH_NORMS) and is_norm(m) and m.running_mean is not None]


def running_statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return running mean and variance, [channels] each, of a norm that keeps them."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    return mean, variance


def gamma_and_beta(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the norm's own factors and summands, [channels] each, or None."""
    gamma, beta = norm.weight, norm.bias
    assert isinstance(gamma, Tensor | None) and isinstance(beta, Tensor | None)
    return gamma, beta


def gain_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the gain and shift of each channel, [channels] each, in double precision."""
    (mean, variance), (gamma, beta) = running_statistics(norm), gamma_and_beta(norm)
    deviation = torch.sqrt(variance.double() + float(getattr(norm, "eps", 1e-5)))
    gain = 1 / deviation if gamma is None else gamma.double() / deviation
    shift = -mean.double() * gain
    return gain, shift if beta is None else shift + beta.double()


@torch.no_grad()
def only_normalizes_first(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether the norm's forward on an input of `shape` [N, channels, ...] begins with the normalization and nothing else uses it.

    True for torch's own norms by definition; others are tested on random numbers with the expected statistics.
    """
    if type(norm).forward in _PLAIN_FORWARDS:
        return True
    mean, variance = running_statistics(norm)
    per_channel = (1, -1, *[1] * (len(shape) - 2))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(mean)
    x = noise * variance.sqrt().view(per_channel) + mean.view(per_channel)
    gain, shift = (part.to(x.dtype).view(per_channel) for part in gain_and_shift(norm))
    with suppress(Exception):  # a custom forward may reject any input
        expected = norm(x.clone())
        rest = without_normalization(copy.deepcopy(norm))(x * gain + shift)
        return torch.allclose(rest, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    return False


class FoldedNorm(nn.Module):
    """Mixin for the class of every folded norm: its forward continues after the normalization."""

    def forward(self, x: Tensor, *args, **kwargs):
        with _PastNormalization(x):
            return super().forward(x, *args, **kwargs)


class _PastNormalization(TorchFunctionMode):
    """Return a value unchanged from the operations that normalize it, until another operation reads it.

    These are a batch norm, or products and sums with tensors that do not depend on the value, as frozen norms are written.
    """

    def __init__(self, value: Tensor):
        super().__init__()
        self.value: Tensor | None = value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        value = self.value
        if value is None or not any(tensor is value for tensor in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        if name in _AFFINE:
            self.value = None if name == "batch_norm" else value
            return value
        output = func(*args, **kwargs)
        if any(tensor is not value for tensor in tensors_in(output)):
            self.value = None
        return output


_FOLDED: dict[type[nn.Module], type[FoldedNorm]] = {}


def without_normalization(norm: nn.Module) -> nn.Module:
    """Return the operations of `norm` after the normalization: none, or the norm itself, changed in place, without its own tensors."""
    if type(norm).forward in _PLAIN_FORWARDS:
        return nn.Identity()
    for key in (*_TENSORS, "num_batches_tracked"):
        tensor = norm._parameters.pop(key, norm._buffers.pop(key, None))
        # The forward may still read them, without effect.
        neutral = None if tensor is None or not tensor.dim() else torch.full_like(tensor.detach(), float(key in ("weight", "running_var")))
        norm.register_buffer(key, neutral, persistent=False)
    norm.__class__ = _folded_class(type(norm))
    return norm


def _folded_class(cls: type[nn.Module]) -> type[FoldedNorm]:
    """Return the subclass of `cls` that does not normalize, created on first use."""
    if cls not in _FOLDED:
        pickled = {"__reduce__": lambda self: (_new_folded, (cls,), self.__dict__)}  # its class is derived from the author's own
        _FOLDED[cls] = type(f"Folded{cls.__name__}", (FoldedNorm, cls), {"__module__": cls.__module__, **pickled})
    return _FOLDED[cls]


def _new_folded(cls: type[nn.Module]) -> FoldedNorm:
    folded = _folded_class(cls)
    return folded.__new__(folded)
