"""The promises of an exported file, checked on real inputs: that it belongs to the run, that it is fast, and that it computes what the
reference does.

    the run's       every constant and operator of the file equals the run's export
    fused           every layer that computes on integers has an integer kernel in the graph that the runtime optimizes
    bitwise         the runtime's codes and outputs equal those of the integer interpreter, if no float operator lies between
    one code        ... else operator by operator, each on the runtime's own codes: integer ones bit for bit, and rounded results of a float
                    operator within one code
    the simulation  operator by operator, each on the simulation's codes: the file's are within one code, as explained by sums in another
                    order and integer biases

A check that this machine cannot make is skipped by name, never silently.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, tensors_in
from anybit.data.outputs import named_tensors
from anybit.errors import UnsupportedModel, some
from anybit.networks.layer_types import type_of
from anybit.networks.layers import quantized_layers
from anybit.networks.matmul import Matmul
from anybit.networks.recurrent import RecurrentWeight
from anybit.networks.rounding import edge_grids, rounded_values
from anybit.networks.wiring import name_of_call
from anybit.onnx.file import EXACT_SUMS, Exported, asks_for_exact_sums, outputs, session, x86_flags
from anybit.onnx.floats import LAYER, input_tensors, layer_nodes, probe_of
from anybit.onnx.interpreter import interpret
from anybit.onnx.operators import layer_operator
from anybit.onnx.plan import MOVES, Plan
from anybit.onnx.values import as_written, constant, name_of, numbers
from anybit.onnx.writer import weight_numbers

KERNELS = {"QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul", "NhwcQLinearConv"}
"""The runtime's names for layers that compute on integers."""


RUN = "anybit.run"
"""Key of the file's metadata: the hash of the run's packed model."""


SIMULATED = 8
"""Number of inputs on which the file's codes are compared with the simulation's."""

FLOAT_TOLERANCE = 1e-3
"""Largest difference of an output computed in float from the reference, as a share of the largest output."""


@dataclass
class Verdict:
    """failures   each broken promise, in a sentence that names the layer;   skipped  check -> why
    kernels    layer -> the runtime's integer kernel;   floats  layer -> why it computes in float
    saturating layers that an x86 processor without VNNI computes wrongly in a session without `EXACT_SUMS`; there, those here have it
    advice     session setting that these layers need
    """

    failures: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    saturating: list[str] = field(default_factory=list)
    advice: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.failures, **self.__dict__}


def verify_file(path: Path, file: ir.Model, exported: Exported, model: nn.Module, batch: Batch) -> Verdict:
    """Check `file`, read from `path`, against the export of canonical `model`, on real inputs."""
    verdict = Verdict()
    if file.metadata_props.get(RUN) != exported.integer.metadata_props.get(RUN):
        verdict.failures.append("The file was exported from another run than this one, or the run has changed since.")
        return verdict
    expected = _as_read(exported.integer)
    _check_contents(verdict, file, expected)
    if not _safe_to_run(file, expected):  # a foreign graph may make the runtime do anything
        verdict.skipped["kernels and numbers"] = "the file's operators or shapes are not those of the run, so it is not run"
        return verdict
    if any(_signature(values[0]) != _signature(values[1]) for values in _ends(file, exported.integer)):
        verdict.failures.append("The file's inputs and outputs are not those of the run.")
        return verdict
    _check_kernels(verdict, path, exported, model)
    verdict.saturating = saturating(model, exported.plan)
    if verdict.saturating:
        setting, value = EXACT_SUMS
        here = " This is such a processor, and the setting is used here." if lacks_vnni() else ""
        verdict.advice = (
            f"On x86 processors without VNNI the sums of some layers ({some(verdict.saturating)}) may saturate, unless a session sets "
            f"{setting} to {value}; weights of at most 7 bits need no such setting.{here}"
        )
    _check_numbers(verdict, path, file, exported, batch)
    if "bitwise" in verdict.numbers and "bitwise" not in verdict.skipped:
        check_simulation(verdict, exported, probe_of(batch, SIMULATED))
    return verdict


