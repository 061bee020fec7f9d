"""The epoch loop: drawing batches, rejected inputs, checkpoints, and several processes."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NoBatchNorm, Residual, images, make
from processes import run_processes
from torch import nn
from torch.utils.data import Dataset

import anybit
from anybit.data.augment import augmented, border_of
from anybit.data.batches import Batch
from anybit.errors import AnybitError, InvalidFile, InvalidInput, InvalidSetting
from anybit.loops.settings import TrainSettings
from anybit.loops.training import _steps, epoch_batches, learning_rate
from anybit.networks.layers import quantized_layers, scheme_of
from anybit.progress import listening
from anybit.scheme import Precision, Scheme
from anybit.sources.arrays import samples_of_arrays
from anybit.sources.inputs import as_samples
from anybit.sources.preprocessing import Preprocessing

TESTS = Path(__file__).parent.parent


def labelled(count=48, cls=Residual):
    """Images, labelled with the float network's predictions."""
    x = images(count)
    with torch.no_grad():
        return x, make(cls)(x).argmax(1)


def grown(checkpoint=None, cls=Residual, **changes):
    settings = {"budget": "3bit", "epochs": 3, "batch_size": 16, "activation_bits": 4, **changes}
    return anybit.grow(make(cls), labelled(cls=cls), settings.pop("budget"), checkpoint=checkpoint, **settings)


class Interrupted(Exception):
    pass


# What a run reports


def test_every_epoch_reports_soft_and_frozen_scores_and_bits():
    result = grown(test=labelled())
    assert [row["epoch"] for row in result.report["epochs"]] == [1, 2, 3]
    for row in result.report["epochs"]:
        assert {"top1", "loss"} <= set(row["soft"]) and {"top1", "loss"} <= set(row["frozen"])
        assert set(row["layers"]) == set(result.scheme)
        assert 0 <= row["undecided"] <= 1 and row["paper_bits"] <= 7
    last = result.report["epochs"][-1]
    assert last["undecided"] == 0 and last["weight_bits"] <= 3
    assert last["layers"] == {name: precision.weight_bits for name, precision in result.scheme.items()}
    assert last["frozen"] == pytest.approx(last["soft"], rel=1e-5)  # every gate is hard: freezing changes nothing


def test_training_lowers_the_loss_and_leaves_the_given_model_unchanged():
    model = make(Residual)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = anybit.grow(model, labelled(), "4bit", epochs=12, batch_size=16, activation_bits=None)
    losses = [row["loss"] for row in result.report["epochs"]]
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_grown_run_round_trips_bitwise(tmp_path):
    result = grown()
    folder = result.save(tmp_path / "run")
    loaded = anybit.load(folder, model=make(Residual, seed=5))
    assert torch.equal(loaded(images(8)), result.model(images(8)))
    assert (folder / "model.safetensors").stat().st_size == result.report["result"]["bytes"]


def test_trains_at_a_fixed_scheme():
    names = list(quantized_layers(grown(epochs=1).model))
    scheme = Scheme({name: Precision(2 + index, 4) for index, name in enumerate(names)})
    result = grown(budget=None, scheme=scheme, epochs=12)
    assert result.scheme == scheme
    losses = [row["loss"] for row in result.report["epochs"]]
    assert losses[-1] < losses[0]


def test_scheme_may_name_a_run_folder(tmp_path):
    folder = grown().save(tmp_path / "run")
    assert grown(budget=None, scheme=folder).scheme == anybit.load(folder, model=make(Residual)).scheme
    with pytest.raises(InvalidSetting, match="not both"):
        grown(scheme=folder)


OPTIONS = [{"distill": 0.5}, {"from_scratch": True}, {"half": True}, {"augment": "flip,crop2"}, {"per_channel": True}, {"seed": 1}]
OPTIONS += [{name: 3e-2} for name in ("rate", "gate_rate", "plane_rate", "scale_rate", "strength")]
OPTIONS += [{"anchor": False}, {"ramp": 0.0}, {"weighting": 1.0}]


