"""Attention of transformers computed by layers, so that its products can be quantized."""

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anybit.errors import UnsupportedModel
from anybit.networks.copies import copied
from anybit.networks.matmul import Matmul
from anybit.progress import tell

ATTENTION = "anybit"


# Attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(query key^T scaling + position bias + mask) value through the module's two Matmul layers; [N, heads, T, d] ->
    [N, T, heads, d].

    Fewer keys' and values' heads serve several queries' heads each; `s_aux`, [heads], are the logits of a token without a value (an
    attention sink). Raises UnsupportedModel for arguments that it would have to ignore.
    """
    if others.get("head_mask") is not None:
        raise UnsupportedModel(f"{type(module).__name__} passes head_mask to its attention, which anybit does not cover yet.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    product, mixture = module.get_submodule("scores"), module.get_submodule("mixture")
    scores = product(query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if (position_bias := others.get("position_bias")) is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    if (sinks := others.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    shares = nn.functional.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        shares = shares[..., :-1]
    shares = nn.functional.dropout(shares, dropout, module.training)
    return mixture(shares, value).transpose(1, 2).contiguous(), shares


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose attention uses Matmul layers `scores` and `mixture` in each attention module, with Linear layers in place of
    Conv1D, and without tied weights.

    Outputs are those of the model up to float rounding. Half-precision weights become float32.
    """
    model = _in_float32(cast(PreTrainedModel, copied(model)))
    model.config.return_dict = True
    for network in model.modules():
        if isinstance(network, PreTrainedModel) and hasattr(network.config, "use_cache"):
            network.config.use_cache = False  # whole sequences are computed at once
    for module in model.modules():
        if _calls_interface(module):
            module.add_module("scores", Matmul(transposed=True))
            module.add_module("mixture", Matmul())
    if any(_calls_interface(module) for module in model.modules()):
        model.set_attn_implementation(ATTENTION)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _linear(module))
    _make_plain(model)
    _untie(model)
    return model


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Convert half-precision weights to float32, in place, and report it."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(f"{type(model).__name__} is already quantized. Give the float network.")
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters() if tensor.dtype in (torch.float16, torch.bfloat16)}
    if not types:
        return model
    tell(
        "note",
        note=f"{type(model).__name__} has weights of {', '.join(sorted(types))}: computed in float32, and stored as such where kept float",
    )
    model.float()
    model.config.dtype = torch.float32
    return model


def _calls_interface(module: nn.Module) -> bool:
    """Return whether the module's forward gets its attention function from transformers' interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _linear(layer: Conv1D) -> nn.Linear:
    """Turn GPT-2's layer, which stores its weight transposed, into an equal Linear."""
    linear = nn.Linear(layer.weight.shape[0], layer.weight.shape[1], device=layer.weight.device, dtype=layer.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    return linear


def _make_plain(model: PreTrainedModel) -> None:
    """Store the weights that a parametrization, such as weight norm, computes in every pass.

    PyTorch's own function would also delete them from the class, which a copy shares with its original.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            values = {key: getattr(module, key).detach().clone() for key in cast(nn.ModuleDict, module.parametrizations)}
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
            for key, value in values.items():
                module.register_parameter(key, nn.Parameter(value))


def _untie(model: PreTrainedModel) -> None:
    """Give each layer its own weight in place of an embedding's, so that their bits may differ.

    An encoder-decoder's `shared`, which does not run, becomes the first layer with its weight.
    """
    owners: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] != "shared":
            _own_weight(module, owners, model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) and id(module.weight) in owners:
            model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = owners[id(module.weight)]
        elif isinstance(module, nn.Linear) and id(module._parameters.get("weight")) in owners:
            _own_weight(module, owners, model)


def _own_weight(layer: nn.Embedding | nn.Linear, owners: dict[int, nn.Module], model: PreTrainedModel) -> None:
    if id(layer.weight) in owners and owners[id(layer.weight)] is not layer:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        model.config.tie_word_embeddings = False
    else:
        owners[id(layer.weight)] = layer
