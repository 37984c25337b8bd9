"""The guard as a torch network: a text model with a severity, a category and a signal head."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from models import checkpoint
from models.checkpoint import Checkpoint, CheckpointError
from models.guard import COLUMNS
from models.inputs import WINDOW_TOKENS


class GuardNetwork(nn.Module):
    """Gives raw logits of shape (n, ``COLUMNS``), the three severities never increasing.

    A text is read as one token's state beside the mean of all its tokens' states: an encoder's
    first, a decoder's (Qwen, Llama) last, which alone has seen the whole. Models without segment
    embeddings (RoBERTa, ModernBERT, decoders) see the separators alone.
    """

    def __init__(self, encoder: PreTrainedModel, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * encoder.config.hidden_size, COLUMNS)
        self.has_segments = getattr(encoder.config, "type_vocab_size", 0) > 1
        self.is_decoder = any(getattr(part, "is_causal", False) for part in encoder.modules())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """All arguments int64 of shape (n, length); mask and segment are 1 or 0.

        An encoder's rows are padded on the right, a decoder's on either side.
        """
        arguments: dict[str, Any] = {"token_type_ids": token_type_ids} if self.has_segments else {}
        if self.is_decoder:
            arguments["use_cache"] = False
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **arguments
        ).last_hidden_state
        valid = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * valid).sum(1) / valid.sum(1)
        if self.is_decoder:
            # The count of tokens is at its highest from the last of them on.
            last = attention_mask.cumsum(1).argmax(1)[:, None, None]
            one = states.gather(1, last.expand(-1, -1, states.shape[-1])).squeeze(1)
        else:
            one = states[:, 0]
        raw = self.head(self.dropout(torch.cat([one, mean], dim=-1)))
        # Each higher severity is the one below less something positive: monotone by construction.
        steps = torch.cat([raw[:, :1], -nn.functional.softplus(raw[:, 1:3])], dim=-1)
        return torch.cat([steps.cumsum(-1), raw[:, 3:]], dim=-1)


def from_base(
    base: str,
    dropout: float = 0.1,
    *,
    lora_rank: int | None = None,
    gradient_checkpointing: bool = False,
) -> GuardNetwork:
    """A network over a pretrained encoder or decoder: a hub id or a directory. Heads are fresh.

    With ``lora_rank`` the base is frozen, and each of its linear layers learns a change of that
    rank (LoRA, arXiv 2106.09685). ``gradient_checkpointing`` computes the layers' states again in
    the backward pass, for memory. ``ValueError`` where the base reads less than a window.
    """
    config = AutoConfig.from_pretrained(base)
    positions = getattr(config, "max_position_embeddings", WINDOW_TOKENS)
    if positions < WINDOW_TOKENS:
        raise ValueError(f"{base} reads {positions} tokens, but a window has {WINDOW_TOKENS}")
    # Dropped attention weights rule out the fused kernels, which are twice as fast.
    names = ("attention_probs_dropout_prob", "attention_dropout")
    no_dropout = {name: 0.0 for name in names if hasattr(config, name)}
    encoder = AutoModel.from_pretrained(
        base, dtype=torch.float32, **no_dropout, **_arguments(config)
    )
    with warnings.catch_warnings():
        # peft and older releases of transformers know checkpointing by names that newer ones drop.
        warnings.simplefilter("ignore", FutureWarning)
        if lora_rank is not None:
            # It takes seconds to import.
            import peft

            adapters = peft.LoraConfig(
                r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear"
            )
            encoder = peft.get_peft_model(encoder, adapters)
        if gradient_checkpointing:
            # The other kind gives no gradients where the first layer's input is frozen.
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
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


def merged(network: GuardNetwork) -> GuardNetwork:
    """The network with its LoRA changes, if it has any, added to plain weights.

    The argument stays as it is, so both are in memory for a while.
    """
    if isinstance(network.encoder, PreTrainedModel):
        return network
    plain = copy.deepcopy(network)
    plain.encoder = plain.encoder.merge_and_unload()
    return plain


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
    """Writes the parameters as float16 safetensors, LoRA merged: plain ones, whatever made them."""
    parameters = merged(network).state_dict()
    save_file({name: value.half().contiguous() for name, value in parameters.items()}, path)


def _arguments(config: PretrainedConfig) -> dict[str, Any]:
    """A pooler (BERT, RoBERTa, MPNet) is not used: leaving it out saves its parameters."""
    model = cast(type[PreTrainedModel], MODEL_MAPPING[type(config)])
    parameters = inspect.signature(model).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