def outputs_of(**settings):
    return grown(**settings).model(images(4))


@cache
def unchanged_outputs():
    return outputs_of(phase="continue", fix=0.4, plane_temperature=2.0)


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_every_option_changes_the_result(changes):
    outputs = [unchanged_outputs(), outputs_of(phase="continue", fix=0.4, plane_temperature=2.0, **changes)]
    assert torch.isfinite(outputs[1]).all() and not torch.equal(*outputs)


@pytest.mark.parametrize("changes", [{"rate": 3e-2}, {"scale_rate": 3e-2}], ids=str)
def test_learning_rates_apply_to_a_fixed_scheme(changes):
    scheme = Scheme.uniform(grown(epochs=1).scheme, Precision(3, 4))
    outputs = [grown(budget=None, scheme=scheme, **more).model(images(4)) for more in ({}, changes)]
    assert not torch.equal(*outputs)


def test_from_scratch_resets_only_a_copy():
    result = grown(from_scratch=True, distill=0.5, test=labelled())
    assert result.report["float_test"]["top1"] == 100  # of the trained network, which is also the teacher


def test_keep_applies_with_one_plane():
    result = grown(budget=None, planes=1, keep={"fc": Precision(), "conv": Precision(8, 4)})
    assert result.scheme["fc"] == Precision() and result.scheme["conv"] == Precision(8, 4)
    assert result.scheme["block1.conv1"] == Precision(2, 4)


def test_trains_scheme_with_a_float_layer():
    scheme = grown(budget="8bit", keep={"fc": Precision()}, epochs=1).scheme
    assert grown(budget=None, scheme=scheme, epochs=1).scheme == scheme


def test_global_random_state_is_restored():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    grown(epochs=1, from_scratch=True)
    assert torch.equal(torch.rand(3), expected)


def test_task_selects_the_loss():
    x, y = images(32), torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    result = anybit.grow(make(Residual), (x, y), "4bit", epochs=2, batch_size=16, task="regression")
    assert result.about["task"] == "regression" and result.report["epochs"][0]["train_top1"] is None
    with pytest.raises(InvalidSetting, match="task"):
        grown(task="poetry")


@pytest.mark.parametrize("labels", [torch.full((32,), 9), torch.full((32,), -1), torch.full((32,), 0.5)])
def test_rejects_invalid_labels_by_name(labels):
    with pytest.raises(InvalidInput, match="abels"):
        anybit.grow(make(Residual), (images(32), labels), "4bit", epochs=1, batch_size=16)


@pytest.mark.parametrize(
    "bad", [{"rate": -1.0}, {"rate": float("nan")}, {"strength": 0.0}, {"budget": ["3bit", "4bit"]}, {"batch_size": 1}]
)
def test_rejects_invalid_settings(bad):
    with pytest.raises(InvalidSetting):
        grown(**bad)


def test_unlabelled_data_train_by_distillation_only():
    with pytest.raises(InvalidInput, match="distill"):
        anybit.grow(make(Residual), images(32), "4bit", epochs=1, batch_size=16)
    anybit.grow(make(Residual), images(32), "4bit", epochs=1, batch_size=16, distill=1.0)


