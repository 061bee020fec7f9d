"""Networks of torchvision, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.inputs import Inputs, images
from benchmarks.zoo.network import FewUpdates, Heads, RegionHeads, ZooNetwork

CLASSIFICATION: dict[str, dict[str, Any]] = {
    "convnext_tiny": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
    "mnasnet0_5": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "regnet_x_400mf": {},
    "regnet_y_400mf": {},
    "resnet18": {},
    "resnet50": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_0": {},
    "squeezenet1_1": {},
    "swin_t": {},
    "swin_v2_t": {},
    "wide_resnet50_2": {},
}
"""Name -> arguments of the constructor."""

SIZES = {"inception_v3": 128, "wide_resnet50_2": 64, "resnext50_32x4d": 64}
"""Side of the images in pixels, where it is not 96."""


def build(name: str, wrapper: Callable[[nn.Module], nn.Module] | None = None, **arguments: Any) -> nn.Module:
    """Create the network with random weights, those of its backbone included."""
    from torchvision import models

    without = {"weights_backbone": None} if "backbone" in arguments.pop("parts", "") else {}
    network = models.get_model(name, weights=None, **without, **arguments).eval()
    return network if wrapper is None else wrapper(network).eval()


def small_vit() -> nn.Module:
    """Create ViT-B/16 with two blocks."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=12, hidden_dim=768, mlp_dim=3072).eval()


def small_maxvit() -> nn.Module:
    """Create MaxViT-T with one block per stage."""
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 64, 2, [64, 128, 256, 512], [1, 1, 1, 1], 32, 0.0).eval()


def small_classifier(name: str, channels: int, first: int, width: int = 1024) -> nn.Module:
    """Create AlexNet or VGG with a tenth of the weights: its linear layers, the first of which is `first` in the classifier, are narrower
    and read 2 x 2 positions."""
    network = build(name)
    network.avgpool, network.classifier[first] = nn.AdaptiveAvgPool2d(2), nn.Linear(channels * 4, width)
    network.classifier[first + 3], network.classifier[6] = nn.Linear(width, width), nn.Linear(width, 1000)
    return network.eval()


def _of_parts(name: str, wrapper: Callable[[nn.Module], nn.Module] | None = None) -> Callable[[], nn.Module]:
    return partial(build, name, wrapper, parts="backbone")


NETWORKS: dict[str, ZooNetwork] = {
    name: ZooNetwork(partial(build, name, **arguments), images(SIZES.get(name, 96))) for name, arguments in CLASSIFICATION.items()
} | {
    "maxvit_t": ZooNetwork(small_maxvit, images(64)),
    "alexnet": ZooNetwork(partial(small_classifier, "alexnet", 256, 1), images(96)),
    "vgg11": ZooNetwork(partial(small_classifier, "vgg11", 512, 0), images(64)),
    "vgg11_bn": ZooNetwork(partial(small_classifier, "vgg11_bn", 512, 0), images(64)),
    "vit_b_16": ZooNetwork(small_vit, images(64)),
    "fcn_resnet50": ZooNetwork(_of_parts("fcn_resnet50"), images(64)),
    "deeplabv3_mobilenet_v3_large": ZooNetwork(_of_parts("deeplabv3_mobilenet_v3_large"), images(96)),
    "lraspp_mobilenet_v3_large": ZooNetwork(_of_parts("lraspp_mobilenet_v3_large"), images(96)),
    "ssdlite320_mobilenet_v3_large, heads": ZooNetwork(_of_parts("ssdlite320_mobilenet_v3_large", Heads), images(160)),
    "retinanet_resnet50_fpn, heads": ZooNetwork(_of_parts("retinanet_resnet50_fpn", Heads), images(96)),
    "retinanet_resnet50_fpn_v2, heads": ZooNetwork(_of_parts("retinanet_resnet50_fpn_v2", Heads), images(96)),
    "fcos_resnet50_fpn, heads": ZooNetwork(_of_parts("fcos_resnet50_fpn", Heads), images(96)),
    "fasterrcnn_mobilenet_v3_large_320_fpn, heads": ZooNetwork(_of_parts("fasterrcnn_mobilenet_v3_large_320_fpn", RegionHeads), images(96)),
    "fasterrcnn_resnet50_fpn, heads": ZooNetwork(_of_parts("fasterrcnn_resnet50_fpn", RegionHeads), images(64)),
    "raft_small": ZooNetwork(partial(build, "raft_small", FewUpdates), Inputs(keyword="first", second="second", size=128)),
    "r3d_18": ZooNetwork(partial(build, "r3d_18"), images(32, frames=8)),
    "r2plus1d_18": ZooNetwork(partial(build, "r2plus1d_18"), images(32, frames=8)),
    "mc3_18": ZooNetwork(partial(build, "mc3_18"), images(32, frames=8)),
    "swin3d_t": ZooNetwork(partial(build, "swin3d_t"), images(64, frames=4)),
}
