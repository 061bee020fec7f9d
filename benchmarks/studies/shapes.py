"""Networks of well-known shapes with random weights, to measure speed, size and exactness; none is trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2016)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(*_normed(inputs, width, 3, stride), nn.ReLU(), *_normed(width, width, 3))
        self.shortcut = nn.Sequential(*_normed(inputs, width, 1, stride)) if stride > 1 or inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (He et al., 2016)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = width * self.expansion
        self.body = nn.Sequential(
            *_normed(inputs, width, 1), nn.ReLU(), *_normed(width, width, 3, stride), nn.ReLU(), *_normed(width, outputs, 1)
        )
        self.shortcut = nn.Sequential(*_normed(inputs, outputs, 1, stride)) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Images [N, 3, 224, 224] -> 1,000 classes."""

    def __init__(self, block: type[Basic] | type[Bottleneck], depths: tuple[int, ...]):
        super().__init__()
        self.stem = nn.Sequential(*_normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        inputs, blocks = 64, []
        for stage, depth in enumerate(depths):
            for index in range(depth):
                blocks.append(block(inputs, 64 * 2**stage, 2 if stage and not index else 1))
                inputs = 64 * 2**stage * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Inverted(nn.Module):
    """Expand, depthwise, project (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
        super().__init__()
        width = inputs * expand
        grown = [*_normed(inputs, width, 1), nn.ReLU6()] if expand > 1 else []
        self.body = nn.Sequential(*grown, *_normed(width, width, 3, stride, width), nn.ReLU6(), *_normed(width, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


class MobileNetV2(nn.Module):
    """Images [N, 3, 224, 224] -> 1,000 classes."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*_normed(3, 32, 3, 2), nn.ReLU6())
        inputs, blocks = 32, []
        for expand, outputs, depth, stride in self.STAGES:
            for index in range(depth):
                blocks.append(Inverted(inputs, outputs, 1 if index else stride, expand))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.top = nn.Sequential(*_normed(320, 1280, 1), nn.ReLU6())
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.top(self.blocks(self.stem(x))).mean((2, 3)))


class Encoder(nn.Module):
    """One transformer layer, norms after its sums (Devlin et al., 2019)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.joined = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        attention = (query @ key.transpose(2, 3) * (width // self.heads) ** -0.5).softmax(-1)
        x = self.first(x + self.joined((attention @ value).transpose(1, 2).reshape(batch, length, width)))
        return self.second(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Sequential):
    """The encoder of BERT-base on embedded tokens [N, 128, 768]; attention itself stays float."""

    def __init__(self):
        super().__init__(*(Encoder(768, 12) for _ in range(12)))


def bert_base() -> nn.Module:
    torch.manual_seed(0)
    return Bert().eval()


def linears_4096() -> nn.Module:
    """Create three square linear layers; at one row at a time, their time is that of reading the weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096)).eval()


def resnet18() -> nn.Module:
    return _random(ResNet(Basic, (2, 2, 2, 2)))


def resnet50() -> nn.Module:
    return _random(ResNet(Bottleneck, (3, 4, 6, 3)))


def mobilenet_v2() -> nn.Module:
    return _random(MobileNetV2())


def _random(network: nn.Module) -> nn.Module:
    """Set weights and batch norms as training might: random factors, and the statistics of noise."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    with torch.no_grad():  # so that activations keep their scale at any depth
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        network(torch.randn(4, 3, 224, 224, generator=generator))
    return network.eval()