@pytest.mark.parametrize(
    ("able", "reported"),
    [
        ({"architecture": "x86_64", "avx512_bw": False}, True),
        ({"architecture": "x86_64", "avx512_bw": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_reports_emulated_half_precision(able, reported, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    notes = []
    for half in (False, True):
        with listening(events=lambda event, fields: notes.append(fields["note"]) if event == "note" else None):
            grown(half=half)
        assert sum("bfloat16" in note for note in notes) == (reported and half)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_compiled_training_gives_the_same_scheme():
    assert grown(compile=True).scheme == grown().scheme


# Batches


def test_batches_of_an_epoch_depend_only_on_seed_and_epoch():
    samples = as_samples(labelled())
    settings = TrainSettings(batch_size=16, augment="flip,crop1")
    first, again, other = (list(epoch_batches(samples, settings, epoch)) for epoch in (0, 0, 1))
    assert len(first) == 3
    assert all(torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, other, strict=True))


def test_augmentation_shifts_images_and_keeps_their_pixels():
    x = torch.arange(2 * 1 * 6 * 6, dtype=torch.float32).view(2, 1, 6, 6) + 1
    moved = augmented(Batch(x, torch.tensor([0, 1])), "flip,crop1", 2, torch.Generator().manual_seed(3)).inputs
    assert moved.shape == x.shape
    for one, original in zip(moved, x, strict=True):
        inside = one[0, 1:-1, 1:-1]
        assert set(inside.flatten().tolist()) <= set(original.flatten().tolist())
    assert x[0, 0, 0, 0] == 1  # the batch itself is unchanged
    with pytest.raises(InvalidSetting, match="needs images"):
        augmented(Batch(torch.zeros(2, 3)), "flip", 2, torch.Generator())
    with pytest.raises(InvalidSetting, match="crop4"):
        TrainSettings(augment="twirl")


@pytest.mark.parametrize(
    ("mean", "std"),
    [(None, None), ((0.4,), (0.2,)), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.5,), (0.2, 0.3, 0.4)), ((0.5, 0.4, 0.3), None)],
)
def test_shifted_images_are_padded_with_black_before_they_are_normalized(mean, std):
    x = np.random.default_rng(0).integers(30, 256, (8, 6, 6, 3), dtype=np.uint8)  # no pixel is black
    channels = [tuple(np.broadcast_to(values, 3)) for values in (mean or (0.0,), std or (1.0,))]
    samples = samples_of_arrays({"x": x}, np.zeros(8), 0, Preprocessing(mean=mean and channels[0], std=std and channels[1]))
    settings = TrainSettings(batch_size=8, augment="crop2")
    normalized = next(epoch_batches(samples, settings, 0)).inputs
    pixels = normalized * torch.tensor(channels[1])[:, None, None] + torch.tensor(channels[0])[:, None, None]
    border = pixels[pixels < 30 / 256]
    assert len(border) and border.abs().max() < 1e-6
    gray = next(epoch_batches(samples, replace(settings, border="mean"), 0)).inputs
    assert (gray == 0).sum() >= len(border) and torch.equal((gray == 0) | (gray == normalized), torch.ones_like(gray, dtype=torch.bool))


def test_where_the_normalization_is_not_known_the_darkest_pixel_is_black():
    x = torch.rand(64, 3, 6, 6) - torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    samples = as_samples((x, torch.zeros(64)))
    assert border_of(samples, "flip,crop2", "black", 0) == pytest.approx(x.amin((0, 2, 3)).tolist())
    assert border_of(samples, "flip", "black", 0) == (0.0,)


def test_a_data_set_that_augments_by_itself_draws_the_same_whether_or_not_black_is_looked_for():
    class Random(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.rand(1, 6, 6), 0

    batches = [
        torch.cat([b.inputs for b in epoch_batches(as_samples(Random()), TrainSettings(batch_size=8, augment=a), 0)])
        for a in ("none", "crop0")
    ]
    assert torch.equal(*batches)


def test_learning_rate_rises_then_falls_to_zero():
    values = [learning_rate(step / 100, 0.1) for step in range(101)]
    assert values[10] == 1 and values[-1] == pytest.approx(0, abs=1e-9)
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)


# Rejected inputs


class Short(Dataset):
    """Claims more samples than it has."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index >= 40:
            raise IndexError(index)
        return images(64)[index], 0


def test_error_for_data_that_end_early_names_epoch_and_batch():
    class AtTheEnd(Short):
        calls = 0

        def __getitem__(self, index):  # the first pass, over the float network, succeeds
            AtTheEnd.calls += 1
            if AtTheEnd.calls > 100:
                raise IndexError(index)
            return images(64)[index], 0

    with pytest.raises(InvalidInput, match=r"after \d of 4 batches of epoch 1\. Item \d+ of the data set AtTheEnd raises IndexError"):
        anybit.grow(make(Residual), as_samples(AtTheEnd()), "3bit", epochs=2, batch_size=16)


def test_rejects_nan_weights_after_training(tmp_path, monkeypatch):
    path, step, steps = tmp_path / "checkpoint.safetensors", torch.optim.Adam.step, []

    def breaking(self):
        step(self)
        steps.append(None)
        if len(steps) == 6:  # the last step of the second epoch, whose loss was finite
            self.param_groups[-1]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", breaking)
    with pytest.raises(AnybitError, match="became NaN in epoch 2, step 3 of 3"):
        grown(path)
    monkeypatch.undo()
    assert [row["epoch"] for row in grown(path).report["epochs"]] == [1, 2, 3]


class Poisoned(Short):
    """Clean for the first pass over all 64 images and for the first steps of training, then NaN."""

    calls = 0

    def __getitem__(self, index):
        Poisoned.calls += 1
        image = images(64)[index]
        return (image * torch.nan if Poisoned.calls > 250 else image), 0


def test_nan_loss_error_names_the_step_and_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(AnybitError, match=r"became nan .* in epoch 2, step \d of 4. The checkpoint of epoch 1 is in .*lower learning"):
        anybit.grow(make(Residual), as_samples(Poisoned()), "3bit", epochs=3, batch_size=16, checkpoint=path)
    assert path.is_file()


@pytest.mark.parametrize("damage", ["truncate", "garbage", "other network"])
def test_broken_checkpoint_is_named(damage, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    grown(path, epochs=2)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "garbage":
        path.write_bytes(b"nothing")
    else:
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        save_file({key: tensor for key, tensor in tensors.items() if "fc" not in key}, path, metadata=metadata)
    with pytest.raises(InvalidFile, match=r"checkpoint\.safetensors"):
        grown(path, epochs=2)


# Resuming


def test_failed_checkpoint_write_keeps_the_previous_one(tmp_path, monkeypatch, full_disk):
    from anybit.loops.checkpoint import save_file

    save, checkpoint = save_file, tmp_path / "run" / "checkpoint.safetensors"

    def filling(*args, **more):
        with full_disk() if checkpoint.exists() else nullcontext():
            save(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr("anybit.loops.checkpoint.save_file", filling)
        with pytest.raises(AnybitError, match=r"cannot be written: .*continues from the checkpoint of epoch 1"):
            grown(checkpoint, epochs=3)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    continued = grown(checkpoint, epochs=3)
    assert [row["epoch"] for row in continued.report["epochs"]] == [1, 2, 3]
    assert continued.report["epochs"] == grown(epochs=3).report["epochs"]
    (tmp_path / "file").write_text("")
    with pytest.raises(AnybitError, match=r"cannot be written: .*is not a folder. Choose another checkpoint="):
        grown(tmp_path / "file" / "checkpoint.safetensors", epochs=1)


def stop_after(monkeypatch, epoch):
    """Interrupt training after the checkpoint of `epoch`, as if the process were killed."""
    from anybit.loops.checkpoint import save_checkpoint

    save, saved = save_checkpoint, []

    def saving(*args):
        save(*args)
        saved.append(args)
        if len(saved) == epoch:
            raise Interrupted

    monkeypatch.setattr("anybit.loops.training.save_checkpoint", saving)


CONTINUED = {"epochs": 4, "augment": "flip", "fix": 0.5, "harden": 0.75}  # decisions are also made between epochs


@cache
def uninterrupted(phase):
    return grown(**CONTINUED, phase=phase, test=labelled())


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("phase", ["restart", "rewind"])
def test_resumed_run_is_byte_identical(phase, epoch, tmp_path, monkeypatch):
    settings = CONTINUED | {"phase": phase, "test": labelled()}
    whole = uninterrupted(phase).save(tmp_path / "whole")
    checkpoint = tmp_path / "checkpoint.safetensors"
    with monkeypatch.context() as patched:
        stop_after(patched, epoch)
        with pytest.raises(Interrupted):
            grown(checkpoint, **settings)
    continued = grown(checkpoint, **settings).save(tmp_path / "continued")
    for name in ("model.safetensors", "scheme.json"):
        assert (whole / name).read_bytes() == (continued / name).read_bytes()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, continued)]
    assert reports[0]["epochs"] == reports[1]["epochs"]


@pytest.mark.parametrize("changes", [{"budget": "4bit"}, {"seed": 1}, {"strength": 0.1}, {"epochs": 5}, {"activation_bits": 8}])
def test_resuming_with_other_settings_is_rejected_by_name(changes, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint.safetensors"
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Interrupted):
            grown(checkpoint)
    with pytest.raises(InvalidSetting, match=next(iter(changes))):
        grown(checkpoint, **changes)


@pytest.mark.parametrize("verb", ["grow", "train"])
def test_resuming_requires_the_same_data_and_network(verb, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint.safetensors"
    x, y = labelled()
    options = {"epochs": 2, "batch_size": 16, "checkpoint": checkpoint}
    run = {"grow": partial(anybit.grow, budget="3bit"), "train": partial(anybit.train, bits=(2, 8), held_out=0.3, bn_images=16)}[verb]
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Interrupted):
            run(make(Residual), (x, y), **options)
    for index in (20, 47):  # even where the first batch is equal
        other, wrong = x.clone(), y.clone()
        other[index, 0, 0, 0] += 1
        wrong[index] = (wrong[index] + 1) % 5
        for data in ((other, y), (x, wrong)):
            with pytest.raises(InvalidSetting, match="data was"):
                run(make(Residual), data, **options)
    changed = make(Residual)
    changed.block2.stride = 2
    with pytest.raises(InvalidSetting, match="module block2 was"):
        run(changed, (x, y), **options)
    run(make(Residual), (x, y), **options)


# Several processes

WORKER = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "loops")!r}]
import torch
torch.set_num_threads(1)
import test_training as t
result = t.of_several_processes()
import torch.distributed as dist
if dist.get_rank() == 0:
    result.save(sys.argv[1])
dist.destroy_process_group()
"""


def of_several_processes():
    return grown(cls=NoBatchNorm, augment="flip", test=labelled(cls=NoBatchNorm))


def test_two_processes_give_the_scheme_and_weights_of_one(tmp_path):
    run_processes(2, tmp_path / "by two", tmp_path, WORKER)
    one, two = of_several_processes().model, anybit.load(tmp_path / "by two", model=make(NoBatchNorm))
    assert scheme_of(one) == two.scheme
    for name, layer in quantized_layers(one).items():
        other = two.get_submodule(name)
        flipped = (layer.weight_quantizer.codes(layer.weight.flatten(1)) != other.weight_quantizer.codes(other.weight.flatten(1))).sum()
        assert flipped <= 1  # rounding may decide a gate at zero either way
        assert torch.allclose(layer.weight_quantizer.scale, other.weight_quantizer.scale, rtol=1e-4)


def test_rejects_batch_size_not_divisible_among_processes(monkeypatch):
    monkeypatch.setattr("anybit.loops.training.world", lambda: 3)
    with pytest.raises(InvalidSetting, match="multiple of 3"):
        _steps(as_samples(labelled()), TrainSettings(batch_size=16), make(Residual))


def test_gammas_driven_to_zero_stay_positive():
    result = grown(rate=0.3, epochs=6)
    for layer in quantized_layers(result.model).values():
        assert (layer.weight_quantizer.scale > 0).all()


def test_trains_network_that_is_one_module():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    result = anybit.grow(model, labelled(), "3bit", epochs=2, batch_size=16)
    assert result.scheme["1"].weight_bits <= 3
