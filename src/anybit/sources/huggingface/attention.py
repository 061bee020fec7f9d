"""Attention of transformers run through layers, so that its products can be quantized."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anybit.errors import UnsupportedModel
from anybit.networks.matmul import Matmul

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
    """Compute softmax(query key^T scaling + mask) value through the module's two Matmul layers; [N, heads, T, d] -> [N, T, heads, d].

    Keys and values of fewer heads serve several queries' heads each. Raises UnsupportedModel on what it would have to leave out.
    """
    left_out = [name for name in ("position_bias", "s_aux", "head_mask") if others.get(name) is not None]
    if left_out:
        raise UnsupportedModel(f"{type(module).__name__} passes {', '.join(left_out)} to its attention, which anybit does not cover yet.")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    product, mixture = module.get_submodule("scores"), module.get_submodule("mixture")
    scores = product(query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = nn.functional.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    shares = nn.functional.dropout(shares, dropout, module.training)
    return mixture(shares, value).transpose(1, 2).contiguous(), shares


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose attention runs through Matmul layers `scores` and `mixture` of each attention module, with Linear layers in place
    of Conv1D, and without tied weights.

    Outputs are those of the model up to float rounding. Raises UnsupportedModel for an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder, which is not covered yet. Encoders and decoders are.")
    model = copy.deepcopy(model)
    model.config.return_dict = True
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # whole sequences are run at once
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
    _untie(model)
    return model


def _calls_interface(module: nn.Module) -> bool:
    """Return whether the module's forward looks its attention function up in transformers' interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _linear(layer: Conv1D) -> nn.Linear:
    """Turn GPT-2's layer, which stores its weight transposed, into the Linear that it is."""
    linear = nn.Linear(layer.weight.shape[0], layer.weight.shape[1], device=layer.weight.device, dtype=layer.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    return linear


def _untie(model: PreTrainedModel) -> None:
    """Give the output layer a weight of its own where it shares the embedding's: two layers may take different bits."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight is getattr(words, "weight", None):
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