def _as_read(model: ir.Model) -> ir.Model:
    """Serialize the graph and read it back, so that its numbers have the form that they have in files."""
    proto = ir.to_proto(model)
    return ir.from_proto(type(proto).FromString(proto.SerializeToString()))


def _check_contents(verdict: Verdict, file: ir.Model, expected: ir.Model) -> None:
    """Check that the file's constants and operators equal those of the run's export."""
    stored, promised = _contents(file), _contents(expected)
    for name in promised:
        if name not in stored:
            verdict.failures.append(f"{name} is missing from the file.")
        elif stored[name] is not None and stored[name].shape != promised[name].shape:
            verdict.failures.append(f"{name} has the shape {stored[name].shape} in the file; the run gives {promised[name].shape}.")
        elif (different := int((stored[name] != promised[name]).sum())) > 0:
            detail = f"{different} of {promised[name].size} stored numbers are not the run's"
            verdict.failures.append(f"{name}: {detail}. {_readers(expected, name)}")
    verdict.failures += [f"{name} is in the file but not in the run's export." for name in stored if name not in promised]
    operators = [[_described(node) for node in model.graph] for model in (file, expected)]
    if operators[0] != operators[1]:
        index = next((i for i, (a, b) in enumerate(zip(*operators, strict=False)) if a != b), min(map(len, operators)))
        node = list(expected.graph)[index] if index < len(operators[1]) else None
        where = "at its end" if node is None else f"from {_place(node)} on"
        verdict.failures.append(f"The operators of the file are not those of the run's export, {where}.")


def _safe_to_run(file: ir.Model, expected: ir.Model) -> bool:
    """Return whether the file differs from the run's graph at most in the values of its constants, and in none that is a shape or an
    index."""
    stored, promised = _contents(file), _contents(expected)
    same = set(stored) == set(promised) and all(stored[name].shape == promised[name].shape for name in promised)
    same = same and all(np.array_equal(stored[name], promised[name]) for name in promised if promised[name].dtype == np.int64)
    return same and [_described(node) for node in file.graph] == [_described(node) for node in expected.graph]


def _described(node: ir.Node) -> tuple:
    """Return everything that determines a node's computation, its operands and its outputs' names."""
    settings = sorted((name, str(attribute.type), repr(attribute.value)) for name, attribute in node.attributes.items())
    return (
        node.domain,
        node.op_type,
        [value and name_of(value) for value in node.inputs],
        [name_of(value) for value in node.outputs],
        settings,
    )


def _ends(file: ir.Model, expected: ir.Model) -> list[tuple[Sequence[ir.Value], Sequence[ir.Value]]]:
    return [(file.graph.inputs, expected.graph.inputs), (file.graph.outputs, expected.graph.outputs)]


def _signature(values: Sequence[ir.Value]) -> list[tuple]:
    return [(name_of(value), str(value.dtype), None if value.shape is None else [str(size) for size in value.shape]) for value in values]


def _contents(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: numbers(value) for name, value in model.graph.initializers.items()}


def _readers(model: ir.Model, name: str) -> str:
    """Name the layers that use a shared constant."""
    value = model.graph.initializers[name]
    places = sorted({_served(use.node) for use in value.uses()})
    return f"It serves {', '.join(places[:3])}{' and others' if len(places) > 3 else ''}."


def _served(node: ir.Node) -> str:
    """Return the first named operator at or after a node."""
    while not node.name or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        uses = [use.node for value in node.outputs for use in value.uses()]
        if not uses:
            break
        node = uses[0]
    return _place(node)


def _place(node: ir.Node | None) -> str:
    """Return the layer or operator to which a node belongs: its own name, or that of the nearest named node before it."""
    while node is not None and (not node.name or node.op_type in ("QuantizeLinear", "DequantizeLinear")):
        node = next((value.producer() for value in node.inputs if value is not None and constant(value) is None), None)
    return "the input" if node is None else name_of(node)


# Kernels


