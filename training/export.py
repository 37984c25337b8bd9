"""From a trained network to the files that are served: ONNX, and int8 ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from models.guard import pack
from models.inputs import Window
from models.network import GuardNetwork
from models.text_guard import model_inputs

_FARTHEST: Final = 2.0
"""How many times as far as the median channel a channel may reach before it is divided."""

_CALIBRATION_TOKENS: Final = 1024
"""In a batch, whose activations of all layers are held at once."""

_CONTRIBUTED: Final = "com.microsoft"


def to_onnx(network: GuardNetwork, path: Path) -> None:
    """Writes the network in float32 with free batch and length axes."""
    network.eval()
    # Other kinds of attention export with a guard against rows without a token: a tenth slower.
    network.encoder.set_attn_implementation("eager")
    # Three tensors: the exporter takes one that is passed twice for one input.
    ids, mask, types = (torch.full((2, 16), value, dtype=torch.int64) for value in (5, 1, 0))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    axes = {0: batch, 1: length}
    with warnings.catch_warnings():
        # The exporter warns of its own use of torch, and of axes that it calls by one name.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (ids, mask, types),
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=["logits"],
            dynamic_shapes=(axes, axes, axes),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("the exporter gave no program")
    program.save(str(path))


def to_int8(source: Path, target: Path, windows: Sequence[Window]) -> None:
    """Quantises words and encoder to int8, activations by the ranges that ``windows`` show.

    Ranges are fixed: taken as they come, they would be those of a whole batch, and a row's scores
    would hang on its neighbours. A few channels reach ten times as far as the rest and would take
    all of the range. They are divided, and their weights multiplied, as in SmoothQuant
    (arXiv:2211.10438), but only they: an even spread over all channels clips what rarer texts hold.

    Weights have a scale for each output channel (per-tensor scales lose small encoders) and seven
    bits: products of eight overflow on processors without VNNI instructions, and scores would
    depend on the machine. Each word has its own scale. The head stays in float32: it is small, and
    its outputs are what the calibration reads.

    Raises ``ValueError`` where there are no windows.
    """
    if not windows:
        raise ValueError("int8 needs texts to take its ranges from: hold out at least one row")
    model = onnx.load(source)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    biases = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    reaches = _reaches(model, sorted({node.input[0] for node in products}), windows)
    made = _Made([], [])
    activations: dict[str, _Activation] = {}
    joined: set[str] = set()
    for node in graph.node:
        if node in products:
            source_name, weight_name = node.input
            if source_name not in activations:
                activations[source_name] = _activation(made, source_name, *reaches[source_name])
            weight = numpy_helper.to_array(weights[weight_name])
            output, bias = node.output[0], ""
            users = [user for user in graph.node if output in user.input]
            if len(users) == 1 and users[0].op_type == "Add":
                bias = next((name for name in users[0].input if name in biases), "")
            if bias:
                (output,) = users[0].output
                joined.add(output)
            _product(made, activations[source_name], weight_name, weight, bias, output)
        elif node.op_type == "Gather" and node.input[1] == "input_ids":
            _words(made, node, numpy_helper.to_array(weights[node.input[0]]))
        elif node.output[0] not in joined:
            made.nodes.append(node)
    used = {name for node in made.nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in used] + made.constants
    # The exporter's notes on shapes speak of tensors that are gone.
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(made.nodes)
    graph.initializer.extend(constants)
    model.opset_import.append(helper.make_opsetid(_CONTRIBUTED, 1))
    onnx.save(model, target)


@dataclass(frozen=True, slots=True)
class _Made:
    """The nodes of the new graph, in order, and the constants that it adds."""

    nodes: list[NodeProto]
    constants: list[TensorProto]

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output


@dataclass(frozen=True, slots=True)
class _Activation:
    """A tensor as uint8, its channels divided by ``divisors``."""

    inputs: tuple[str, str, str]
    """Names of the tensor, its scale and its zero."""
    divisors: NDArray[np.float32]


def _reaches(
    model: onnx.ModelProto, names: Sequence[str], windows: Sequence[Window]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Least and greatest value of each channel of the named tensors, over all tokens; 0 is in."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = [node.name for node in session.get_inputs()]
    reaches: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for rows in pack([len(window) for window in windows], _CALIBRATION_TOKENS):
        arrays = model_inputs([windows[row] for row in rows])
        real = arrays["attention_mask"] > 0
        found = session.run(names, {name: arrays[name] for name in inputs})
        for name, values in zip(names, found, strict=True):
            low, high = reaches.get(name, (np.float32(0), np.float32(0)))
            tokens = values[real]
            reaches[name] = (
                np.minimum(low, tokens.min(axis=0)),
                np.maximum(high, tokens.max(axis=0)),
            )
    return reaches


def _activation(
    made: _Made, name: str, low: NDArray[np.float32], high: NDArray[np.float32]
) -> _Activation:
    """Quantises a tensor whose channels reach from ``low`` to ``high``."""
    reach = np.maximum(-low, high)
    divisors = np.maximum(reach / (_FARTHEST * np.median(reach) + 1e-9), 1).astype(np.float32)
    least, greatest = (low / divisors).min(), (high / divisors).max()
    scale = np.float32(max((greatest - least) / 255, 1e-9))
    zero = np.uint8(np.clip(np.rint(-least / scale), 0, 255))
    divided = name
    if divisors.max() > 1:
        factors = made.constant(f"{name}.factors", 1 / divisors)
        divided = made.node("Mul", [name, factors], f"{name}.divided")
    constants = made.constant(f"{name}.scale", scale), made.constant(f"{name}.zero", zero)
    whole = made.node("QuantizeLinear", [divided, *constants], f"{name}.uint8")
    return _Activation((whole, *constants), divisors)


def _product(
    made: _Made,
    activation: _Activation,
    name: str,
    weight: NDArray[np.float32],
    bias: str,
    output: str,
) -> None:
    """An activation times a weight of shape (channels, outputs), in integers, to float32."""
    multiplied = weight * activation.divisors[:, None]
    scales = (np.maximum(np.abs(multiplied).max(axis=0), 1e-9) / 63).astype(np.float32)
    whole = made.constant(f"{name}.int8", np.rint(multiplied / scales).astype(np.int8))
    quantised, scale, zero = activation.inputs
    inputs = [quantised, whole, scale, made.constant(f"{name}.scales", scales), zero, ""]
    made.node("MatMulIntegerToFloat", [*inputs, bias], output, domain=_CONTRIBUTED)


def _words(made: _Made, node: NodeProto, table: NDArray[np.float32]) -> None:
    """Looks words up in int8, each row of ``table`` with a scale of its own."""
    name, ids = node.input
    scales = (np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-9) / 127).astype(np.float32)
    whole = made.constant(f"{name}.int8", np.rint(table / scales).astype(np.int8))
    found = made.node("Gather", [whole, ids], f"{name}.found")
    scale = made.node("Gather", [made.constant(f"{name}.scales", scales), ids], f"{name}.scale")
    real = made.node("Cast", [found], f"{name}.real", to=TensorProto.FLOAT)
    made.node("Mul", [real, scale], node.output[0])
