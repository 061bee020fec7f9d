@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_learned_weight_starts_at_the_quantizers_codes(bits):
    rows = torch.randn(5, 20)
    quantizer = UniformQuantizer(bits, True, rows.abs().amax(1, keepdim=True) / 2 ** (bits - 1))
    learned = LearnedWeight(rows / quantizer.scale, quantizer)
    assert torch.allclose(learned(rows), quantizer(rows), rtol=1e-5)
    assert torch.allclose(learned.freeze().scale, quantizer.scale, rtol=1e-5)


