"""The rule for which tensors an integer runtime holds as 8-bit codes, shared by the simulation and the exported file.

    a layer's input            is rounded by the layer's own quantizer if nothing else reads the tensor
    a tensor with more readers is one 8-bit edge if an integer operator computes or joins it; a layer of fewer bits rounds it again, an
                               8-bit layer reads the edge's codes
    moving numbers             (reshape, transpose, maximum pool, slice) keeps the codes of the input
    a clamp                    (ReLU, ReLU6) bounds the codes: rounding is monotonic, so clamping before or after it is the same
    a function of one tensor   (SiLU, GELU, hard-swish, x + 1) is computed in float between quantizers

The network's outputs stay float if the layer before them returns floats without being slower (a linear), and no edge lies between two
operators that both compute in float.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from anybit.networks.layer_types import type_of
from anybit.networks.wiring import ACTIVATIONS, LAYER, Operation, Wiring
from anybit.scheme import Precision, Scheme

POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "mean"}
JOINT = {"add", "mul", "cat", "concat", "concatenate"} | POOLS
"""Functions for which runtimes have integer kernels."""
ELEMENTWISE = set(ACTIVATIONS) | {
    "add", "sub", "rsub", "mul", "div", "rdiv", "truediv", "rtruediv", "true_divide", "divide", "multiply", "subtract", "pow", "square",
    "sqrt", "rsqrt", "exp", "log", "abs", "neg", "min", "max", "minimum", "maximum", "reciprocal", "floor", "ceil", "round", "erf", "selu",
    "celu", "softplus", "softsign", "logsigmoid",
}  # fmt: skip


@dataclass(frozen=True)
class RoundedEdges:
    """names  of the edges that are rounded to 8 bits, in the order of `Wiring.edges`
    reads     layer -> the edge that each of its operands is, or None
    """

    names: tuple[str, ...] = ()
    reads: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)


def computes_on_integers(layer: nn.Module, precision: Precision) -> bool:
    """Return whether runtimes have an integer kernel for the layer at this precision."""
    kind = type_of(layer)
    has_codes = precision.weight_bits is not None or not kind.has_weights
    return kind.integer and precision.activation_bits is not None and has_codes and getattr(layer, "weight_group", None) is None


def rounded_edges(wiring: Wiring, layers: Mapping[str, nn.Module], scheme: Scheme, tables: bool = False) -> RoundedEdges:
    """Return the edges that are rounded when `layers`, by name, have the precisions of `scheme`.

    tables  whether functions of one tensor are computed as tables of codes
    """
    rule = _Rule(
        wiring, {name: layers[name] for name, precision in scheme.items() if computes_on_integers(layers[name], precision)}, tables
    )
    recorded = wiring.edges()
    names = {rule.names[root] for root in rule.groups if rule.names[root] in recorded and rule.is_edge(root)}
    reads: dict[str, tuple[str | None, ...]] = {}
    for op in rule.ops:
        if op.kind != LAYER or op.name not in scheme or scheme[op.name].activation_bits is None:
            continue
        read = tuple(name if (name := rule.names[rule.root[value]]) in names else None for value in op.inputs)
        if len(read) != type_of(layers[op.name]).operands or reads.get(op.name, read) != read:  # one grid serves one edge
            read = (None,) * type_of(layers[op.name]).operands
        reads[op.name] = read
    return RoundedEdges(tuple(name for name in recorded if name in names), reads)


class _Rule:
    """Apply the rule to a wiring; operations are named by their index in it, values by their number.

    integer layers that compute on integers, by name
    root    value -> the value whose codes it shares;   groups  root -> all values that share its codes
    names   root -> the name of the operation that computes it, or of the network's input
    """

    def __init__(self, wiring: Wiring, integer: Mapping[str, nn.Module], tables: bool):
        self.ops = wiring.operations_behind(escaped=True)  # a file leaves the others out
        self.outputs, self.escaped = set(wiring.output_values), wiring.escaped
        self.integer = {at for at, op in enumerate(self.ops) if op.kind == LAYER and op.name in integer}
        self.gives_codes = {at for at in self.integer if type_of(integer[self.ops[at].name]).gives_codes}
        self.root = {value: value for value in wiring.input_values}
        self.names = {value: f"input/{index}" for index, value in enumerate(wiring.input_values)}
        self.maker: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        for at, op in enumerate(self.ops):
            for value in dict.fromkeys(op.inputs):
                self.readers.setdefault(value, []).append(at)
            for value in op.outputs:
                self.maker[value] = at
                self.root[value] = self.root[op.inputs[0]] if op.moves and op.inputs else value
                self.names.setdefault(value, op.edge)
        self.groups: dict[int, list[int]] = {}
        for value, root in self.root.items():
            self.groups.setdefault(root, []).append(value)
        self.base = self._functions()
        self.tables = {value for value in self.base if self._is_table(value)} if tables else set()
        self.reaching, self.convolved = self._reaching(), self._convolved()

    def is_edge(self, root: int) -> bool:
        """Return whether a value, with all that share its codes, is rounded to 8 bits."""
        maker, members = self.maker.get(root), self.groups[root]
        if self._only_clamped(root) or (maker is not None and len(self.ops[maker].outputs) != 1):
            return False
        readers = [at for value in members for at in self.readers.get(value, []) if not self._is_member(at, root)]
        joined, tabled = any(map(self._joins, readers)), any(self.base[table] in members for table in self.tables)
        reads = sum(value in members for at in set(readers) & self.integer for value in self.ops[at].inputs)
        is_output, is_escaped = bool(self.outputs & set(members)), bool(self.escaped & set(members))
        others = is_escaped or not self.integer.issuperset(readers)
        computed = self._computed(root)
        if not (readers or is_output or is_escaped):
            return False
        if not (reads or joined or tabled or computed is not None) or (is_output and not readers and computed not in self.gives_codes):
            return False
        if reads and not (joined or tabled) and computed is None and reads + others > 1:
            return False  # each layer rounds the floats itself
        return reads != 1 or others or is_output  # its only reader rounds it itself

    def _is_member(self, at: int, root: int) -> bool:
        return any(self.root[value] == root for value in self.ops[at].outputs)

    def _clamps(self, at: int) -> bool:
        return self.ops[at].clamps and self.ops[at].outputs[0] not in self.base

    def _only_clamped(self, value: int) -> bool:
        """Return whether a clamp is the only reader of an operator's result: the clamp's output is then the rounded value."""
        readers = self.readers.get(value, [])
        alone = len(readers) == 1 and len(self.groups[value]) == 1 and value in self.maker and value not in self.outputs | self.escaped
        return alone and self._clamps(readers[0])

    def _computed(self, root: int) -> int | None:
        """Return the operation that computes the value, if it can compute on integers only with a quantizer after it (a linear needs
        none)."""
        maker = self.maker.get(root)
        while maker is not None and self._clamps(maker):
            maker = self.maker.get(self.ops[maker].inputs[0])
        if maker is None:
            return None
        return maker if maker in self.gives_codes or self._joins(maker) or self.ops[maker].outputs[0] in self.tables else None

    def _joins(self, at: int) -> bool:
        """Return whether the operation is computed on integers: a sum, product, concatenation or mean of convolutions' outputs."""
        op = self.ops[at]
        on_integers = at in self.touching and at in self.reaching and at in self.convolved and op.kind in JOINT and self._on_codes(at)
        if not on_integers or op.outputs[0] in self.base or op.constants:
            return False
        return self._pools_images(op) if op.kind in POOLS else len(op.inputs) > 1

    def _pools_images(self, op: Operation) -> bool:
        if op.kind.startswith("avg_pool"):
            return True
        shape = self._shape(op.inputs[0])
        return shape is not None and len(shape) == 4 and op.shape in (shape[:2], (*shape[:2], 1, 1))

    def _on_codes(self, at: int) -> bool:
        """Return whether a sum or product can be computed on integers: not one that masks a softmax, whose huge numbers leave no codes for
        others, nor the factor per row of a norm."""
        op = self.ops[at]
        sizes = {shape[-1] for value in op.inputs if (shape := self._shape(value)) is not None and len(shape) == 3}
        factors = op.kind == "mul" and len(sizes) > 1 and 1 in sizes
        return not factors and all(self.ops[reader].kind != "softmax" for reader in self.readers.get(op.outputs[0], []))

    def _shape(self, value: int) -> tuple[int, ...] | None:
        maker = self.maker.get(value)
        return None if maker is None else self.ops[maker].shape

    @cached_property
    def touching(self) -> set[int]:
        """Return the operations that are connected to an integer layer through others with integer kernels."""
        reached: set[int] = set()
        ahead = list(self.integer)
        while ahead:
            op = self.ops[ahead.pop()]
            makers = [self.maker[value] for value in op.inputs if value in self.maker]
            readers = [reader for value in op.outputs for reader in self.readers.get(value, [])]
            for other in {*makers, *readers} - reached:
                if self.ops[other].kind != LAYER and (self.ops[other].moves or self.ops[other].kind in JOINT | ELEMENTWISE):
                    reached.add(other)
                    ahead.append(other)
        return reached

    def _functions(self) -> dict[int, int]:
        """Return value -> the value of which it is an elementwise function, except clamps."""
        base: dict[int, int] = {}
        for at, op in enumerate(self.ops):
            bases = {base.get(value, value) for value in op.inputs}
            of_one = len(bases) == 1 and not op.constants and len(op.outputs) == 1
            clamps_alone = op.clamps and op.inputs[0] not in base
            if op.kind in ELEMENTWISE and at in self.touching and of_one and not clamps_alone:
                base[op.outputs[0]] = bases.pop()
        return base

    def _is_table(self, value: int) -> bool:
        readers = self.readers.get(value, [])
        return value in self.outputs or any(self.ops[at].outputs[0] not in self.base for at in readers)

    def _passes(self, at: int) -> bool:
        return self.ops[at].moves or self.ops[at].clamps or self.ops[at].outputs[0] in self.base

    def _reaching(self) -> set[int]:
        """Return the operations whose numbers reach an integer layer, a pool or the outputs through operations with integer kernels only. A
        sum that only a norm reads is not one: rounding it on integers would gain nothing."""
        reaching: set[int] = set()
        for at in reversed(range(len(self.ops))):
            outputs = self.ops[at].outputs
            readers = [reader for value in outputs for reader in self.readers.get(value, [])]
            if self.outputs & set(outputs) or any(self._takes_codes(reader, reaching) for reader in readers):
                reaching.add(at)
        return reaching

    def _takes_codes(self, at: int, reaching: set[int]) -> bool:
        if at in self.integer:
            return True
        return at in reaching and (self._passes(at) or (self.ops[at].kind in JOINT and self._on_codes(at)))

    def _convolved(self) -> set[int]:
        """Return the operations that compute on integers from convolutions' outputs: a linear returns floats without being slower, a
        convolution does not."""
        convolved: set[int] = set()
        for at, op in enumerate(self.ops):
            passes = op.kind != LAYER and (self._passes(at) or op.kind in JOINT)
            if at in self.gives_codes or (passes and any(self.maker.get(value) in convolved for value in op.inputs)):
                convolved.add(at)
        return convolved