def _check_kernels(verdict: Verdict, path: Path, exported: Exported, model: nn.Module) -> None:
    """Count the integer kernels in the graph that the runtime optimizes."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    ours = {name_of(node) for node in exported.floating.graph}
    kinds = {as_written(node.name, ours): node.op_type for node in nodes if node.op_type in KERNELS}
    packed = {as_written(node.name, ours) for node in nodes if node.op_type == "MatMulNBits"}
    for layer, module in quantized_layers(model).items():
        calls = [name_of(node) for node in layer_nodes(exported.floating.graph, layer)]
        fused = [kinds[call] for call in calls if call in kinds]
        if fused and len(fused) == len(calls) and layer in exported.plan.integer:
            verdict.kernels[layer] = fused[0]
        elif fused and layer not in exported.plan.integer:
            verdict.failures.append(f"{layer}: the runtime computes it on integers, although it should stay float.")
        elif layer in exported.plan.integer:
            verdict.floats[layer] = "the runtime did not fuse it with its quantizers"
            verdict.failures.append(f"{layer}: the runtime computes it in float, although its operands are integers.")
        else:
            verdict.floats[layer] = _why_float(exported.floating, layer, module)
            if layer in packed:
                verdict.floats[layer] += "; its weights stay packed at run time (MatMulNBits)"


def _why_float(graph: ir.Model, layer: str, module: nn.Module) -> str:
    if module.weight_quantizer is None:
        return "its weights are float" if type_of(module).has_weights else "its operands are float"
    if isinstance(module, RecurrentWeight):
        return "the products of a recurrent layer are float"
    if module.weight_group is not None:
        return "its weights have scales for groups of inputs, which integer kernels do not support"
    kind = next((node.op_type for node in graph.graph if node.metadata_props.get(LAYER) == layer), None)
    if kind is None:
        return "the file leaves it out: it depends on no input, or no output on it"
    if layer_operator(kind).lookup:
        return "an embedding looks rows up"
    return "its activations are float" if module.input_quantizer is None else f"the runtime has no integer kernel for {kind}"


# Numbers


def _check_numbers(verdict: Verdict, path: Path, file: ir.Model, exported: Exported, batch: Batch) -> None:
    """Compare the runtime's outputs with the interpreter's, and then operator by operator, each on the runtime's own codes."""
    missing = lacks_exact_kernels()
    feeds = {name_of(value): tensor for value, tensor in zip(file.graph.inputs, input_tensors(batch), strict=True)}
    try:
        reference = interpret(exported.integer, feeds)
    except UnsupportedModel as error:
        verdict.numbers["bitwise"], verdict.numbers["in_float"] = False, []
        verdict.skipped["bitwise"] = str(error)
        return
    computed = dict(zip((name_of(v) for v in file.graph.outputs), outputs(session(path), [batch]), strict=True))
    same = [np.array_equal(array, reference.values[name].numpy()) for name, array in computed.items()]
    with torch.no_grad():
        names = [name for name, _ in named_tensors(call(exported.model, probe_of(batch, 2).inputs))]
    different = [name for name, equal in zip(names, same, strict=True) if not equal]
    verdict.numbers |= {"bitwise": not different, "in_float": reference.in_float}
    if len(names) > 1:
        verdict.numbers["outputs"] = dict(zip(names, same, strict=True))
    if missing:
        verdict.skipped["bitwise"] = missing
    elif different:
        _compare_operators(verdict, file, exported.integer, feeds, batch)
        if verdict.failures and len(names) > 1:
            verdict.failures[-1] += f" Of the outputs, {some(different)} differ."


