import random
import re
from dataclasses import replace

import pytest
import torch
from networks import (
    NETWORKS,
    CalledTwice,
    Chain,
    Residual,
    assert_untouched,
    calibration_of,
    images,
    make,
    matrices,
    network_and_inputs,
    numbers,
    snapshot,
)
from torch import nn

from anybit.allocation.choice import Judge, check_feasible, choose_scheme, drop_in_words, fits_budget
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import Budget
from anybit.data.batches import Batch
from anybit.data.samples import Calibration
from anybit.data.samples import mirrored as stages_mirrored
from anybit.data.tasks import outputs_of
from anybit.errors import AnybitError, InfeasibleBudget, InvalidInput, InvalidSetting, UnsupportedModel
from anybit.methods.table import ROUNDINGS, rounding_named
from anybit.networks.batchnorm import channel_statistics
from anybit.networks.candidates import apply_scheme
from anybit.networks.edges import edge_grids, observe_edge_ranges
from anybit.networks.integers import rounded_edges
from anybit.networks.layers import codes_of, quantized_layers
from anybit.networks.matmul import Matmul
from anybit.networks.observed import ObservedNetwork, observe_network
from anybit.networks.rewrites import Rewrite, rewrite_of
from anybit.networks.rounding import round_edges
from anybit.roads.memory import within_memory
from anybit.roads.polish import polish_scheme, sequential_start
from anybit.roads.settings import CalibrateSettings
from anybit.roads.steps import (
    CalibrationState,
    batch_norm_targets,
    matched_candidates,
    range_candidates,
    reconstructed_candidates,
    sensitivity_table,
)
from anybit.scheme import Precision, Scheme

SETTINGS = CalibrateSettings(weight_bits=(2, 4, 8), activation_bits=(4, 8), steps=4, candidate_steps=3, alternatives=2)


def prepared_case(name: str = "residual", settings: CalibrateSettings = SETTINGS):
    """(network, calibration, ranged candidates, a judge)."""
    calibration = calibration_of(name)
    network = observe_network(make(NETWORKS[name][0]), calibration.fitting[0], settings.options)
    candidates = range_candidates(network, calibration, settings)
    reference = outputs_of(network.folded, calibration.held_out)
    return network, calibration, candidates, Judge(network, candidates, calibration.held_out, reference, "classification")


@pytest.fixture(scope="module")
def residual():
    network, calibration, candidates, judge = prepared_case()
    table = sensitivity_table(network, candidates, calibration, judge.reference, "classification", SETTINGS)
    return network, calibration, candidates, judge, table


def unchanged(network: ObservedNetwork):
    models = (network.float_model, network.folded, network.prepared)
    before = [snapshot(model) for model in models]
    return lambda: [assert_untouched(model, was) for model, was in zip(models, before, strict=True)]


@pytest.mark.parametrize("name", NETWORKS)
def test_observing_leaves_the_network_unchanged_and_covers_or_names_every_layer(name):
    model, batch = network_and_inputs(name)
    before = snapshot(model)
    network = observe_network(model, batch, SETTINGS.options)
    assert_untouched(model, before)
    layers = {layer: network.folded.get_submodule(layer) for layer in network.names}
    looked_up, products = ({n for n, layer in layers.items() if isinstance(layer, kind)} for kind in (nn.Embedding, Matmul))
    assert matrices(network.folded) | products == set(network.names) | set(network.uncovered)
    rewrite = rewrite_of(network.float_model) or Rewrite()
    # All of the user's matrices are still there, except weights of added layers, which are named after them.
    absorbed = {f"{layer}_weight" for layer in rewrite.layers} & set(rewrite.dropped)
    assert matrices(model) - absorbed == matrices(network.folded) - set(rewrite.layers)
    assert matrices(model) & set(rewrite.dropped) == absorbed
    assert sorted(layer for unit in network.units for layer in unit.layers) == sorted(set(network.names) - looked_up - products)
    for layer, options in network.choices.items():
        weights, activations = {None} if layer in products else {2, 4, 8}, {None} if layer in looked_up else {4, 8}
        assert {option.weight_bits for option in options} == weights and {option.activation_bits for option in options} == activations


