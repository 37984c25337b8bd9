"""A small valid checkpoint, made here: a random BERT that can be loaded, exported and served."""

import hashlib
import shutil
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from models import checkpoint, inputs, taxonomy
from models.calibration import Calibration
from models.checkpoint import Card, Golden, GoldenCase, RoleCalibration
from models.guard import judge
from models.inputs import GuardInput, Turn
from models.taxonomy import ROLES
from models.text_guard import TextGuard

TINY = "tiny-1"
"""Its id."""

_ROOT = Path(__file__).parent.parent
_KEPT = _ROOT / ".pytest_cache" / "d" / "tiny-checkpoint"

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_WORDS = ("user", "assistant", "system", "tool", "prompt", "response", "the", "is", "how", "what")
_GOLDEN = (
    GuardInput("prompt", "how is the weather"),
    GuardInput("response", "it is fine", (Turn("user", "how is the weather"),)),
)


def tiny_checkpoint(directory: Path) -> Path:
    """Writes a checkpoint into ``directory`` (made if need be) and returns it.

    Its scores mean nothing, but they are the same each time. Exporting takes seconds, so it is
    kept until any code that makes it changes. Skips the test where torch is not installed.
    """
    kept = _KEPT / _digest()
    if not kept.exists():
        _KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_KEPT) as made:
            _build(Path(made) / "whole")
            # Whole or not at all; where another run was faster, its own is as good.
            with suppress(OSError):
                (Path(made) / "whole").rename(kept)
    shutil.copytree(kept, directory, dirs_exist_ok=True)
    return directory


@cache
def _digest() -> str:
    """Of all that a checkpoint depends on."""
    digest = hashlib.sha256()
    models = sorted((_ROOT / "models").glob("*.py"))
    for path in (Path(__file__), _ROOT / "training" / "export.py", *models):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(directory: Path) -> None:
    for module in ("torch", "transformers", "onnx"):
        pytest.importorskip(module, reason="needs the extra 'train'")
    import torch
    from transformers import AutoConfig, AutoModel

    from models import network
    from training import export

    directory.mkdir()
    tokenizer = _tokenizer()
    tokenizer.save(str(directory / checkpoint.TOKENIZER))
    config = AutoConfig.for_model(
        "bert",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=inputs.WINDOW_TOKENS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        guard_network = network.GuardNetwork(AutoModel.from_config(config)).eval()
    network.save(guard_network, directory / checkpoint.NETWORK)
    exported = directory / "float32.onnx"
    with warnings.catch_warnings():
        # Libraries' own: about one another, and about rounding an export of random weights.
        warnings.simplefilter("ignore")
        export.to_onnx(guard_network, exported)
        encoder = inputs.InputEncoder(tokenizer)
        windows = [window for item in _GOLDEN for window in encoder.encode(item).windows]
        export.to_int8(exported, directory / checkpoint.ONNX, windows)
    exported.unlink()

    calibration = Calibration.identity()
    numbers = RoleCalibration(scale=calibration.scale, bias=calibration.bias)
    card = Card(
        id=TINY,
        licence="Apache-2.0",
        base="random",
        base_licence="Apache-2.0",
        taxonomy=taxonomy.VERSION,
        input_version=inputs.VERSION,
        network=config.to_diff_dict() | {"model_type": config.model_type},
        calibration={role: numbers for role in ROLES},
        languages=("en",),
        data=(),
        labels="Nobody labelled anything: the weights are random.",
        limits=("For tests.",),
        training={},
        metrics={},
        hashes={},
    )
    checkpoint.write_card(directory, card)
    verdicts = judge(TextGuard(directory), _GOLDEN)
    golden = Golden(
        tolerance=0.05,
        cases=tuple(
            GoldenCase.of(item, verdict) for item, verdict in zip(_GOLDEN, verdicts, strict=True)
        ),
    )
    (directory / checkpoint.GOLDEN).write_text(golden.model_dump_json(), "utf-8")
    checkpoint.write_card(directory, card)


def _tokenizer() -> Tokenizer:
    """WordPiece over single letters and a few words, so that any English text has tokens."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ":", ".", ",", "?", "!", "-", "'", *_WORDS]
    tokens += [*_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer
