import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Residual, assert_untouched, calibration_of, images, make, network_and_inputs, numbers, run, snapshot
from torch import nn

from anybit.data.batches import Batch, tensors_in
from anybit.errors import UnsupportedModel
from anybit.methods.batchnorm_tuning import join
from anybit.networks.capture import MemoryBudget, capture, chunks, input_samples
from anybit.networks.wiring import observe

LIMITS = {"memory": 2**30, "disk": 0, "both": 20_000}


def watched(model: nn.Module, name: str, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's input and output on one batch, cloned in hooks."""
    seen = []
    module = model.get_submodule(name)
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())),
        module.register_forward_hook(lambda module, args, output: seen.append(output.clone())),
    ]
    with torch.no_grad():
        model(batch.inputs)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[-1]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", ["block1", "block1.conv1", "block2.bn2", "fc"])
def test_captured_tensors_equal_those_of_hooks(name, limit):
    """block1's input and block2.bn2's output are overwritten in place later in the forward pass."""
    model, batches = make(Residual), [Batch(images(n, seed=n)) for n in (4, 4, 3)]
    before = snapshot(model)
    captured = capture(model, name, batches, 11, MemoryBudget(LIMITS[limit]), outputs=True)
    expected_input, outputs = watched(model, name, join(batches))
    everything = torch.arange(11)
    (read,), kwargs = captured.batch(everything)
    assert kwargs == {}
    torch.testing.assert_close(read, expected_input, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(captured.outputs(everything), outputs, atol=1e-6, rtol=1e-5)
    assert_untouched(model, before)


def test_disk_and_memory_give_the_same_values():
    model, batches = make(Residual), [Batch(images(4, seed=seed)) for seed in range(3)]
    budgets = [MemoryBudget(limit) for limit in LIMITS.values()]
    captured = [capture(model, "block2", batches, 12, budget, outputs=True) for budget in budgets]
    order = torch.tensor([7, 0, 11, 7])
    assert all(torch.equal(one.batch(order)[0][0], captured[0].batch(order)[0][0]) for one in captured)
    assert all(torch.equal(one.outputs(order), captured[0].outputs(order)) for one in captured)
    assert budgets[0].spilled == 0 and budgets[1].used == 0
    assert budgets[2].used and budgets[2].spilled and budgets[2].used <= LIMITS["both"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.uint8, torch.float16])
def test_every_dtype_spills(dtype):
    tensor = MemoryBudget(0).allocate((3, 2), dtype)
    tensor.copy_(torch.tensor([[0, 1], [1, 0], [1, 1]]))
    assert tensor.dtype == dtype and tensor.tolist() == torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype).tolist()


def test_spilled_tensors_leave_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    budget = MemoryBudget(100)
    tensors = [budget.allocate((20,), torch.float32).fill_(index) for index in range(3)]
    assert budget.used <= 100 and budget.spilled == 160
    assert list(tmp_path.iterdir()) == []
    assert [float(tensor.sum()) for tensor in tensors] == [0, 20, 40]


class Gated(nn.Module):
    """A block that takes a keyword, a mask shared by all samples, and a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask, power, *, gate):
        return self.linear(x * mask) ** power * gate


class UsesGated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gated = Gated()

    def forward(self, x):
        return self.gated(x, torch.tensor([1.0, 0.0, 1.0, 1.0])[None], 2, gate=x.mean(1, keepdim=True))


def test_keywords_masks_and_numbers_are_captured():
    model, batches = make(UsesGated), [Batch(numbers(5, 4, seed=seed)) for seed in (1, 2)]
    captured = capture(model, "gated", batches, 10, MemoryBudget(2**20), outputs=True)
    picked = torch.tensor([9, 2])
    args, kwargs = captured.batch(picked)
    with torch.no_grad():
        torch.testing.assert_close(captured.outputs(picked), model.gated(*args, **kwargs), atol=1e-8, rtol=1e-5)


class Nested(nn.Module):
    """A block that takes a list of tensors, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.block, self.fc = Concatenating(), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.block([x, x * 2]))


class Concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, parts):
        return F.relu(self.linear(torch.cat(parts, 1)))


def assert_captured_correctly(model: nn.Module, name: str, batches: list[Batch], count: int) -> None:
    """Check that captured inputs are those of a run on the selected samples alone, and give the captured outputs."""
    captured = capture(model, name, batches, count, MemoryBudget(2**20), outputs=True)
    picked = torch.tensor([count - 1, 1])
    args, kwargs = captured.batch(picked)
    module, seen = model.get_submodule(name), []
    with torch.no_grad():
        torch.testing.assert_close(captured.outputs(picked), module(*args, **kwargs), atol=1e-6, rtol=1e-5)
    hook = module.register_forward_pre_hook(lambda module, args: seen.extend(tensor.clone() for tensor in tensors_in(args)))
    run(model, Batch(join(batches).inputs[picked]))
    hook.remove()
    torch.testing.assert_close(tensors_in(args), seen, atol=1e-6, rtol=1e-5)


def test_captures_arguments_inside_a_list():
    assert_captured_correctly(make(Nested), "block", [Batch(numbers(4, 4, seed=seed)) for seed in (1, 2)], 8)


def test_captures_layer_with_several_rows_per_sample():
    model, batches = make(NETWORKS["windows"][0]), calibration_of("windows", fitting=16).fitting
    assert_captured_correctly(model, "inner", batches, 16)


def test_rejects_layer_whose_rows_cannot_be_assigned_to_samples():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).mean(0)

    model, batches = make(TimeFirst), [Batch(numbers(4, 6, 4, seed=seed)) for seed in (1, 2)]
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=r"Unit inner reads a tensor of shape .* for 4 samples"):
        capture(model, "inner", batches, 8, MemoryBudget(2**20), outputs=True)
    assert_untouched(model, before)


def test_rejects_unit_with_several_outputs_by_name():
    model, batch = network_and_inputs("attention")
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match="attention returns a tuple"):
        capture(model, "attention", [batch], 4, MemoryBudget(2**20), outputs=True)
    assert_untouched(model, before)


@pytest.mark.parametrize("values", [1, 50, 10**6])
def test_sampled_values_include_the_extremes_and_only_captured_values(values):
    model, calibration = make(Residual), calibration_of("residual")
    names = observe(model, calibration.fitting[0]).layer_names()
    samples = {name: one for name, (one,) in input_samples(model, names, calibration.fitting, values, seed=0).items()}
    assert set(samples) == set(names)
    for name in names:
        values_read, _ = watched(model, name, join(calibration.fitting))
        ends = torch.stack([values_read.min(), values_read.max()])
        assert torch.allclose(torch.stack([samples[name].min(), samples[name].max()]), ends, atol=1e-6)
    first = samples[names[0]]
    assert torch.isin(first, join(calibration.fitting).inputs).all()
    assert len(first) <= values + 3 * len(calibration.fitting)


def test_samples_depend_only_on_the_seed():
    model, calibration = make(Residual), calibration_of("residual")
    state = torch.get_rng_state()
    draws = [input_samples(model, ["fc"], calibration.fitting, 30, seed)["fc"][0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_chunks_cover_every_index_exactly_once():
    assert torch.cat(list(chunks(11, 4))).tolist() == list(range(11))


class Masked(nn.Module):
    """A block with a square mask shared by all samples, as in attention."""

    def __init__(self):
        super().__init__()
        self.gated = Gated()

    def forward(self, x):
        return self.gated(x, torch.ones(4, 4), 1, gate=1.0)


def test_mask_with_as_many_rows_as_the_batch_is_shared():
    model, batches = make(Masked), [Batch(numbers(4, 4, seed=seed)) for seed in (1, 2)]
    captured = capture(model, "gated", batches, 8, MemoryBudget(2**20), outputs=True)
    args, _ = captured.batch(torch.tensor([7, 0, 3]))
    assert args[0].shape == (3, 4) and args[1].shape == (4, 4)
