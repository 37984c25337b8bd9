"""The guard as a torch network: an encoder with a severity, a category and a signal head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from models import checkpoint
from models.checkpoint import Checkpoint, CheckpointError
from models.guard import COLUMNS


class GuardNetwork(nn.Module):
    """Gives raw logits of shape (n, ``COLUMNS``), the three severities never increasing.

    A text is read as its first token's state beside the mean of all its tokens' states. Encoders
    without segment embeddings (RoBERTa, ModernBERT) see the separators alone.
    """

    def __init__(self, encoder: PreTrainedModel, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * encoder.config.hidden_size, COLUMNS)
        self.has_segments = getattr(encoder.config, "type_vocab_size", 0) > 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """All arguments int64 of shape (n, length); mask and segment are 1 or 0."""
        segments = {"token_type_ids": token_type_ids} if self.has_segments else {}
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **segments
        ).last_hidden_state
        valid = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * valid).sum(1) / valid.sum(1)
        raw = self.head(self.dropout(torch.cat([states[:, 0], mean], dim=-1)))
        # Each higher severity is the one below less something positive: monotone by construction.
        steps = torch.cat([raw[:, :1], -nn.functional.softplus(raw[:, 1:3])], dim=-1)
        return torch.cat([steps.cumsum(-1), raw[:, 3:]], dim=-1)


def from_base(base: str, dropout: float = 0.1) -> GuardNetwork:
    """A network over a pretrained encoder: a hub id or a directory. Heads are fresh."""
    config = AutoConfig.from_pretrained(base)
    # Dropped attention weights rule out the fused kernels, which are twice as fast.
    names = ("attention_probs_dropout_prob", "attention_dropout")
    no_dropout = {name: 0.0 for name in names if hasattr(config, name)}
    encoder = AutoModel.from_pretrained(
        base, dtype=torch.float32, **no_dropout, **_arguments(config)
    )
    return GuardNetwork(cast(PreTrainedModel, encoder), dropout)


def freeze(network: GuardNetwork, layers: int) -> None:
    """Keeps the embeddings and the lowest ``layers`` as they are; none of it for 0."""
    if not layers:
        return
    stack = max(
        (module for module in network.encoder.modules() if isinstance(module, nn.ModuleList)),
        key=len,
    )
    embeddings = network.encoder.get_input_embeddings()
    for module in (embeddings, *stack[:layers]):
        module.requires_grad_(False)


def load(directory: Path) -> GuardNetwork:
    """The network of a checkpoint, in float32; ``CheckpointError`` if its shapes differ."""
    stored = Checkpoint(directory)
    settings = dict(stored.card.network)
    config: PretrainedConfig = AutoConfig.for_model(settings.pop("model_type"), **settings)
    encoder = AutoModel.from_config(config, dtype=torch.float32, **_arguments(config))
    network = GuardNetwork(encoder)
    path = stored.file(checkpoint.NETWORK)
    try:
        network.load_state_dict(stored_parameters(path))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return network


def stored_parameters(path: Path) -> dict[str, Tensor]:
    """The parameters that ``save`` wrote, in float32."""
    return {name: value.float() for name, value in load_file(path).items()}


def save(network: GuardNetwork, path: Path) -> None:
    """Writes the parameters as float16 safetensors."""
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, path)


def _arguments(config: PretrainedConfig) -> dict[str, Any]:
    """BERT's pooler is not used: leaving it out saves its parameters."""
    return {"add_pooling_layer": False} if config.model_type in {"bert", "roberta"} else {}
