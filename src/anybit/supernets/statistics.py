"""Batch-norm statistics of subnets."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anybit.methods.multiquant import SwitchableNorm
from anybit.networks.norms import BatchNorm, running_statistics, tracking_norms
from anybit.scheme import Scheme

# Batch norms


def active_norms(model: nn.Module) -> list[BatchNorm]:
    """Return the batch norms that the current subnet computes with, in order of definition."""
    idle = {
        id(norm) for module in model.modules() if isinstance(module, SwitchableNorm) for norm in module.norms if norm is not module.chosen()
    }
    return [norm for norm in tracking_norms(model) if id(norm) not in idle]


def statistics_of(model: nn.Module) -> Tensor:
    """Return means and variances of all active batch norms, one after another, [numbers]."""
    parts = [part for norm in active_norms(model) for part in running_statistics(norm)]
    return torch.cat(parts).clone() if parts else torch.zeros(0)


@torch.no_grad()
def set_statistics(model: nn.Module, statistics: Tensor) -> None:
    """Restore the result of `statistics_of`."""
    at = 0
    for norm in active_norms(model):
        for part in running_statistics(norm):
            part.copy_(statistics[at : at + part.numel()])
            at += part.numel()


@dataclass(frozen=True)
class KnownSubnet:
    """A subnet with stored batch-norm statistics [numbers] and edge ranges [edges, 2]."""

    scheme: Scheme
    statistics: Tensor
    edges: Tensor
