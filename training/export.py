"""From a trained network to the files that are served: ONNX, and int8 ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from models.guard import COLUMNS
from models.network import GuardNetwork


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


def to_int8(source: Path, target: Path) -> None:
    """Quantises weights to int8, per output channel; activations are quantised as they come.

    Per-tensor scales lose small encoders (cosine 0.88 against 0.98), hence per channel. Seven bits
    of the range are used: products of eight overflow on processors without VNNI instructions, and
    scores would depend on the machine. The head stays in float32: it is small, and its outputs are
    what the calibration reads.
    """
    model = onnx.load(source)
    head = [
        node.name for node in model.graph.node if any(is_head(model, name) for name in node.input)
    ]
    # The exporter's notes on shapes: the quantiser infers its own; older ones stop at a quarrel.
    del model.graph.value_info[:]
    quantize_dynamic(
        model,
        target,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=head,
    )


def is_head(model: onnx.ModelProto, name: str) -> bool:
    """Whether ``name`` is the weight of the network's last layer."""
    return any(
        tensor.name == name and COLUMNS in tensor.dims and len(tensor.dims) == 2
        for tensor in model.graph.initializer
    )
