"""Weights that are computed in every pass from others (weight and spectral norm, parametrizations, pruning), that several layers share, or
that recurrent layers hold, made plain on a copy: each a parameter of its own, of a layer."""

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
    """Return a copy whose weights are the parameters that they compute with, in evaluation mode, one for each layer; the model itself where
    all are.

    Nothing is left of what computed them, nor of a weight that was shared: in training, each is free.
    """
    names = [name for name, module in model.named_modules() if any(_removers(module))]
    if not names and not any(recurrent_layers(model)):
        return _with_own_weights(model)
    twin = copied(model, {id(tensor): tensor.detach().clone() for tensor in _computed(model)})
    with evaluating(twin):
        for name in names:
            for remove in list(_removers(twin.get_submodule(name))):
                remove()
    for change in list(recurrent_layers(twin)):
        change()
    return _with_own_weights(twin)


def _with_own_weights(model: nn.Module) -> nn.Module:
    """Return a copy in which no layer shares its weight or bias, which may take different bits; the model itself where none does."""
    shared = _shared(model)
    if not shared:
        return model
    twin = copied(model)
    for name, key in shared:
        layer = twin.get_submodule(name)
        parameter = getattr(layer, key)
        setattr(layer, key, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    return twin


def _shared(model: nn.Module) -> Sequence[tuple[str, str]]:
    """Return (layer, parameter) of each that needs one of its own, for another module that keeps the shared one."""
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
    """Yield the weights of an earlier pass that a hook has left as attributes, with a graph that no copy can have."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor) and value.grad_fn is not None)


def _removers(module: nn.Module) -> Iterator[Callable[[], object]]:
    """Yield what makes each computed weight of a module plain."""
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
    """Leave the values of a module's parametrized tensors. PyTorch's own function would take them from its original, too, whose class a
    copy shares."""
    lists = module.get_submodule("parametrizations")
    values = {key: (getattr(module, key).detach().clone(), any(True for _ in one.parameters())) for key, one in lists.named_children()}
    module.__class__ = type(module).__mro__[1]
    del module._modules["parametrizations"]
    for key, (value, is_parameter) in values.items():
        if is_parameter:
            module.register_parameter(key, nn.Parameter(value))
        else:
            module.register_buffer(key, value)
