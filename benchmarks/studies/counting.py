"""Run anybit's command line and count expensive calls, for command_costs.py:

python counting.py COUNTS.json FILE.py:function ARGUMENT...

exporter   calls of torch.onnx.export
passes     forward passes through the whole network, including traced ones
copies     copies of the whole network by copy.deepcopy
"""

import copy
import functools
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


def layer_names(model: str) -> set[str]:
    """Return the names of the network's convolutions and linear layers."""
    file, _, function = model.rpartition(":")
    network = runpy.run_path(file)[function]()
    return {name for name, layer in network.named_modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))}


@contextmanager
def counting(names: set[str]) -> Iterator[dict[str, int]]:
    """Count the calls inside the block. A module is the whole network, prepared or not, if it has every layer under its original name."""
    counts = {"exporter": 0, "passes": 0, "copies": 0}
    tops = {name.partition(".")[0] for name in names}

    def is_whole(value: object) -> bool:
        return isinstance(value, nn.Module) and tops <= value._modules.keys() and names <= {name for name, _ in value.named_modules()}

    def seen(module: nn.Module, _: object) -> None:
        counts["passes"] += is_whole(module)

    def counted(function: Callable, kind: str, counts_if: Callable[[object], bool]) -> Callable:
        @functools.wraps(function)
        def wrapper(first, *more, **named):
            counts[kind] += counts_if(first)
            return function(first, *more, **named)

        return wrapper

    deepcopy, export = copy.deepcopy, torch.onnx.export
    hook = register_module_forward_pre_hook(seen)
    copy.deepcopy, torch.onnx.export = counted(deepcopy, "copies", is_whole), counted(export, "exporter", lambda _: True)
    try:
        yield counts
    finally:
        copy.deepcopy, torch.onnx.export = deepcopy, export
        hook.remove()


def main() -> None:
    """Write the counts, whatever the exit status."""
    output, model, *arguments = sys.argv[1:]
    names = layer_names(model)
    with counting(names) as counts:
        sys.argv = ["anybit", *arguments]
        try:
            runpy.run_module("anybit", run_name="__main__", alter_sys=True)
        finally:
            Path(output).write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
