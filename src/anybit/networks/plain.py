"""Plain weights, on a copy, in place of weights that are computed in every pass (weight and spectral norm, parametrizations, pruning),
shared by several layers, or held by recurrent layers: each becomes a parameter of one layer."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from anybit.data.batches import evaluating
from anybit.networks.copies import copied
from anybit.networks.layer_types import COVERED
from anybit.networks.recurrent import recurrent_layers


def plain_weights(model: nn.Module) -> nn.Module:
    """Return a copy in which every layer has a parameter of its own with the weight that it computes with in evaluation mode, or the model
    itself if this already holds.

    The computation of a weight and its sharing are gone: in training, each weight is free.
    """
    names = [name for name, module in model.named_modules() if any(_removers(module))]
    if not names and not any(recurrent_layers(model)):
        return _with_own_weights(model)
    clone = copied(model, {id(tensor): tensor.detach().clone() for tensor in _computed(model)})
    with evaluating(clone):
        for name in names:
            for remove in list(_removers(clone.get_submodule(name))):
                remove()
    for change in list(recurrent_layers(clone)):
        change()
    return _with_own_weights(clone)


def _with_own_weights(model: nn.Module) -> nn.Module:
    """Return a copy in which no layer shares its weight or bias, so that their bits may differ; the model itself if none does."""
    shared = _shared(model)
    if not shared:
        return model
    clone = copied(model)
    for name, key in shared:
        layer = clone.get_submodule(name)
        parameter = getattr(layer, key)
        setattr(layer, key, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    return clone


def _shared(model: nn.Module) -> Sequence[tuple[str, str]]:
    """Return (layer, parameter) for each layer that needs its own copy of a shared parameter."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, key))
    shared = []
    for several in (several for several in owners.values() if len(several) > 1):
        layers = [(name, key) for name, key in several if isinstance(model.get_submodule(name), COVERED)]
        shared += layers if len(layers) < len(several) else layers[1:]
    return shared


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Yield weights that a hook left as attributes in an earlier pass, with an autograd graph, which cannot be copied."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor) and value.grad_fn is not None)


def _removers(module: nn.Module) -> Iterator[Callable[[], object]]:
    """Yield functions that make each computed weight of a module plain."""
    if parametrize.is_parametrized(module):
        yield partial(_unparametrize, module)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            yield partial(remove_weight_norm, module, hook.name)
        elif isinstance(hook, SpectralNorm):
            yield partial(remove_spectral_norm, module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            yield partial(prune.remove, module, hook._tensor_name)


def _unparametrize(module: nn.Module) -> None:
    """Keep the current values of a module's parametrized tensors. PyTorch's own function would also delete them from the original, whose
    class a copy shares."""
    lists = module.get_submodule("parametrizations")
    values = {key: (getattr(module, key).detach().clone(), any(True for _ in one.parameters())) for key, one in lists.named_children()}
    module.__class__ = type(module).__mro__[1]
    del module._modules["parametrizations"]
    for key, (value, is_parameter) in values.items():
        if is_parameter:
            module.register_parameter(key, nn.Parameter(value))
        else:
            module.register_buffer(key, value)
