"""The float network as an ONNX graph, tidied so that operators with integer kernels are easy to identify, and its values on real inputs.

The canonical model is exported with its quantizers off (its weights are the quantized ones), never with fake-quantize operators, which
exporters translate into slow or wrong graphs. Tidying changes no value:

  * a mean over a whole image becomes a global average pool, which runtimes compute on integers;
  * zero padding before a convolution becomes part of the convolution;
  * average pools count padding only if they have some;
  * nodes that compute a layer carry the layer's name, those of its later calls with their number.
"""

import ast
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybit.data.batches import Batch, Inputs, call, map_tensors, tensors_in
from anybit.errors import UnsupportedModel
from anybit.files.cache import Cache
from anybit.networks.layer_types import type_of
from anybit.networks.layers import float_weight
from anybit.networks.recurrent import RecurrentWeight
from anybit.networks.wiring import Wiring, name_of_call, observe
from anybit.onnx.exporter import export_graph
from anybit.onnx.graphs import cached_graph, forget_graph
from anybit.onnx.operators import LAYER_OPERATORS, layer_operator
from anybit.onnx.recurrent import fold_weights, matrices
from anybit.onnx.traces import graph_digest, state_of
from anybit.onnx.unoptimized import run_unoptimized
from anybit.onnx.values import constant, maker, name_of, operand

OPSET, IR_VERSION = 21, 10
"""The file's versions: the first operator set with four-bit integers, which runtimes of early 2024 load."""

LAYER = "layer"
"""Key of a node's metadata: the layer that it computes."""

INSTEAD = "instead"
"""Key for the same if the operator computes with another weight than the layer's."""

BIAS = "bias"
"""Key of the metadata of a sum that adds its layer's bias: the name of the call."""


