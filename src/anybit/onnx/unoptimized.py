"""Run a graph unoptimized in ONNX Runtime: one kernel for each node, without folding or fusion."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from anybit.onnx.values import name_of


def run_unoptimized(model: ir.Model, feeds: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> list[np.ndarray]:
    """Return the graph's outputs, or those of `names`. Errors of the runtime are passed on; they derive from Exception alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(names, dict(feeds))


def run_node(node: ir.Node, inputs: Sequence[np.ndarray | None], versions: tuple[int, int]) -> list[np.ndarray]:
    """Return the outputs of one node on these inputs; `versions` are the operator set's and the file format's."""
    arrays = {name_of(value): array for value, array in zip(node.inputs, inputs, strict=True) if value is not None and array is not None}
    values = {
        name: ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
        for name, array in arrays.items()
    }
    takes = [None if value is None else values[name_of(value)] for value in node.inputs]
    copy = ir.Node(node.domain, node.op_type, takes, list(node.attributes.values()), num_outputs=len(node.outputs), name=node.name)
    for output, value in zip(copy.outputs, node.outputs, strict=True):
        output.name = name_of(value)
    graph = ir.Graph(list(values.values()), copy.outputs, nodes=[copy], opset_imports={"": versions[0]}, name="one")
    return run_unoptimized(ir.Model(graph, ir_version=versions[1]), arrays)