def _compare_operators(verdict: Verdict, file: ir.Model, expected: ir.Model, feeds: Mapping[str, Tensor], batch: Batch) -> None:
    """Report the first operator whose result differs: at all on integers, or by more than a code in float."""
    running = session(with_codes(file))
    names = [name_of(value) for value in running.get_outputs()]
    computed = dict(zip(names, map(torch.from_numpy, outputs(running, [batch], names)), strict=True))
    compared = interpret(expected, feeds, computed)
    nodes = {name_of(value): node for node in expected.graph for value in node.outputs}
    codes = [apart.largest for name, apart in compared.apart.items() if name in compared.rounded and computed[name].dtype == torch.uint8]
    verdict.numbers["codes_apart"] = max(codes, default=0.0)
    packed = any(
        name_of(value).endswith(".packed") and [use.node.op_type for use in value.uses()] == ["DequantizeLinear"]
        for value in expected.graph.initializers.values()
    )
    for name, apart in compared.apart.items():
        is_codes, inexact = computed[name].dtype == torch.uint8, name in compared.rounded or name in compared.floats
        largest = float(computed[name].double().abs().max()) if computed[name].numel() else 0.0
        # Packed linears round their inputs inside the runtime, which no reference reproduces.
        allowed = 0.0 if not inexact else np.inf if packed else 1.0 if is_codes else FLOAT_TOLERANCE * largest
        if not apart.largest <= allowed:  # also fails for NaN
            unit = "codes" if is_codes else "outputs"
            verdict.failures.append(
                f"{_place(nodes[name])}: {apart.count} of {apart.size} {unit} differ between the runtime and the reference, by up to "
                f"{apart.largest:.4g}."
            )
            return


def with_codes(model: ir.Model) -> ir.Model:
    """Return the graph with the codes of every quantized value among its outputs."""
    shown = ir.from_proto(ir.to_proto(model))
    for node in shown.graph:
        value, table = node.outputs[0], constant(node.inputs[0]) if node.op_type == "Gather" else None
        makes_codes = node.op_type == "QuantizeLinear" or (table is not None and table.dtype == np.uint8)
        if makes_codes and node.name and not value.is_graph_output() and any(constant(v) is None for v in node.inputs if v):
            value.type = ir.TensorType(ir.DataType.UINT8)
            shown.graph.outputs.append(value)
    return shown


def saturating(model: nn.Module, plan: Plan) -> list[str]:
    """List integer layers in which the sum of two neighbouring products of an input code and a weight code can exceed 16 bits."""
    layers = quantized_layers(model)
    weighted = [name for name in plan.integer if type_of(layers[name]).has_weights]  # both operands of a matmul are unsigned
    largest = {name: max(map(abs, codes.aminmax())) for name in weighted if (codes := weight_numbers(layers[name])[0].int()).numel()}
    return [name for name in layers if name in largest and 2 * plan.inputs[name][0].highest * largest[name] > 2**15 - 1]


def lacks_vnni() -> bool:
    """Return whether this is an x86 processor that sums 8-bit products in 16 bits by default."""
    return x86_flags() is not None and asks_for_exact_sums()


def lacks_exact_kernels() -> str | None:
    """Return why the runtime's integer kernels may differ from exact sums on this processor, or None."""
    return "the processor is not known to be an x86 one, and others are untested" if x86_flags() is None else None


# The simulation beside it


