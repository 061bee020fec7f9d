"""Handwritten digits (1,797 images of 8 x 8 pixels, bundled with scikit-learn) and a small residual network that trains in seconds.

python examples/digits.py runs/digits        writes digits.npz and weights.safetensors to that folder
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """[N, 1, 8, 8] -> [N, 10]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def network() -> DigitsNet:
    """Return the untrained network; --weights loads its trained weights."""
    return DigitsNet()


def images() -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 [1797, 8, 8, 1] in 0..255, and labels, int64 [1797], in one fixed random order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
    return pixels[..., None], digits.target[order].astype(np.int64)


def train(x: np.ndarray, y: np.ndarray, epochs: int = 15) -> DigitsNet:
    """Train with Adam and a one-cycle schedule, on images shifted at random by up to one pixel."""
    torch.manual_seed(0)
    model = DigitsNet()
    inputs, labels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(y)
    steps = epochs * (len(inputs) // 64)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for indices in torch.randperm(len(inputs))[: len(inputs) // 64 * 64].split(64):
            top, left = torch.randint(0, 3, (2,)).tolist()
            shifted = F.pad(inputs[indices], (1, 1, 1, 1))[:, :, top : top + 8, left : left + 8]
            loss = F.cross_entropy(model(shifted), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Write the data and the trained weights."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits")
    folder.mkdir(parents=True, exist_ok=True)
    x, y = images()
    parts = {"train": slice(0, 1297), "test": slice(1297, None)}
    np.savez(folder / "digits.npz", **{f"{a}_{name}": v[part] for name, part in parts.items() for a, v in (("x", x), ("y", y))})
    model = train(x[parts["train"]], y[parts["train"]])
    save_file(model.state_dict(), folder / "weights.safetensors")
    test = torch.from_numpy(x[parts["test"]]).permute(0, 3, 1, 2).float() / 255
    accuracy = 100 * (model(test).argmax(1).numpy() == y[parts["test"]]).mean()
    print(f"float network: {accuracy:.1f} % of {len(test)} test digits correct, weights in {folder / 'weights.safetensors'}")


if __name__ == "__main__":
    main()
