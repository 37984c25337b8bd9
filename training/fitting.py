"""Fits the guard's network, in runs that resume exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from models import checkpoint, network
from models.guard import CATEGORY_COLUMNS, SEVERITY_COLUMNS, SIGNAL_COLUMNS
from models.inputs import InputEncoder
from models.network import GuardNetwork
from training.epochs import Epochs, LabelledBatch
from training.guard_recipe import GuardConfig, training_rows
from training.losses import distilled
from training.mix import Mix
from training.recipe import RecipeError
from training.targets import category_weights, label_matrix

_STATE: Final = "state.safetensors"


def fit(config: GuardConfig, output: Path) -> Mix:
    """Fits the network and leaves ``model.safetensors`` and ``tokenizer.json`` in ``output``.

    Under ``accelerate launch`` each process takes its share of every batch.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bfloat16" else "no")
    training = training_rows(config)
    output.mkdir(parents=True, exist_ok=True)
    (output / "mix.json").write_text(json.dumps(training.mix.report(), indent=1) + "\n", "utf-8")
    tokenizer = base_tokenizer(config.base)
    tokenizer.save(str(output / checkpoint.TOKENIZER))
    epochs = Epochs(config, training, InputEncoder(tokenizer))

    torch.manual_seed(config.seed)
    guard = network.from_base(
        config.base,
        config.dropout,
        lora_rank=config.lora_rank,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    if config.start is not None:
        _begin_with(guard, config.start / checkpoint.NETWORK)
    network.freeze(guard, config.frozen_layers)
    is_head = {id(parameter) for parameter in guard.head.parameters()}
    trained = [parameter for parameter in guard.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in trained if id(p) not in is_head],
                "peak": config.learning_rate,
            },
            {"params": list(guard.head.parameters()), "peak": config.head_learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    done = _resume(output, guard, optimizer)
    model, optimizer = accelerator.prepare(guard, optimizer)
    model.train()
    positive_weight = category_weights(label_matrix(epochs.rows)).to(accelerator.device)
    with Progress(disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("train guard", total=epochs.steps, completed=done)
        for step, batch in epochs.batches(
            done, accelerator.process_index, accelerator.num_processes
        ):
            # Seeded by step, so that a resumed run drops the same units.
            torch.manual_seed(config.seed * 1_000_003 + step)
            losses = step_losses(model, batch, positive_weight, config)
            loss = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"step {step}: the loss is not finite")
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            # Set from the step alone, so that a resumed run has the same.
            factor = learning_rate_factor(step, epochs.steps, config.warmup_share)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            if accelerator.is_main_process:
                record: dict[str, Any] = {"step": step, "loss": round(loss.item(), 5)}
                record |= {name: round(value.item(), 5) for name, value in losses.items()}
                with (output / "metrics.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
                progress.advance(task)
                if (step + 1) % config.save_every == 0:
                    _save_state(output, guard, optimizer, step + 1)
    if accelerator.is_main_process:
        network.save(guard, output / checkpoint.NETWORK)
    return training.mix


def step_losses(
    guard: GuardNetwork, batch: LabelledBatch, positive_weight: Tensor, config: GuardConfig
) -> dict[str, Tensor]:
    """The weighted losses of one batch: severity, categories, signals."""
    device = positive_weight.device
    logits = guard(*batch.batch.inputs(device)).float()
    targets, soft = batch.targets.to(device), batch.teacher.to(device)
    weight = batch.weight.to(device)

    def part(columns: slice, of_positives: Tensor | None = None) -> Tensor:
        return distilled(
            logits[:, columns],
            targets[:, columns],
            soft[:, columns],
            config.teacher_weight if config.teacher_scores else 0.0,
            of_positives,
            weight,
        )

    return {
        "severity": part(SEVERITY_COLUMNS),
        "categories": config.category_weight * part(CATEGORY_COLUMNS, positive_weight),
        "signals": config.signal_weight * part(SIGNAL_COLUMNS),
    }


def learning_rate_factor(step: int, total: int, warmup_share: float) -> float:
    """Linear warm-up over ``warmup_share`` of the steps, then a cosine to zero."""
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def base_tokenizer(base: str) -> Tokenizer:
    """The fast tokenizer of a hub id or directory, without truncation or padding."""
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(base).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _begin_with(guard: GuardNetwork, path: Path) -> None:
    try:
        guard.load_state_dict(network.stored_parameters(path))
    except (OSError, RuntimeError) as error:
        raise RecipeError(
            f"start: {path} is no network of this recipe's base without LoRA: give the output of an"
            " earlier fit"
        ) from error


def _save_state(output: Path, guard: GuardNetwork, optimizer: Any, step: int) -> None:
    """What is trained and Adam's moments; written beside and renamed, so that a crash loses
    nothing."""
    tensors = {
        f"model.{name}": value.detach().contiguous()
        for name, value in guard.named_parameters()
        if value.requires_grad
    }
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{key}": value.contiguous() for key, value in state.items()}
    tensors["step"] = torch.tensor(step)
    temporary = output / f"{_STATE}.part"
    save_file(tensors, temporary)
    temporary.replace(output / _STATE)


def _resume(output: Path, guard: GuardNetwork, optimizer: torch.optim.Optimizer) -> int:
    """Restores the saved state if there is one; the number of steps that are done."""
    path = output / _STATE
    if not path.exists():
        (output / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    tensors = load_file(path)
    step = int(tensors.pop("step"))
    model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    guard.load_state_dict(model, strict=False)
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, number, name = key.split(".", 2)
            states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:step]), encoding="utf-8")
    return step
