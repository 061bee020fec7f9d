def biased_case() -> tuple[ObservedNetwork, Calibration, nn.Module, list, torch.Tensor]:
    network, calibration, model, _ = setup(make(Residual), "W3A8")
    references = [outputs_of(network.folded, [batch]) for batch in calibration.fitting]
    return network, calibration, model, references, outputs_of(network.folded, calibration.held_out)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_bias_tuning_changes_no_code_and_never_raises_the_held_out_error(task, scales):
    _, calibration, model, references, held_out = biased_case()
    start = copy.deepcopy(model)
    settings = BiasTuningSettings(epochs=4, rate=1e-2, scales=scales)
    result = tune_biases(model, calibration.fitting, references, calibration.held_out, held_out, task, settings)
    assert result["after"] < result["before"] and result["epochs"] > 0
    assert distance(outputs_of(model, calibration.held_out), held_out, task) == pytest.approx(result["after"], rel=1e-3)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start.state_dict()[key])}
    assert any(key.endswith("scale") for key in moved) == scales and any(key.endswith("bias") for key in moved)
    assert scales or all(key.endswith("bias") for key in moved)
    assert scheme_of(model) == scheme_of(start)
    for name, layer in quantized_layers(model).items():
        assert type(layer.weight_quantizer) is UniformQuantizer and type(layer.input_quantizer) is UniformQuantizer
        assert torch.equal(codes_of(layer), codes_of(start.get_submodule(name)))
        assert torch.equal(layer.input_quantizer.zero_point, start.get_submodule(name).input_quantizer.zero_point)


def test_bias_tuning_that_finds_nothing_better_keeps_the_start():
    _, calibration, model, references, held_out = biased_case()
    start = copy.deepcopy(model).state_dict()
    wrong = [torch.randn_like(reference) * 100 for reference in references]
    result = tune_biases(
        model, calibration.fitting, wrong, calibration.held_out, held_out, "classification", BiasTuningSettings(epochs=4, rate=1.0)
    )
    assert result["epochs"] == 0 and result["after"] == result["before"]
    assert all(torch.equal(tensor, start[key]) for key, tensor in model.state_dict().items())


def test_biases_of_a_frozen_network_are_tuned_too():
    """Deployed networks often have requires_grad off everywhere."""
    model = make(Attention).requires_grad_(False)
    network, calibration, start, _ = setup(model, "W3A8", name="attention")
    references = [outputs_of(network.folded, [batch]) for batch in calibration.fitting]
    held_out = outputs_of(network.folded, calibration.held_out)
    settings = BiasTuningSettings(epochs=3, rate=1e-2)
    result = tune_biases(start, calibration.fitting, references, calibration.held_out, held_out, "classification", settings)
    assert result["after"] < result["before"]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_trained_loss_is_the_measured_distance(task):
    outputs, reference = torch.randn(9, 5), torch.randn(9, 5)
    assert float(output_loss(outputs, reference, task)) == pytest.approx(distance(outputs, reference, task), rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("part", [1, 3, 7, 8])
def test_gradients_of_a_batch_in_parts_are_those_of_the_whole(task, part):
    model, batch = network_and_inputs("residual", 7)
    reference = torch.randn(*predict(model, batch).shape, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (None, part):
        model.zero_grad()
        _add_gradients(model.double(), Batch(batch.inputs.double()), reference.double(), task, size)
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)
