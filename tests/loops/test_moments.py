"""Sums of second moments: few rows are stored as they are, and give the same numbers as their products."""

import pytest
import torch

from anybit.loops.moments import Sums
from anybit.networks.capture import MemoryBudget


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sides", [1, 2])
def test_stored_rows_have_the_moments_of_their_products(monkeypatch, centred, sides):
    rows = [torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(seed)) + 5 for seed in range(6)]

    def moments(thin):
        monkeypatch.setattr("anybit.loops.moments.THIN", thin)
        sums = Sums(rows[0], MemoryBudget(2**30), sides)
        for x, quantized in zip(rows[:3], rows[3:], strict=True):
            sums.add(*(x, quantized)[:sides])
        return sums.moments(centred)

    stored, multiplied, late = moments(0.25), moments(0.0), moments(0.2)  # of 40 inputs: all 9 rows, none, and up to 8 of 9
    factor = stored.form.factor
    hessian = factor.transpose(1, 2) @ factor
    for products in (multiplied, late):
        torch.testing.assert_close(hessian, products.form.hessian, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stored.means, products.means)
        if sides == 2:
            torch.testing.assert_close(stored.cross.transpose(1, 2) @ factor, products.cross, rtol=1e-4, atol=1e-3)
        else:
            assert stored.cross is None and products.cross is None