def test_kept_layers_have_one_choice():
    settings = CalibrateSettings(keep={"block*": Precision(8, 8), "block1.*": Precision(), "fc": Precision(4)})
    network = observe_network(make(Residual), Batch(images(2)), settings.options)
    assert network.choices["block2.conv1"] == [Precision(8, 8)] and network.choices["block1.conv1"] == [Precision()]
    assert network.choices["fc"] == [Precision(4)] and len(network.choices["conv"]) == 15


def test_rejects_pattern_without_layers_with_near_matches():
    with pytest.raises(InvalidSetting, match=r"block1\.conv3=W8A8. matches no quantizable layer.*block1\.conv"):
        observe_network(make(Residual), Batch(images(2)), CalibrateSettings(keep={"block1.conv3": Precision(8, 8)}).options)


def test_rejects_model_without_layers():
    with pytest.raises(UnsupportedModel, match="no layer to quantize"):
        observe_network(nn.Sequential(nn.ReLU(), nn.Flatten()), Batch(images(2)), SETTINGS.options)


def test_layer_called_twice_counts_weight_once_and_operations_twice():
    network = observe_network(make(CalledTwice), Batch(numbers(2, 4)), SETTINGS.options)
    assert network.names == ["first", "again", "fc"] and network.calls["again"] == 2
    assert network.costs.layers["again"].macs == 2 * 36 and network.costs.layers["again"].weights == 36
    assert next(unit for unit in network.units if unit.name == "again").calls == 2
    network = observe_network(make(CalledTwice), Batch(numbers(2, 4)), CalibrateSettings(keep={"again": Precision()}).options)
    assert network.choices["again"] == [Precision()] and "again" not in network.calls


def test_units_follow_the_settings():
    blocks = {unit.name for unit in observe_network(make(Residual), Batch(images(2)), CalibrateSettings(unit="block").options).units}
    layers = {unit.name for unit in observe_network(make(Residual), Batch(images(2)), CalibrateSettings(unit="layer").options).units}
    named = {unit.name for unit in observe_network(make(Residual), Batch(images(2)), CalibrateSettings(blocks=("block2",)).options).units}
    assert blocks == {"conv", "block1", "block2", "fc"}
    assert "block1" not in layers and "block1.conv2" in layers
    assert named == {"conv", "block1.conv1", "block1.conv2", "block2", "fc"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_bits": (1,)}, {"weight_bits": (4, 9)}, {"weight_bits": ()}, {"weight_bits": (None,)}, {"activation_bits": (0,)},
        {"activation_bits": (4.0,)}, {"pipeline": "heavy"}, {"estimator": "mean"}, {"unit": "net"}, {"bn_target": "beta"}, {"task": "fun"},
        {"held_out": 0}, {"held_out": 1}, {"drop": 2}, {"samples": 1}, {"steps": 0}, {"batch_size": 0}, {"candidate_steps": -1},
        {"bn_prior": 1.5}, {"memory": -1}, {"rounding": "nearest"},
    ],
    ids=str,
)  # fmt: skip
def test_rejects_invalid_settings(wrong):
    with pytest.raises(InvalidSetting):
        CalibrateSettings(**wrong)


def test_settings_round_trip_through_json():
    settings = CalibrateSettings(keep={"fc": Precision(8, 8)}, activation_bits=(4, None), blocks=("a",), sensitivity_base=Precision(8, 8))
    again = CalibrateSettings.from_json(settings.to_json(), "candidates.json")
    assert again.to_json() == settings.to_json() and again.keep == settings.keep and again.activation_bits == (4, None)


def test_stored_settings_without_rounding_mean_adaquant():
    older = {key: value for key, value in CalibrateSettings(seed=3).to_json().items() if key != "rounding"}
    assert CalibrateSettings.from_json(older, "candidates.json").to_json() == CalibrateSettings(seed=3, rounding="adaquant").to_json()


def test_every_choice_has_its_candidates(residual):
    network, _, candidates, _, _ = residual
    for name, options in network.choices.items():
        for option in options:
            assert (name, option.weight_bits) in candidates.weights and (name, option.activation_bits) in candidates.activations