def simulated_codes(exported: Exported, batch: Batch, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return value of the integer graph -> the simulation's codes of it, for edges and layers' inputs. `values` are the graph's own, of
    which a convolution's input may lack the zeros around it."""
    taken: list[tuple[str, Any, Tensor, int | None]] = []
    hooks, seen, operators = [], Counter[str](), {name_of(node): node for node in exported.floating.graph}
    for name, layer in quantized_layers(exported.model).items():
        if layer.input_quantizer is not None:

            def keep(module, args, kwargs, name=name):
                seen[name] += 1
                call_name = name_of_call(name, seen[name])
                operands, read = tensors_in((args, kwargs)), exported.inputs.get(call_name, ())
                if len(read) == type_of(module).operands:
                    for index, value in enumerate(read):  # rounded later: a hook's computations would count among the network's operations
                        operand = operands[index].detach().clone()
                        if value in values and operand.shape != values[value].shape:
                            operand = _without_merged_padding(module, operators.get(call_name), operand)
                        taken.append((value, module, operand, index if len(read) > 1 else None))

            hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        edges = rounded_values(exported.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    codes = {
        value: _as_multiplied(layer, operand, layer.input_quantizer.codes(tensor, operand)).to(torch.uint8)
        for value, layer, tensor, operand in taken
    }
    for edge, value in exported.edges.items():
        scale, zero_point = torch.tensor(edge_grids(exported.model)[edge])
        codes[value] = (edges[edge] / scale + zero_point).round().to(torch.uint8)
    return codes


def _without_merged_padding(layer: nn.Module, node: ir.Node | None, operand: Tensor) -> Tensor:
    """Return a convolution's operand without the zeros around it that its operator pads itself."""
    if node is None or node.op_type != "Conv" or "pads" not in node.attributes or layer.padding_mode != "zeros":
        return operand
    own = cast(list[int], layer._reversed_padding_repeated_twice)[::-1]  # of each dimension in order: after it, before it
    pads = list(node.attributes["pads"].as_ints())
    begins, ends = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    for dimension, (begin, end, after, before) in enumerate(zip(begins, ends, own[::2], own[1::2], strict=True), 2):
        size = operand.shape[dimension] - (begin - before) - (end - after)
        operand = operand.narrow(dimension, begin - before, size)
    return operand


def _as_multiplied(layer: nn.Module, operand: int | None, codes: Tensor) -> Tensor:
    """Return the codes as the layer's operator reads them, transposed if the layer transposes."""
    return codes.mT if operand == 1 and isinstance(layer, Matmul) and layer.transposed else codes


@torch.no_grad()
def check_simulation(verdict: Verdict, exported: Exported, batch: Batch) -> None:
    """Compare the file's codes with the simulation's, operator by operator, each on the simulation's codes."""
    if missing := edge_grids(exported.model).keys() - exported.edges.keys():
        values = rounded_values(exported.model, batch)
        verdict.failures += [
            f"{edge}: the simulation rounds it to 8 bits, and the file does not."
            for edge in values  # one that equals another, such as a sum with 0, is rounded there
            if edge in missing and not any(torch.equal(values[edge], values[other]) for other in exported.edges)
        ]
    feeds = {name_of(value): tensor for value, tensor in zip(exported.integer.graph.inputs, input_tensors(batch), strict=True)}
    own = interpret(exported.integer, feeds).values
    simulated = simulated_codes(exported, batch, own)
    nodes = {name_of(value): node for node in exported.integer.graph for value in node.outputs}
    alike = {}
    for name, codes in simulated.items():
        source = _before_moves(name, nodes, own, codes.shape)
        if source is not None:
            alike[source] = codes
    compared = interpret(exported.integer, feeds, alike)
    apart = compared.apart
    verdict.numbers["simulation"] = {
        "codes": sum(one.size for one in apart.values()),
        "differ": sum(one.count for one in apart.values()),
        "codes_apart": max((one.largest for one in apart.values()), default=0.0),
    }
    for name, one in apart.items():
        if one.largest > 1:
            verdict.failures.append(
                f"{_place(nodes[name])}: {one.count} of {one.size} codes of the file are not the simulation's, by up to {one.largest:.4g}, "
                "which rounding does not explain."
            )
            return


def _before_moves(name: str, nodes: Mapping[str, ir.Node], values: Mapping[str, Tensor], shape: torch.Size) -> str | None:
    """Return the value of that shape from which value `name` is laid out, possibly itself, such as an input before it is padded; None if
    there is none."""
    while name in values and values[name].shape != shape:
        node = nodes.get(name)
        if node is None or node.op_type not in MOVES:
            return None
        name = name_of(node.inputs[0])
    return name if name in values else None


def flipped_codes(exported: Exported, batch: Batch) -> dict[str, float]:
    """Return layer -> share of its inputs' codes that differ between the simulated and the integer network, each run separately."""
    feeds = {name_of(value): tensor for value, tensor in zip(exported.integer.graph.inputs, input_tensors(batch), strict=True)}
    values = interpret(exported.integer, feeds).values
    simulated = simulated_codes(exported, batch, values)
    flipped = {}
    for layer, read in exported.inputs.items():
        pairs = [(simulated[name], values[name]) for name in read if name in simulated and name in values]
        if pairs and all(one.numel() == other.numel() for one, other in pairs):
            flipped[layer] = float(torch.cat([(one.flatten() != other.flatten()).float() for one, other in pairs]).mean())
    return flipped
