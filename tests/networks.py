"""Small seeded networks, one for each feature of real ones, and their inputs."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from anybit.data.batches import Batch, call
from anybit.data.samples import Calibration
from anybit.networks.layer_types import COVERED


class Items(Dataset):
    """A data set of these items, of any structure."""

    def __init__(self, items: list):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


class Chain(nn.Module):
    """conv, batch norm, ReLU6, conv, batch norm, in-place ReLU, linear: no join."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class WithoutGradients(Chain):
    """A network whose forward runs without gradients."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Block(nn.Module):
    """A residual block with an in-place sum and a functional ReLU; the shortcut is the identity where the widths agree."""

    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.shortcut = nn.Sequential() if narrow == wide else nn.Sequential(nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.block1, self.block2 = Block(6, 6), Block(6, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.block2(self.block1(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """Depthwise, grouped and pointwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.grouped = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.grouped(self.depthwise(self.stem(x))).mean((2, 3)))


class Upsampling(nn.Module):
    """Grouped transposed convolutions with batch norm."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up, self.bn = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)
        self.last = nn.ConvTranspose2d(6, 3, 3, padding=1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.bn(self.up(F.silu(self.down(x))))))


class Signal(nn.Module):
    """1-d convolutions, and a linear layer with a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6)
        self.conv2 = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.hidden, self.bn2, self.fc = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.leaky_relu(self.bn1(self.conv1(x)), 0.1)).mean(2)
        return self.fc(self.bn2(self.hidden(x)).relu_())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.hidden, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(F.gelu(self.hidden(self.words(tokens))).mean(1))


class TwoInputs(nn.Module):
    """Takes an image and a vector, by position or by keyword."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(image).mean((2, 3)) + self.linear(vector)))


class Attention(nn.Module):
    """nn.MultiheadAttention reads its own projections' weights; the linear layers around it are ordinary."""

    def __init__(self):
        super().__init__()
        self.inner, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.fc((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class PaddedConv2d(nn.Conv2d):
    """A convolution with its own forward, which pads to the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = PaddedConv2d(3, 6, 2), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class NoBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.fc = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.again(self.again(self.first(x))))


class SharedWeight(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.fc = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.right(F.relu(self.left(self.first(x))))))


class Windows(nn.Module):
    """Reshapes so that its inner layer sees several rows per sample, as in window attention."""

    def __init__(self):
        super().__init__()
        self.inner, self.fc = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.relu(self.inner(x.reshape(-1, 4)))
        return self.fc(rows.view(len(x), -1, 6).mean(1))


def zero_channel(model: nn.Module) -> nn.Module:
    """Set the first filter of the first convolution of `model`, and the batch norm after it, to zero."""
    with torch.no_grad():
        next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).weight[0] = 0
        next(norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)).bias[0] = 0
    return model


def make(cls: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose batch norms look trained: distinct statistics, and gammas of either sign."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls()
        for norm in model.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                norm.weight.data[::3] *= -1
                nn.init.normal_(norm.bias, std=0.3)
                if norm.running_mean is None:
                    continue
                norm.running_mean.normal_(std=0.2)
                norm.running_var.uniform_(0.2, 1.0)
    return model.eval()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrices(model: nn.Module) -> set[str]:
    """Return the names under which matrices are covered or reported: the layer's, or the parameter's if its module is not a layer."""
    keys = [key for key, parameter in model.named_parameters() if parameter.dim() > 1]
    owners = {key: model.get_submodule(key.rpartition(".")[0]) for key in keys}
    return {key.rpartition(".")[0] if isinstance(owners[key], COVERED) else key for key in keys}


def images(count: int, seed: int = 1) -> Tensor:
    return numbers(count, 3, 8, 8, seed=seed)


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(20, (count, 6), generator=torch.Generator().manual_seed(seed))


# name -> (makes the network, makes `count` inputs for it): networks that anybit supports unchanged
NETWORKS = {
    "chain": (Chain, images),
    "residual": (Residual, images),
    "depthwise": (Depthwise, images),
    "upsampling": (Upsampling, images),
    "signal": (Signal, lambda count: numbers(count, 2, 9)),
    "tokens": (Tokens, tokens),
    "two inputs": (TwoInputs, lambda count: (images(count), numbers(count, 4))),
    "named inputs": (TwoInputs, lambda count: {"vector": numbers(count, 4), "image": images(count)}),
    "attention": (Attention, lambda count: numbers(count, 3, 4)),
    "padded": (Padded, images),
    "no batch norm": (NoBatchNorm, images),
    "zero channel": (lambda: zero_channel(make(Chain)), images),
    "windows": (Windows, lambda count: numbers(count, 3, 4)),
}


def network_and_inputs(name: str, count: int = 4) -> tuple[nn.Module, Batch]:
    cls, inputs = NETWORKS[name]
    return make(cls), Batch(inputs(count))


def calibration_of(name: str, fitting: int = 24, held_out: int = 8, batch: int = 8) -> Calibration:
    """Batches of inputs for one of NETWORKS."""
    from anybit.data.batches import map_tensors, tensors_in

    inputs = NETWORKS[name][1](fitting + held_out)
    total = len(tensors_in(inputs)[0])
    batches = [
        Batch(map_tensors(inputs, functools.partial(lambda tensor, start: tensor[start : start + batch], start=start)))
        for start in range(0, total, batch)
    ]
    return Calibration(batches[: fitting // batch], batches[fitting // batch :])


@torch.no_grad()
def run(model: nn.Module, batch: Batch) -> Tensor:
    return call(model, batch.inputs)


def snapshot(model: nn.Module) -> tuple:
    """Return everything that must not change in a model that is only observed."""
    state = {key: (tensor.clone(), id(tensor)) for key, tensor in model.state_dict(keep_vars=True).items()}
    modules = [
        (name, type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks), sorted(module._modules))
        for name, module in model.named_modules()
    ]
    return state, modules


def assert_untouched(model: nn.Module, before: tuple) -> None:
    state, modules = snapshot(model)
    assert modules == before[1]
    assert list(state) == list(before[0])
    for key, (tensor, identity) in state.items():
        assert torch.equal(tensor, before[0][key][0]) and identity == before[0][key][1], key


class Odd(nn.Module):
    """Named layers and a forward function, for networks of one line."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


class Bessel(nn.Module):
    """A layer and a function that no exporter supports."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.special.bessel_j0(self.layer(x))