@pytest.mark.parametrize("stage", ["matched", "reconstructed"])
def test_candidate_stage_does_not_change_its_inputs(residual, stage):
    network, calibration, candidates, _, _ = residual
    check = unchanged(network)
    before = {key: (candidate.codes.clone(), candidate.scale.clone()) for key, candidate in candidates.weights.items()}
    if stage == "matched":
        targets = batch_norm_targets(network, calibration, SETTINGS)
        changed = matched_candidates(network, candidates, targets, calibration)
        assert all(torch.equal(changed.weights[key].codes, codes) for key, (codes, _) in before.items())
    else:
        changed, _ = reconstructed_candidates(network, candidates, candidates, calibration, SETTINGS)
    check()
    assert set(changed.weights) == set(candidates.weights)
    for key, (codes, scale) in before.items():
        assert torch.equal(candidates.weights[key].codes, codes) and torch.equal(candidates.weights[key].scale, scale)
    assert any(not torch.equal(changed.weights[key].scale, scale) for key, (_, scale) in before.items())


def test_reconstruction_never_raises_held_out_error(residual):
    network, calibration, candidates, _, _ = residual
    _, errors = reconstructed_candidates(network, candidates, candidates, calibration, SETTINGS)
    assert set(errors) == set(network.names)
    assert all(error["after"] <= error["before"] for by_bits in errors.values() for error in by_bits.values())


def test_batch_norm_targets_are_measured_or_from_the_norms_parameters(residual):
    network, calibration, _, _, _ = residual
    targets = batch_norm_targets(network, calibration, SETTINGS)
    measured = channel_statistics(network.folded, network.norms, calibration.fitting)
    assert all(torch.equal(targets[name].mean, measured[name].mean) for name in network.norms)
    prior = batch_norm_targets(network, calibration, CalibrateSettings(bn_target="prior"))
    norm = network.float_model.block1.bn1
    assert torch.equal(prior["block1.conv1"].mean, norm.bias) and torch.equal(prior["block1.conv1"].deviation, norm.weight.abs())


def test_sensitivity_is_the_loss_of_one_changed_layer(residual):
    network, _, _, judge, table = residual
    check = unchanged(network)
    edges = edge_grids(judge.candidates.edges, rounded_edges(network.wiring, quantized_layers(network.prepared), network.largest).names)
    whole = Scheme.uniform(network.names, "float")
    alone, base = (
        judge.of_model(round_edges(apply_scheme(network.prepared, scheme, judge.candidates), edges))["loss"]
        for scheme in (whole.replace({"block2.conv1": Precision(2)}), whole)
    )
    assert edges and table.floor == base
    expected = alone - base
    assert table.loss("block2.conv1", Precision(2)) == pytest.approx(expected, abs=1e-12)
    assert table.loss("conv", Precision(2, 8)) == table.loss("conv", Precision(2)) + table.loss("conv", Precision(None, 8))
    assert SensitivityTable.from_json(table.to_json()) == table
    check()


@pytest.mark.parametrize("base", ["W8A8", "W6A8"])
def test_sensitivity_base_may_be_any_precision(base):
    settings = CalibrateSettings(weight_bits=(2, 4, 8), activation_bits=(4, 8), sensitivity_base=Precision.parse(base))
    try:
        network, calibration, candidates, judge = prepared_case("chain", settings)
        table = sensitivity_table(network, candidates, calibration, judge.reference, "classification", settings)
        assert table.base == settings.sensitivity_base
    except AnybitError as error:
        assert base in str(error)


def test_chosen_scheme_is_at_least_as_good_as_fitting_uniform_ones(residual):
    network, _, _, judge, table = residual
    for text in ("3bit", "4bit", "60%", "bops=3M", "5bit,bops=4M"):
        budget = Budget.parse(text)
        choice = choose_scheme(network, table, budget, SETTINGS.alternatives, judge)
        assert fits_budget(network.costs, choice.scheme, budget), text
        chosen = judge.of_scheme(choice.scheme)["loss"]
        for weight_bits in (2, 4, 8):
            for activation_bits in (4, 8):
                uniform = network.uniform(weight_bits, activation_bits)
                if fits_budget(network.costs, uniform, budget):
                    assert chosen <= judge.of_scheme(uniform)["loss"], (text, weight_bits, activation_bits)


