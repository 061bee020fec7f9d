"""Patches times weight rows equal the layer's outputs at every position."""

import pytest
import torch
from torch import nn

from anybit.networks.layers import float_weight, weight_rows
from anybit.networks.patches import draw_places, patches, real_rows

LAYERS = {
    "grouped": (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (3, 6, 9, 8)),
    "same": (nn.Conv2d(6, 8, (3, 2), padding="same", dilation=2), (3, 6, 9, 8)),
    "reflect": (nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 8)),
    "circular, uneven": (nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular", groups=4), (2, 4, 5, 6)),
    "one dimension": (nn.Conv1d(4, 4, 5, stride=3, padding=2, groups=4), (2, 4, 17)),
    "three dimensions": (nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 6, 5, 4)),
    "transposed, dilated": (nn.ConvTranspose2d(6, 4, 4, stride=3, padding=2, output_padding=2, dilation=2), (2, 6, 5, 4)),
    "transposed, cut": (nn.ConvTranspose1d(4, 6, 2, stride=2, padding=2), (2, 4, 9)),
    "linear": (nn.Linear(5, 3), (2, 7, 5)),
}


def products(layer: nn.Module, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return patches times weight rows plus the bias, [places, channels]."""
    drawn = patches(layer, x, places)
    weight = weight_rows(layer, float_weight(layer)).unflatten(0, (len(drawn), -1))
    return (drawn @ weight.transpose(1, 2)).permute(1, 0, 2).flatten(1) + layer.bias


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_rows_equal_outputs(name):
    layer, shape = LAYERS[name]
    x, generator = torch.randn(*shape), torch.Generator().manual_seed(0)
    outputs = layer(x).flatten(0, -2) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1).flatten(0, -2)
    everywhere = draw_places(layer, x.shape, 10**6, generator)
    some = draw_places(layer, x.shape, 7, generator)
    assert len(everywhere) == len(outputs) and len(some) == 7
    torch.testing.assert_close(products(layer, x, everywhere), outputs)
    torch.testing.assert_close(products(layer, x, some), outputs[some])


def test_linear_has_no_padding_patches():
    x, mask = torch.randn(2, 4, 3), torch.tensor([[True, True, True, False], [True, False, False, False]])
    rows = real_rows(nn.Linear(3, 2), x, mask)
    assert torch.equal(rows, torch.cat([x[0, :3], x[1, :1]]))
