"""Weights that are computed in every pass from others (weight and spectral norm, parametrizations, pruning), made plain on a copy."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from anybit.data.batches import evaluating
from anybit.networks.copies import copied


def plain_weights(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are the parameters that they compute with, in evaluation mode; the model itself where all are.

    Nothing is left of what computed them: in training, such a weight is free.
    """
    names = [name for name, module in model.named_modules() if any(_removers(module))]
    if not names:
        return model
    twin = copied(model, {id(tensor): tensor.detach().clone() for tensor in _computed(model)})
    with evaluating(twin):
        for name in names:
            for remove in list(_removers(twin.get_submodule(name))):
                remove()
    return twin


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