def test_without_a_budget_the_largest_candidates_are_chosen(residual):
    network, _, _, judge, table = residual
    assert choose_scheme(network, table, None, SETTINGS.alternatives, judge).scheme == network.uniform(8, 8)


def test_predicted_loss_limit_is_met_with_the_smallest_size(residual):
    network, _, _, judge, table = residual
    sizes = []
    for limit in (0.5, 0.05, 0.01):
        choice = choose_scheme(network, table, Budget.parse(f"loss={limit}"), SETTINGS.alternatives, judge)
        assert table.total(choice.scheme) <= limit * (1 + 1e-9)
        sizes.append(network.costs.file_size(choice.scheme))
    assert sizes == sorted(sizes)


def random_budgets(network: ObservedNetwork, unit: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    smallest, largest = (network.costs.summary(network.uniform(bits, bits)) for bits in (4, 8))
    if unit == "bytes":
        return [f"{rng.randint(smallest['bytes'], largest['bytes'])}B" for _ in range(10)]
    return [f"{rng.uniform(smallest['percent'], largest['percent']):.3f}%" for _ in range(10)]


@pytest.mark.parametrize("unit", ["bytes", "percent"])
def test_byte_budget_is_met_by_the_counted_file(residual, unit):
    network, _, _, judge, table = residual
    for text in random_budgets(network, unit, seed=3):
        budget = Budget.parse(text)
        choice = choose_scheme(network, table, budget, SETTINGS.alternatives, judge)
        size = network.costs.file_size(choice.scheme)
        assert size <= (budget.conditions[0].limit if unit == "bytes" else budget.conditions[0].limit / 100 * network.costs.float_bytes)


@pytest.mark.parametrize("budget", ["0.5bit", "100B", "1%", "bops=1k", "1bit,bops=1k"])
@pytest.mark.parametrize("keep", [{}, {"conv": Precision()}, {"block1.conv1": Precision(3, 3)}], ids=str)
def test_budget_named_by_the_infeasibility_error_is_feasible(budget, keep):
    settings = CalibrateSettings(weight_bits=(2, 4), activation_bits=(4, 8), keep=keep)
    network = observe_network(make(Residual), Batch(images(2)), settings.options)
    with pytest.raises(InfeasibleBudget, match=r"smallest scheme needs .* \(layers .* bind\)") as refused:
        check_feasible(network, Budget.parse(budget))
    check_feasible(network, Budget.parse(str(refused.value).rpartition("raise the budget to ")[2].rstrip(".")))


@pytest.mark.parametrize("budget", ["33bit", "100MB", "101%"])
def test_rejects_budget_above_the_float_size(residual, budget):
    network, _, _, judge, table = residual
    with pytest.raises(InvalidSetting, match="above the float network's"):
        choose_scheme(network, table, Budget.parse(budget), SETTINGS.alternatives, judge)


def labelled(calibration: Calibration, network: ObservedNetwork) -> list[Batch]:
    """The held-out batches, labelled with the float network's predictions."""
    return [Batch(batch.inputs, outputs_of(network.folded, [batch]).argmax(1)) for batch in calibration.held_out]


@pytest.mark.parametrize("keep", [{}, {"block2.*": Precision()}], ids=["none", "float"])
def test_generous_drop_is_always_met(keep):
    settings = CalibrateSettings(weight_bits=(2, 4, 8), activation_bits=(8,), keep=keep)
    network, calibration, candidates, judge = prepared_case("residual", settings)
    judge = Judge(network, candidates, labelled(calibration, network), judge.reference, "classification")
    nothing = SensitivityTable({(name, p): 0.0 for name, options in network.choices.items() for p in options}, Precision(), 8)
    choice = choose_scheme(network, nothing, Budget.parse("drop=100%"), settings.alternatives, judge)
    assert network.costs.weight_bits(choice.scheme) <= network.costs.weight_bits(network.uniform(4, 8))


def test_drop_is_measured_by_the_custom_metric():
    network, calibration, candidates, judge = prepared_case("residual")
    held_out = labelled(calibration, network)
    table = sensitivity_table(network, candidates, calibration, judge.reference, "classification", SETTINGS)

    def closeness(outputs, labels):
        return -float((outputs - judge.reference).abs().max())

    budget = Budget.parse("drop=0.05%")
    by_metric, by_top1 = (
        choose_scheme(
            network, table, budget, SETTINGS.alternatives, Judge(network, candidates, held_out, judge.reference, "classification", m)
        )
        for m in (closeness, None)
    )
    assert closeness(outputs_of(apply_scheme(network.prepared, by_metric.scheme, candidates), held_out), None) >= -0.05
    assert closeness(outputs_of(apply_scheme(network.prepared, by_top1.scheme, candidates), held_out), None) < -0.05
    regression = Judge(network, candidates, held_out, judge.reference, "regression", closeness)
    assert choose_scheme(network, table, budget, SETTINGS.alternatives, regression).scheme == by_metric.scheme


def test_drop_requires_labels(residual):
    network, _, _, judge, table = residual
    with pytest.raises(InvalidSetting, match="labelled"):
        choose_scheme(network, table, Budget.parse("drop=1%"), SETTINGS.alternatives, judge)


@pytest.mark.parametrize("better", ["ranges", "candidates"])
def test_polishing_keeps_only_steps_that_help_on_held_out_inputs(residual, better):
    network, calibration, candidates, judge, table = residual
    check = unchanged(network)
    scheme = network.uniform(4, 8)
    targets = batch_norm_targets(network, calibration, SETTINGS)
    references = [outputs_of(network.folded, [batch]) for batch in calibration.fitting]
    matched = matched_candidates(network, candidates, targets, calibration)
    losses = {id(one): judge.of_model(network.apply(scheme, one))["loss"] for one in (candidates, matched)}
    first = sorted((candidates, matched), key=lambda one: losses[id(one)], reverse=better == "candidates")
    shared = CalibrationState(network, calibration, SETTINGS, *first, table, judge, targets, references)
    done = polish_scheme(shared, scheme)
    model, ladder, errors = done.model, done.ladder, done.errors
    check()
    assert [row["loss"] for row in ladder[:2]] == [losses[id(one)] for one in first]
    assert [row["step"] for row in ladder[:2] if row["kept"]] == [better]
    accepted = [row["loss"] for row in ladder if row["kept"]]
    assert accepted == sorted(accepted, reverse=True) and all(row["loss"] >= accepted[-1] for row in ladder)
    assert judge.of_model(model)["loss"] == accepted[-1]
    steps = ["ranges", "candidates", "sequential AdaQuant", "batch-norm tuning", "bias tuning", "edge ranges"]
    assert [row["step"] for row in ladder] == steps
    assert set(errors) == {unit.name for unit in network.units}


@pytest.mark.parametrize("swapped", [False, True])
def test_polishing_without_steps_chooses_the_better_of_ranges_and_candidates(residual, swapped):
    network, calibration, candidates, judge, table = residual
    settings = replace(SETTINGS, pipeline="light", bn_tuning=False, solver="none")
    scheme = network.uniform(4, 8)
    targets = batch_norm_targets(network, calibration, settings)
    matched = matched_candidates(network, candidates, targets, calibration)
    both = (matched, candidates) if swapped else (candidates, matched)
    done = polish_scheme(CalibrationState(network, calibration, settings, *both, table, judge, targets), scheme)
    model, ladder, errors = done.model, done.ladder, done.errors
    losses = [judge.of_model(network.apply(scheme, one))["loss"] for one in both]
    assert [(row["step"], row["loss"]) for row in ladder[:2]] == [("ranges", losses[0]), ("candidates", losses[1])]
    assert [row["step"] for row in ladder[2:]] == ["edge ranges"] and errors == {}
    assert judge.of_model(model)["loss"] == min(row["loss"] for row in ladder if row["kept"]) <= min(losses) < max(losses)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("parallel", [False, True])
def test_sequential_reconstruction_starts_as_set(residual, parallel, rounding):
    network, calibration, ranged, judge, table = residual
    scheme = network.uniform(4, 8)
    targets = batch_norm_targets(network, calibration, SETTINGS)
    matched = candidates = matched_candidates(network, ranged, targets, calibration)
    if parallel:
        candidates, _ = reconstructed_candidates(network, matched, ranged, calibration, replace(SETTINGS, rounding=rounding))
    resumed = candidates if parallel and rounding_named(rounding).resumes else ranged
    for start, expected in ((None, resumed), ("ranges", ranged), ("matched", matched)):
        settings = replace(SETTINGS, start=start, rounding=rounding)
        shared = CalibrationState(
            network, calibration, settings, ranged, candidates, table, judge, targets, (), matched if parallel else None
        )
        model, free = sequential_start(shared, scheme)
        for name, layer in quantized_layers(model).items():
            assert torch.equal(codes_of(layer), expected.weights[name, 4].codes)
            torch.testing.assert_close(layer.weight_quantizer.scale, expected.weights[name, 4].scale)
            assert torch.equal(free[name].round().clamp(-8, 7).to(torch.int8), expected.weights[name, 4].codes)


def test_prior_acts_on_candidates(residual):
    network, calibration, ranged, _, _ = residual
    targets = batch_norm_targets(network, calibration, SETTINGS)

    def moved(prior: float) -> float:
        matched = matched_candidates(network, ranged, targets, calibration, prior)
        return sum(float((candidate.scale - ranged.weights[key].scale).abs().sum()) for key, candidate in matched.weights.items())

    assert moved(0.9) < moved(0.5) < moved(0.0)


def test_edge_ranges_cover_every_observed_value():
    network, calibration, candidates, _ = prepared_case("residual")
    model = apply_scheme(network.prepared, network.uniform(4, 8), candidates)
    edges = observe_edge_ranges(model, network.wiring, calibration.fitting)
    assert list(edges) == network.wiring.edges()
    inputs = torch.cat([batch.inputs for batch in calibration.fitting])
    outputs = outputs_of(model, calibration.fitting)
    assert edges["input/0"] == (float(inputs.min()), float(inputs.max()))
    assert edges["fc"] == pytest.approx((float(outputs.min()), float(outputs.max())), abs=1e-6)
    assert all(low <= high for low, high in edges.values())


def test_rejects_inputs_with_infinite_activations_by_layer():
    calibration = calibration_of("chain")
    model = make(Chain)
    with torch.no_grad():
        model.bn1.weight.fill_(3e33)  # its layer can barely be quantized
        model.relu1 = nn.Identity()
    network = observe_network(model, calibration.fitting[0], SETTINGS.options)
    for batch in calibration.fitting:
        batch.inputs.mul_(1e6)
    with pytest.raises(InvalidInput, match="layer conv2"):
        range_candidates(network, calibration, SETTINGS)


def test_rejects_weight_whose_scale_exceeds_float32_before_any_data():
    model = make(Chain)
    with torch.no_grad():
        model.bn1.weight.fill_(3e38)
    with pytest.raises(UnsupportedModel, match=r"conv1: the weight, with its batch norm folded.*--keep='conv1=float'"):
        observe_network(model, Batch(images(2)), SETTINGS.options)


def test_mirroring_extends_only_the_fitting_side():
    calibration = calibration_of("chain")
    mirrored = stages_mirrored(calibration)
    assert mirrored.held_out == calibration.held_out
    assert mirrored.count() == (2 * calibration.count()[0], calibration.count()[1])
    assert torch.equal(mirrored.fitting[-1].inputs, calibration.fitting[-1].inputs.flip(-1))
    with pytest.raises(InvalidSetting, match="images"):
        stages_mirrored(calibration_of("tokens"))


def test_joined_pass_stays_within_memory(residual):
    network, calibration, _, _, _ = residual
    assert within_memory(network.wiring, calibration.fitting, 2**40) == calibration.fitting
    assert within_memory(network.wiring, calibration.fitting, 0) == calibration.fitting[:1]


def test_matched_candidates_keep_their_codes_in_a_model(residual):
    network, calibration, candidates, _, _ = residual
    targets = batch_norm_targets(network, calibration, SETTINGS)
    matched = matched_candidates(network, candidates, targets, calibration)
    model = apply_scheme(network.prepared, network.uniform(2, 8), matched)
    assert all(torch.equal(codes_of(layer), candidates.weights[name, 2].codes) for name, layer in quantized_layers(model).items())
    assert len(quantized_layers(model)) == len(network.names)


def test_transformer_layer_uses_its_quantizers_with_or_without_hooks():
    """PyTorch's fused path reads the weights and skips the layers' forwards, and with them the input quantizers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)).eval()
    calibration = Calibration([Batch(torch.randn(8, 5, 8))], [Batch(torch.randn(4, 5, 8))])
    settings = CalibrateSettings(weight_bits=(4,), activation_bits=(2,))
    network = observe_network(model, calibration.fitting[0], settings.options)
    attention = {f"0.self_attn.{name}" for name in ("in_proj", "scores", "mixture", "out_proj")}
    assert set(network.names) == {"0.linear1", "0.linear2", "1"} | attention and not network.uncovered
    quantized = apply_scheme(network.prepared, network.uniform(4, 2), range_candidates(network, calibration, settings))
    with torch.no_grad():
        alone = quantized(calibration.held_out[0].inputs)
        hooks = [module.register_forward_hook(lambda *args: None) for module in quantized.modules()]
        watched = quantized(calibration.held_out[0].inputs)
    for hook in hooks:
        hook.remove()
    assert torch.equal(alone, watched)


@pytest.mark.parametrize("limit", [0.001, 0.01, 0.1])
def test_measured_loss_limit_is_met_if_any_scheme_meets_it(residual, limit):
    network, _, _, judge, table = residual
    try:
        choice = choose_scheme(network, table, Budget.parse(f"loss={limit}"), SETTINGS.alternatives, judge)
    except InfeasibleBudget:
        assert min(table.total(network.uniform(w, a)) for w in SETTINGS.weight_bits for a in SETTINGS.activation_bits) > limit
        return
    keeping = [row for row in choice.measured if row["measured"] <= limit]
    chosen = next(row for row in choice.measured if row["scheme"] == choice.scheme)
    assert chosen in keeping if keeping else chosen["name"] == "allocated 1"
    assert all(chosen["bytes"] <= row["bytes"] for row in keeping)


@pytest.mark.parametrize(("scale", "percent"), [(1.0, 0.01), (100.0, 1.0), (-5.0, 1.0)], ids=["share", "percent", "negative"])
@pytest.mark.parametrize("limit", [0.5, 2.0, 20.0])
def test_drop_binds_whatever_the_scale_of_the_metric(scale, percent, limit):
    """A metric of 0 to 1 could not lose the 1.0 that drop=1% stood for."""
    network, calibration, candidates, judge = prepared_case("residual")
    held_out = labelled(calibration, network)
    table = sensitivity_table(network, candidates, calibration, judge.reference, "classification", SETTINGS)

    def metric(outputs, labels):
        share = 1 / (1 + float((outputs - judge.reference).abs().mean()))
        return scale * share if scale > 0 else scale * (1 - share) - 1

    judged = Judge(network, candidates, held_out, judge.reference, "classification", metric)
    budget = Budget.parse(f"drop={limit}%")
    try:
        choice = choose_scheme(network, table, budget, SETTINGS.alternatives, judged)
    except InfeasibleBudget as refused:
        enough = re.search(r"raise the budget to (drop=\S+)\.$", str(refused))[1]
        limit = float(enough.removeprefix("drop=").removesuffix("%"))
        choice = choose_scheme(network, table, Budget.parse(enough), SETTINGS.alternatives, judged)
    lost = metric(judge.reference, None) - judged.of_scheme(choice.scheme)["metric"]
    assert lost <= limit * percent * (1 + 1e-9)
    words = drop_in_words(budget, metric, metric(judge.reference, None))
    assert words.startswith(f"{budget} allows metric to lose {budget.limit('drop') * percent:g}: ")