def float_graph(
    plain: nn.Module, example: Batch, probe: Batch, layers: Iterable[str], rounded: Collection[str], cache: Cache
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Return (`plain`, the canonical model with its quantizers off, exported, tidied and checked; its values on `probe`). The first
    dimension of inputs and outputs is the batch, the second of padded texts their length.

    layers   layers that become nodes with their names;   rounded  those of them that have quantizers
    cache    stores the graph; a stored graph that does not pass the check is exported again

    Raises UnsupportedModel naming the operator if the exporter does not support one, InvalidInput if the model rejects the inputs.
    """
    wiring = observe(plain, probe_of(example, 2))  # raises InvalidInput if the model rejects the inputs
    left_out = _left_out(wiring)
    weights = {name: float_weight(plain.get_submodule(name)).detach().numpy() for name in layers}
    rounded = [name for name in rounded if name not in left_out]
    inputs = map_tensors(example.inputs, lambda tensor: tensor[:2] if len(tensor) > 1 else torch.cat([tensor, tensor]))
    length = None if example.mask is None else example.mask.shape[1]
    key, state = _key(plain, inputs, length), state_of(plain)

    def attempt(cache: Cache) -> tuple[ir.Model, dict[str, np.ndarray]] | None:
        """Return the graph and its values; None if a cached graph does not fit the network."""
        new = False

        def export() -> ir.Model:
            nonlocal new
            new = True
            return export_graph(plain, inputs, length, wiring, OPSET)

        try:
            graph = cached_graph(key, export, state, cache)
            values = _checked_values(plain, graph, probe, weights, rounded)
        except Exception:  # many kinds, if the graph was exported for other inputs
            if new:
                raise
            return None
        return graph, values

    checked = attempt(cache)
    if checked is None:
        forget_graph(key, cache)
        checked = attempt(Cache())
    assert checked is not None  # a new graph passes or raises
    return checked


def _checked_values(
    plain: nn.Module, graph: ir.Model, probe: Batch, weights: Mapping[str, np.ndarray], rounded: Collection[str]
) -> dict[str, np.ndarray]:
    """Tidy the exported graph, in place, and check it against the network; return its values on `probe`."""
    recurrent = {name: weights[name] for name in rounded if isinstance(plain.get_submodule(name), RecurrentWeight)}
    _tidy(graph, weights, _aliases(plain))
    values = values_on(graph, input_tensors(probe))
    fold_weights(graph, values)
    check_graph(plain, graph, values, probe, [name for name in rounded if name not in recurrent])
    _check_recurrent(graph, recurrent)
    return values


def _left_out(wiring: Wiring) -> set[str]:
    """Return the layers without nodes in the graph: those that do not depend on the inputs, which the optimizer computes once, and those
    that no output depends on, which it removes."""
    unread = set(wiring.layer_names()) - wiring.layers_behind(escaped=True)
    return unread | wiring.constant_layers()


def _key(plain: nn.Module, inputs: Inputs, length: int | None) -> str | None:
    """Return the cache key of the graph; None if the forward pass cannot be recorded."""
    try:
        return graph_digest(plain, inputs, length)
    except Exception:  # the network's code may raise any error at another size, or under a recorder
        return None


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return each name of a module -> its first one, which anybit uses; scopes have the name by which the forward called it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(module), name) for name, module in model.named_modules(remove_duplicate=False)}


def _tidy(graph: ir.Model, weights: Mapping[str, np.ndarray], aliases: Mapping[str, str]) -> None:
    graph.ir_version = IR_VERSION
    _name_layers(graph, weights, aliases)
    _pool_means(graph)
    _merge_padding(graph)
    _count_no_padding(graph)


def _name_layers(model: ir.Model, weights: Mapping[str, np.ndarray], aliases: Mapping[str, str]) -> None:
    """Mark the nodes that compute each layer: operators in the layer's scope on the layer's own weight. Each call has a name."""
    names, calls = set(weights), Counter[str]()
    counts: dict[str, int] = {}

    def numbered(name: str) -> str:
        """Return `name`, with a number if another node has it."""
        counts[name] = counts.get(name, 0) + 1
        unique = name if counts[name] == 1 else f"{name}.{counts[name]}"
        if unique in names:
            return numbered(name)
        names.add(unique)
        return unique

    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        owners = [aliases.get(scope, scope) for scope in scopes[:-1]]  # the last is the operator's own
        layer = next((owner for owner in reversed(owners) if owner in weights), None)
        if layer is not None and node.op_type in LAYER_OPERATORS and _computes(node, weights[layer]):
            calls[layer] += 1
            node.metadata_props[LAYER], node.name = layer, name_of_call(layer, calls[layer])
            names.add(name_of(node))
            continue
        if layer is not None and node.op_type in LAYER_OPERATORS and node.outputs[0].dtype == ir.DataType.FLOAT:
            node.metadata_props[INSTEAD] = layer
        product = maker(node.inputs[0]) if node.inputs else None
        of_the_layer = product is not None and product.op_type == "MatMul" and product.metadata_props.get(LAYER) == layer
        if layer is not None and of_the_layer and node.op_type == "Add" and getattr(constant(node.inputs[1]), "ndim", 0) == 1:
            node.metadata_props.update({LAYER: layer, BIAS: name_of(product)})
        node.name = numbered(".".join(filter(None, [_owner(scopes), node.op_type.lower()])))


def _computes(node: ir.Node, weight: np.ndarray) -> bool:
    """Return whether the operator is the layer with this weight; a matmul, which has none, multiplies no constants."""
    if not weight.size:
        return node.op_type == "MatMul" and all(constant(value) is None for value in node.inputs)
    return _is_weight(_weight_of(node), weight)


def _weight_of(node: ir.Node) -> np.ndarray | None:
    """Return the constant weight of a layer's operator."""
    return constant(node.inputs[layer_operator(node.op_type).weight_input])


def _is_weight(array: np.ndarray | None, weight: np.ndarray) -> bool:
    """Return whether `array` is the layer's weight, possibly transposed."""
    if array is None or array.size != weight.size:
        return False
    return np.array_equal(array, weight) or (array.ndim == 2 and np.array_equal(array.T, weight))


def _owner(scopes: Sequence[str]) -> str:
    """Return the module that ran the operator: the last scope but one."""
    return scopes[-2] if len(scopes) > 1 else ""


def _pool_means(model: ir.Model) -> None:
    for node in list(model.graph):
        shape = operand(node, 0).shape if node.op_type == "ReduceMean" else None
        if shape is None or len(shape) != 4:
            continue
        axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
        pool.outputs[0].shape, pool.outputs[0].type = ir.Shape([*shape[:2], 1, 1]), ir.TensorType(ir.DataType.FLOAT)
        added = [pool] if keeps else [pool, ir.node("Flatten", [pool.outputs[0]], {"axis": 1}, name=f"{node.name}.flatten")]
        _replace(model.graph, node, added)


def _replace(graph: ir.Graph, node: ir.Node, added: Sequence[ir.Node]) -> None:
    """Replace `node` by `added`, the last of which computes its output."""
    output = added[-1].outputs[0]
    output.name, output.shape, output.type = name_of(node.outputs[0]), node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(graph, node, [node], added, node.outputs, added[-1].outputs)


def _merge_padding(model: ir.Model) -> None:
    """Merge a zero Pad of the spatial dimensions into the pads of convolutions if these are its only readers."""
    for node in list(model.graph):
        if node.op_type != "Pad" or any(attribute.value != "constant" for attribute in node.attributes.values()):
            continue
        pads, value = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
        readers = [use.node for use in node.outputs[0].uses()]
        if pads is None or (value is not None and value.any()) or (len(node.inputs) > 3 and node.inputs[3] is not None):
            continue
        begins, ends = np.split(pads, 2)
        if begins[:2].any() or ends[:2].any() or (pads < 0).any() or any(reader.op_type != "Conv" for reader in readers):
            continue
        if not readers or node.outputs[0].is_graph_output():
            continue
        for reader in readers:
            own = reader.attributes["pads"].as_ints() if "pads" in reader.attributes else [0] * (len(begins[2:]) * 2)
            reader.attributes["pads"] = ir.AttrInt64s("pads", [int(a + b) for a, b in zip(own, [*begins[2:], *ends[2:]], strict=True)])
            reader.replace_input_with(0, node.inputs[0])
        model.graph.remove(node, safe=True)


def _count_no_padding(model: ir.Model) -> None:
    """Remove `count_include_pad` from average pools without padding: with `ceil_mode`, integer kernels would count beyond the end."""
    for node in model.graph:
        pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else []
        if node.op_type == "AveragePool" and not any(pads) and "auto_pad" not in node.attributes:
            node.attributes.pop("count_include_pad", None)


# Values


def values_on(model: ir.Model, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Compute every float value of the graph on these inputs, in the runtime without optimizations."""
    shown = ir.from_proto(ir.to_proto(model))
    shown_names = {name_of(value) for value in shown.graph.outputs}
    for node in shown.graph:
        new = [value for value in node.outputs if name_of(value) not in shown_names and isinstance(value.type, ir.TensorType)]
        shown.graph.outputs.extend(value for value in new if value.dtype == ir.DataType.FLOAT)
    feeds = {name_of(value): tensor.numpy() for value, tensor in zip(model.graph.inputs, inputs, strict=True)}
    names = [name_of(value) for value in shown.graph.outputs]
    try:
        return feeds | dict(zip(names, run_unoptimized(shown, feeds, names), strict=True))
    except Exception as error:  # the runtime's errors derive from Exception alone
        raise UnsupportedModel(
            f"ONNX Runtime cannot run the graph that the exporter gives: {' '.join(str(error).split())[:300]} Replace that operator."
        ) from error


def check_graph(plain: nn.Module, graph: ir.Model, values: Mapping[str, np.ndarray], probe: Batch, quantized: Iterable[str]) -> None:
    """Raise UnsupportedModel if the graph does not compute what `plain` does on the probe inputs.

    Exporters have gaps; and a layer's class may have a forward that does more than the layer's operator, so the operator's operands
    are not what the quantizers round. `quantized` names the layers with quantizers.
    """
    inputs: dict[str, list[np.ndarray]] = {name: [] for name in quantized}

    def keep(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        read = tensors_in((args, kwargs))
        if read and type_of(module).reads_numbers:  # no quantizer rounds indices, which a forward may shift or make
            inputs[name].append(_padded(module, read[0].detach().float()).numpy().copy())

    hooks = [plain.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True) for name in inputs]
    try:
        with torch.no_grad():
            outputs = tensors_in(call(plain, probe.inputs))
    finally:
        for hook in hooks:
            hook.remove()
    for value, output in zip(graph.graph.outputs, outputs, strict=True):
        if name_of(value) in values and not _alike(values[name_of(value)], output.float().numpy()):
            raise UnsupportedModel(
                f"The ONNX exporter changes the network: its output {name_of(value)} differs from the network's. It translates one of "
                "the network's operators only in part; replace that one."
            )
    for name, calls in inputs.items():
        nodes = layer_nodes(graph.graph, name)
        other = any(node.metadata_props.get(INSTEAD) == name for node in graph.graph)
        if (other and not nodes) or not all(any(_reads(node, taken, values) for node in nodes) for taken in calls):
            raise UnsupportedModel(
                f"{name}: the forward of {type(plain.get_submodule(name)).__name__} does not compute with its weight and input as they "
                f"are, so an integer kernel cannot take its place. Keep the layer float: --keep='{name}=float'."
            )


def _check_recurrent(graph: ir.Model, weights: Mapping[str, np.ndarray]) -> None:
    """Raise UnsupportedModel naming the first matrix of a recurrent layer that no recurrent operator of the graph uses."""
    held = {name for _, _, names in matrices(graph, weights) for name in names}
    for name in weights:
        if name not in held:
            raise UnsupportedModel(
                f"{name}: the ONNX exporter writes out the recurrent layer to which it belongs, and none of its operators uses "
                f"this matrix. Keep it float: --keep='{name}=float'."
            )


def _padded(layer: nn.Module, taken: Tensor) -> Tensor:
    """Return the input of a convolution, padded if the layer pads with other numbers than zero."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer.padding_mode == "zeros":
        return taken
    return F.pad(taken, layer._reversed_padding_repeated_twice, layer.padding_mode)


def layer_nodes(graph: ir.Graph, layer: str) -> list[ir.Node]:
    """Return the operators of all calls of a layer, without the sums that add a bias."""
    return [node for node in graph if node.metadata_props.get(LAYER) == layer and BIAS not in node.metadata_props]


def _reads(node: ir.Node, taken: np.ndarray, values: Mapping[str, np.ndarray]) -> bool:
    """Return whether the operator reads the layer's input in a call, apart from zeros around it that the operator now pads itself."""
    read = values.get(name_of(node.inputs[1 - layer_operator(node.op_type).weight_input]))
    if read is None:
        return True
    if node.op_type == "Conv" and read.size < taken.size:
        return _alike(np.abs(read).sum(), np.abs(taken).sum())
    return _alike(read, taken)


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether both are equal up to the order of float sums."""
    return a.size == b.size and bool(np.allclose(np.reshape(a, -1), np.reshape(b, -1), rtol=1e-3, atol=1e-3 * np.abs(b).max(initial=1e-12)))


def edge_names(values: Mapping[str, np.ndarray], shown: Sequence[tuple[str, np.ndarray]], rounded: Collection[str]) -> dict[str, str]:
    """Match values of the graph, in order, to the `rounded` ones among the edges `shown` by the network, in order, on the same inputs.

    Exporters rename, merge and split operators, but numbers on real inputs identify each tensor. If several edges have the same numbers (a
    clamp without effect, for example, and its input), each value gets the next in order; a rounded edge that is left over gets a value of
    another.
    """
    alike: dict[str, list[int]] = {}
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, (_, array) in enumerate(shown):
        by_shape.setdefault(array.shape, []).append(index)
    for name, array in values.items():
        tolerance = 1e-4 * (np.abs(array).max(initial=0) + 1e-12)
        alike[name] = [i for i in by_shape.get(array.shape, []) if np.abs(array - shown[i][1]).max(initial=0) <= tolerance]
    taken: dict[str, int] = {}
    for name, indices in alike.items():
        if indices:
            taken[name] = next((index for index in indices if index not in taken.values()), indices[-1])
    edges = {name: shown[index][0] for name, index in taken.items()}
    for index, (edge, _) in enumerate(shown):
        if edge in rounded and edge not in edges.values():
            spare = next((name for name, indices in alike.items() if index in indices and edges[name] not in rounded), None)
            edges |= {} if spare is None else {spare: edge}
    return {name: edge for name, edge in edges.items() if edge in rounded}


def probe_of(batch: Batch, count: int) -> Batch:
    """Return the first `count` samples."""
    return batch.head(count)


def input_tensors(batch: Batch) -> list[Tensor]:
    """Return the graph's inputs, in order."""
    return [tensor.contiguous() for tensor in tensors_in(batch.inputs)]
