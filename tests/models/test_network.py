"""Siblings of the guard over other bases: what they read, give, and leave on disk."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from models import checkpoint, network
from models.checkpoint import Checkpoint
from models.guard import COLUMNS
from models.inputs import WINDOW_TOKENS
from models.network import GuardNetwork
from tests.checkpoints import tiny_checkpoint
from training import export

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 2 + WINDOW_TOKENS,
    # Standard deviation of the weights: large, so that no output is near to another by chance.
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "mpnet": {},
    "roberta": {"type_vocab_size": 1},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {name: 2 for name in ("bos_token_id", "eos_token_id", "cls_token_id")},
}
DECODERS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "llama": {"num_key_value_heads": 1},
}
SETTINGS = ENCODERS | DECODERS

encoders = pytest.mark.parametrize("kind", ENCODERS)
decoders = pytest.mark.parametrize("kind", DECODERS)
bases = pytest.mark.parametrize("kind", SETTINGS)


def base(kind: str, directory: Path, **changes: Any) -> str:
    """A pretrained model's directory, as a hub id would give it, of random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | SETTINGS[kind] | changes))
    AutoModel.from_config(config).save_pretrained(directory)
    return str(directory)


def batch(lengths: tuple[int, ...] = (12, 7, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of random tokens, padded on the right; the second half is segment 1."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, SIZES["vocab_size"], (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])
    segments = (torch.arange(max(lengths)) >= 4).long() * mask
    return ids * mask, mask, segments


@torch.no_grad()
def logits(guard: GuardNetwork, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return cast(Tensor, guard.eval()(*inputs))


def with_changed_adapters(guard: GuardNetwork) -> GuardNetwork:
    """As after training: a fresh adapter adds nothing."""
    torch.manual_seed(2)
    for name, parameter in guard.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return guard


@bases
def test_gives_a_row_of_logits_whose_severities_never_increase(kind: str, tmp_path: Path) -> None:
    result = logits(network.from_base(base(kind, tmp_path)), batch())
    assert result.shape == (3, COLUMNS)
    assert torch.isfinite(result).all()
    assert (result[:, 0] >= result[:, 1]).all()
    assert (result[:, 1] >= result[:, 2]).all()


@bases
def test_a_whole_window_fits_and_what_pads_a_row_does_not_count(kind: str, tmp_path: Path) -> None:
    guard = network.from_base(base(kind, tmp_path))
    short = batch((9,))
    padded = tuple(
        torch.nn.functional.pad(tensor, (0, WINDOW_TOKENS - 9)) for tensor in batch((9,))
    )
    ids, mask, segments = padded
    assert torch.allclose(logits(guard, short), logits(guard, (ids, mask, segments)), atol=1e-5)


@decoders
def test_a_decoder_may_be_padded_on_either_side(kind: str, tmp_path: Path) -> None:
    guard = network.from_base(base(kind, tmp_path))
    right = batch()
    shifts = [int((row == 0).sum()) for row in right[1]]
    ids, mask, segments = (
        torch.stack([row.roll(shift) for row, shift in zip(tensor, shifts, strict=True)])
        for tensor in right
    )
    assert torch.allclose(logits(guard, right), logits(guard, (ids, mask, segments)), atol=1e-5)


@decoders
def test_a_decoder_is_read_at_its_last_token_which_alone_has_seen_all(
    kind: str, tmp_path: Path
) -> None:
    guard = network.from_base(base(kind, tmp_path)).eval()
    # The half of the head that reads one token, without the half that reads the mean.
    with torch.no_grad():
        guard.head.weight[:, SIZES["hidden_size"] :] = 0
    ids, mask, segments = batch((6,))
    changed = ids.clone()
    changed[0, -1] += 1
    assert not torch.allclose(
        logits(guard, (ids, mask, segments)), logits(guard, (changed, mask, segments)), atol=1e-3
    )


@bases
def test_no_pooler_is_kept(kind: str, tmp_path: Path) -> None:
    guard = network.from_base(base(kind, tmp_path))
    assert not [name for name in guard.state_dict() if "pooler" in name]


@bases
def test_a_saved_sibling_loads_to_the_same_scores(kind: str, tmp_path: Path) -> None:
    guard = network.from_base(base(kind, tmp_path / "base"))
    tiny = Checkpoint(tiny_checkpoint(tmp_path / "tiny")).card
    settings = guard.encoder.config.to_diff_dict() | {"model_type": kind}
    network.save(guard, tmp_path / checkpoint.NETWORK)
    checkpoint.write_card(tmp_path, tiny.model_copy(update={"network": settings}))

    loaded = network.load(tmp_path)

    # float16 on disk.
    assert torch.allclose(logits(guard, batch()), logits(loaded, batch()), atol=2e-2)
    assert loaded.is_decoder == (kind in DECODERS)


@bases
def test_lora_learns_adapters_and_the_head_alone(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra 'train'")
    guard = network.from_base(base(kind, tmp_path), lora_rank=4)
    guard(*batch()).sum().backward()
    learnt = {name for name, value in guard.named_parameters() if value.grad is not None}
    assert learnt == {name for name, value in guard.named_parameters() if value.requires_grad}
    assert {name for name in learnt if "lora_" not in name} == {"head.weight", "head.bias"}
    assert len(learnt) > 2


@bases
def test_merged_lora_scores_as_before_and_is_plain(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra 'train'")
    plain = network.from_base(base(kind, tmp_path))
    guard = with_changed_adapters(network.from_base(str(tmp_path), lora_rank=4))
    before = logits(guard, batch())

    merged = network.merged(guard)

    assert isinstance(merged.encoder, PreTrainedModel)
    assert torch.allclose(logits(merged, batch()), before, atol=1e-5)
    assert torch.equal(logits(guard, batch()), before)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    changed = [
        name
        for name, value in plain.encoder.state_dict().items()
        if not torch.equal(value, merged.encoder.state_dict()[name])
    ]
    assert changed


def test_a_network_without_lora_is_its_own_merge(tmp_path: Path) -> None:
    guard = network.from_base(base("bert", tmp_path))
    assert network.merged(guard) is guard


def test_what_lora_saves_needs_no_peft_to_load(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra 'train'")
    guard = with_changed_adapters(network.from_base(base("qwen3", tmp_path), lora_rank=4))
    network.save(guard, tmp_path / "saved.safetensors")
    plain = network.from_base(str(tmp_path))
    plain.load_state_dict(network.stored_parameters(tmp_path / "saved.safetensors"))
    assert torch.allclose(logits(guard, batch()), logits(plain, batch()), atol=2e-2)


# MPNet's has no checkpointing.
@pytest.mark.parametrize("kind", sorted(SETTINGS.keys() - {"mpnet"}))
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_checkpointing_gives_the_same_gradients(
    kind: str, lora_rank: int | None, tmp_path: Path
) -> None:
    if lora_rank:
        pytest.importorskip("peft", reason="needs the extra 'train'")
    base(kind, tmp_path)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        guard = network.from_base(
            str(tmp_path), 0.0, lora_rank=lora_rank, gradient_checkpointing=checkpointing
        )
        if lora_rank:
            with_changed_adapters(guard)
        for part in guard.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        guard.train()(*batch()).sum().backward()
        learnt = ((name, p.grad) for name, p in guard.named_parameters())
        gradients.append({name: grad for name, grad in learnt if grad is not None})
    whole, again = gradients
    assert whole.keys() == again.keys()
    assert all(torch.allclose(whole[name], again[name], atol=1e-4) for name in whole)


def test_a_base_that_reads_less_than_a_window_is_refused(tmp_path: Path) -> None:
    short = base("bert", tmp_path, max_position_embeddings=128)
    with pytest.raises(ValueError, match="reads 128 tokens, but a window has 256"):
        network.from_base(short)


def test_a_decoder_is_exported_with_free_batch_and_length(tmp_path: Path) -> None:
    guard = network.from_base(base("qwen3", tmp_path, num_hidden_layers=1))
    expected = logits(guard, batch())
    export.to_onnx(guard, tmp_path / "guard.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "guard.onnx"))
    names = ("input_ids", "attention_mask", "token_type_ids")
    arrays = {name: tensor.numpy() for name, tensor in zip(names, batch(), strict=True)}
    (found,) = session.run(["logits"], arrays)
    assert np.allclose(found, expected.numpy(), atol=1e-4)
