"""What is served is int8, and a row's scores are its own."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from models import checkpoint
from models.inputs import GuardInput
from models.text_guard import TextGuard, model_inputs
from tests.checkpoints import tiny_checkpoint
from training import export


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_neighbours_and_padding_change_no_scores(directory: Path) -> None:
    guard = TextGuard(directory)
    texts = ("how is the weather", "what is it 7", "the bike " * 60, "z" * 80)
    windows = [guard.prepare(GuardInput("prompt", text)).windows[0] for text in texts]
    together = guard.score(windows)
    for window, logits in zip(windows, together, strict=True):
        np.testing.assert_allclose(guard.score([window])[0], logits, atol=1e-4, rtol=0)


def test_words_and_weights_are_int8_and_leave_products_room(directory: Path) -> None:
    graph = onnx.load(directory / checkpoint.ONNX).graph
    tables = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    vocabulary = TextGuard(directory).checkpoint.card.network["vocab_size"]
    (words,) = [t for t in tables if t.dims[0] == vocabulary and t.dims[1] > 1]
    assert words.data_type == TensorProto.INT8
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 2 * 6
    by_name = {tensor.name: tensor for tensor in tables}
    for node in products:
        weight = numpy_helper.to_array(by_name[node.input[1]])
        assert weight.dtype == np.int8
        # Two products of bytes are added in 16 bits where there are no VNNI instructions.
        assert 2 * 255 * np.abs(weight.astype(int)).max() < 2**15


def test_it_runs_on_a_plain_cpu_session(directory: Path) -> None:
    session = onnxruntime.InferenceSession(
        directory / checkpoint.ONNX, providers=["CPUExecutionProvider"]
    )
    windows = TextGuard(directory).prepare(GuardInput("prompt", "is it fine")).windows
    (logits,) = session.run(["logits"], model_inputs(windows))
    assert np.isfinite(logits).all()


def test_without_texts_there_are_no_ranges(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold out at least one row"):
        export.to_int8(tmp_path / "none.onnx", tmp_path / "int8.onnx", [])
