"""Processes of distributed training, started by `torchrun` or `accelerate launch`, and their shared state."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device: str) -> str:
    """Join the other processes if a launcher started several; returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if device == "cuda" and world() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    return device


@torch.no_grad()
def share_state(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first, in place: networks are not always created from a seed."""
    if world() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


@torch.no_grad()
def average(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= world()
    return value


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average each gradient over the processes, in place."""
    if world() > 1:
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.div_(world()).split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


@torch.no_grad()
def average_tensors(tensors: Iterable[Tensor]) -> None:
    """Average each floating-point tensor over the processes, in place."""
    if world() > 1:
        for tensor in tensors:
            if tensor.is_floating_point():
                dist.all_reduce(tensor)
                tensor.div_(world())
