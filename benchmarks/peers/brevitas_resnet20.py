"""Quantize the CIFAR-10 ResNet-20 after training with Brevitas and report accuracy and time as JSON.

The flow is that of Brevitas' own image-classification example with its layerwise backend: trace the network,
merge batch norm, put quantizers on the input and weight of every convolution and linear layer (the shortcuts
stay in float), calibrate ranges, adjust the weights layer by layer, correct the biases. Weights are symmetric
per output channel, activations asymmetric per tensor, biases 32 bits; the first and last layer have 8-bit
weights and activations. The default recipe is the most accurate of those tried for its time; --recipe selects
another.

Set up a separate environment and run one process at a time, so that times are comparable:

    python -m venv venv && venv/bin/pip install -r requirements.txt
    OMP_NUM_THREADS=1 venv/bin/python brevitas_resnet20.py --data cifar10.npz \
        --weights resnet20_cifar10.safetensors --weight-bits 4 --activation-bits 8 \
        --samples 1024 --seed 0 --threads 1 --output out.json

`cifar10.npz` holds uint8 images x_train, x_test [N, 32, 32, 3] and labels y_train, y_test.
"""

import argparse
import json
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import brevitas.nn as qnn
import numpy as np
import torch
import torch.nn.functional as F
from brevitas.core.scaling.standalone import ParameterFromStatsFromParameterScaling
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.gpfq import GPFQ, gpfq_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.qronos import Qronos
from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
from brevitas.inject import value
from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE, Int32Bias
from brevitas.quant.shifted_scaled_int import ShiftedUint8ActPerTensorFloat, ShiftedUint8ActPerTensorFloatMSE
from machine import machine, versions
from safetensors.torch import load_file
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FIRST_LAST_BITS = 8


# The network: CIFAR ResNet of He et al. with parameter-free (option A) shortcuts.


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = outputs - inputs

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x
        half = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))


class ResNet20(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


def load_network(weights: Path) -> nn.Module:
    network = ResNet20()
    state = load_file(weights)
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{weights} is not this ResNet-20: missing {missing}, unexpected {unexpected}")
    return network.eval()


# Data


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W]"""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return ((x - mean) / std).contiguous()


def calibration_images(x_train: np.ndarray, samples: int, seed: int) -> Tensor:
    chosen = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(seed))[:samples]
    return normalise(x_train[chosen.numpy()])


@torch.no_grad()
def top1(network: nn.Module, images: np.ndarray, labels: np.ndarray, batch: int = 500) -> float:
    correct = 0
    for start in range(0, len(images), batch):
        predicted = network(normalise(images[start : start + batch])).argmax(1)
        correct += (predicted == torch.from_numpy(labels[start : start + batch])).sum().item()
    return round(100 * correct / len(images), 2)


# Quantization


@dataclass(frozen=True)
class Recipe:
    weights: str  # how codes are chosen: "nearest", "gptq", "gpfq" or "qronos"
    activation_range: str = "mse"  # or "percentile"
    equalize: int = 0  # iterations of cross-layer weight equalization; 20 cost accuracy here
    bias_correction: bool = True


RECIPES = {
    "gptq": Recipe("gptq"),
    "gptq-percentile": Recipe("gptq", activation_range="percentile"),
    "gptq-equalized": Recipe("gptq", equalize=20),
    "gpfq": Recipe("gpfq"),
    "qronos": Recipe("qronos"),
    "nearest": Recipe("nearest"),
    "ranges-only": Recipe("nearest", bias_correction=False),
}
DEFAULT_RECIPE = "gptq"
BATCH = 128


def is_first_or_last(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or layer.in_channels == 3


def quantizers(recipe: Recipe, weight_bits: int, activation_bits: int) -> dict:
    """Return the quantizers of a convolution or linear layer, in the form that Brevitas' layerwise backend accepts."""
    ranges = {"mse": ShiftedUint8ActPerTensorFloatMSE, "percentile": ShiftedUint8ActPerTensorFloat}
    return {
        "weight_quant": Int8WeightPerChannelFloatMSE.let(
            bit_width=value(lambda module: FIRST_LAST_BITS if is_first_or_last(module) else weight_bits),
            narrow_range=False,
            scaling_impl=ParameterFromStatsFromParameterScaling,  # ranges of the float weights
        ),
        "input_quant": ranges[recipe.activation_range].let(
            bit_width=value(lambda module: FIRST_LAST_BITS if is_first_or_last(module) else activation_bits)
        ),
        "bias_quant": Int32Bias,
        "return_quant_tensor": False,
    }


def forward_all(network: nn.Module, batches: list[Tensor]) -> None:
    for images in batches:
        network(images)


def adjust_weights(network: nn.Module, recipe: Recipe, batches: list[Tensor]) -> None:
    if recipe.weights == "nearest":
        return
    modes = {
        "gpfq": partial(gpfq_mode, algorithm_impl=GPFQ),
        "qronos": partial(gpfq_mode, algorithm_impl=partial(Qronos, alpha=1e-6)),
        "gptq": partial(gptq_mode, use_quant_activations=True),
    }
    with modes[recipe.weights](network, act_order=True) as mode:
        for _ in range(mode.num_layers):
            forward_all(mode.model, batches)
            mode.update()


@torch.no_grad()
def quantize(network: nn.Module, images: Tensor, recipe: Recipe, weight_bits: int, activation_bits: int) -> nn.Module:
    batches = list(images.split(BATCH))
    network = preprocess_for_quantize(network, equalize_iters=recipe.equalize, merge_bn=True)
    kwargs = quantizers(recipe, weight_bits, activation_bits)
    layer_map = {nn.Conv2d: (qnn.QuantConv2d, kwargs), nn.Linear: (qnn.QuantLinear, kwargs)}
    network = layerwise_quantize(network, compute_layer_map=layer_map).eval()
    network(batches[0])  # sets the weight ranges
    with calibration_mode(network):
        forward_all(network, batches)
    adjust_weights(network, recipe, batches)
    if recipe.bias_correction:
        with bias_correction_mode(network):
            forward_all(network, batches)
    return network


# Report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--recipe", choices=RECIPES, default=DEFAULT_RECIPE)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    with np.load(args.data) as data:
        images = calibration_images(data["x_train"], args.samples, args.seed)
        x_test, y_test = data["x_test"], data["y_test"].astype(np.int64)
    network = load_network(args.weights)
    float_top1 = top1(network, x_test, y_test)

    started = time.perf_counter()
    quantized = quantize(network, images, RECIPES[args.recipe], args.weight_bits, args.activation_bits)
    seconds = time.perf_counter() - started

    report = json.dumps(
        {
            "peer": "brevitas",
            "recipe": args.recipe,
            "weight_bits": args.weight_bits,
            "activation_bits": args.activation_bits,
            "top1": top1(quantized, x_test, y_test),
            "float_top1": float_top1,
            "seconds": round(seconds, 1),
            "samples": args.samples,
            "seed": args.seed,
            "threads": args.threads,
            "versions": versions("torch", "brevitas", "numpy"),
            "machine": machine(),
        },
        indent=2,
    )
    print(report)
    if args.output:
        args.output.write_text(report + "\n")


if __name__ == "__main__":
    main()
