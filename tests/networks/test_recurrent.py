"""Recurrent layers whose matrices are layers: the same outputs, through copies and pickles, and in a file with codes."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import anybit
from anybit.networks.plain import plain_weights
from anybit.networks.recurrent import RecurrentWeight

WIDTH, HIDDEN, STEPS = 6, 4, 5
LAYERS = {
    "LSTM": lambda: nn.LSTM(WIDTH, HIDDEN, batch_first=True),
    "GRU, deep and both ways": lambda: nn.GRU(WIDTH, HIDDEN, 2, batch_first=True, bidirectional=True),
    "LSTM without a bias": lambda: nn.LSTM(WIDTH, HIDDEN, 2, bias=False),
    "LSTM with a projection": lambda: nn.LSTM(WIDTH, HIDDEN, proj_size=2, batch_first=True),
}
CELLS = {
    "LSTMCell": nn.LSTMCell,
    "GRUCell": nn.GRUCell,
    "RNNCell": nn.RNNCell,
    "RNNCell of ReLUs": lambda *sizes: nn.RNNCell(*sizes, nonlinearity="relu"),
}


class Texts(nn.Module):
    """Read padded texts."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.words, self.layer, self.last = nn.Embedding(20, WIDTH), layer, nn.Linear(HIDDEN, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        return self.last((self.layer(self.words(input_ids))[0] * mask).sum(1) / mask.sum(1))


class Packing(Texts):
    """Read packed texts, which no graph can hold."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(input_ids), attention_mask.sum(1), batch_first=True, enforce_sorted=False)
        return self.last(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].sum(1))


class Stepping(nn.Module):
    """Call a cell at each step."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell, self.last = cell, nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


def texts(length: int, count: int = 8) -> dict[str, Tensor]:
    mask = (torch.arange(length) < torch.randint(1, length + 1, (count, 1))).long()
    mask[0] = 1
    return {"input_ids": torch.randint(20, (count, length)), "attention_mask": mask}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_outputs_stay_and_every_matrix_is_a_layer(layer):
    model, x = layer().eval(), torch.randn(3, STEPS, WIDTH)
    held = plain_weights(model)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    layers = {f"weight_{name}" for name, module in held.named_modules() if isinstance(module, RecurrentWeight)}
    assert layers == matrices and plain_weights(held) is held and isinstance(held, type(model))
    for one in (held, copy.deepcopy(held), pickle.loads(pickle.dumps(held))):  # as in multiprocessing
        for ours, theirs in zip(one(x)[1], model(x)[1], strict=True):
            assert torch.equal(ours, theirs)
    with torch.no_grad():
        for module in held.modules():
            if isinstance(module, RecurrentWeight):
                module.weight.zero_()
    assert not torch.equal(held(x)[0], model(x)[0])


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_a_cell_becomes_two_linears(cell):
    model, x = Stepping(cell(WIDTH, HIDDEN)).eval(), torch.randn(3, STEPS, WIDTH)
    written = plain_weights(model)
    assert torch.allclose(written(x), model(x), atol=1e-6)
    assert {name for name, module in written.named_modules() if isinstance(module, nn.Linear)} == {"cell.ih", "cell.hh", "last"}
    assert torch.allclose(written.cell(x[0, 0])[0], model.cell(x[0, 0])[0], atol=1e-6)  # one sample, and no state


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_a_file_holds_codes_and_takes_texts_of_any_length(tmp_path):
    import onnx

    from anybit.onnx.file import outputs, session
    from anybit.sources.inputs import samples_from

    layer = nn.LSTM(WIDTH, HIDDEN // 2, batch_first=True, bidirectional=True)
    model, data = Texts(layer).eval(), texts(7)
    torch.export.export(layer, (torch.randn(2, 3, WIDTH),), strict=False)  # leaves a kernel behind that fixes the length
    options = {"weight_bits": (4,), "activation_bits": (8,), "batch_size": 4, "pipeline": "light"}
    anybit.calibrate(model, data, **options, cache=False).save(tmp_path / "run")
    common = {"model": model, "data": data, "cache": tmp_path / "cache"}
    anybit.export(tmp_path / "run", tmp_path / "network.onnx", **common)
    verdict = anybit.verify(tmp_path / "run", tmp_path / "network.onnx", **common)
    assert verdict["ok"], verdict["failures"]
    stored = {one.name: one.data_type for one in onnx.load(tmp_path / "network.onnx").graph.initializer}
    matrices = [name for name, module in plain_weights(model).named_modules() if isinstance(module, RecurrentWeight)]
    assert len(matrices) == 4 and all(stored[f"{name}.packed"] == onnx.TensorProto.INT4 for name in matrices)
    batch = next(samples_from(texts(5, 2), 0).batches(2))
    (computed,) = outputs(session(tmp_path / "network.onnx"), [batch])
    assert torch.allclose(torch.from_numpy(computed), anybit.load(tmp_path / "run", model)(**batch.inputs), atol=1e-4)


def test_packed_sequences_are_refused_by_inspect_with_the_remedy():
    report = anybit.inspect(Packing(nn.GRU(WIDTH, HIDDEN, batch_first=True)), texts(7))
    assert report["export"]["ok"] is False and "padded sequences" in report["export"]["reason"]
    assert {"layer.ih_l0", "layer.hh_l0"} < set(report["layers"])
