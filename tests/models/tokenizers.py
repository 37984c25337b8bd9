"""Small tokenizers of the kinds that bases bring, so that tests can read windows."""

from functools import cache

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing

_SPOKEN = ["user", "assistant", "system", "tool", ":", "prompt", "response"]


@cache
def word_tokenizer() -> Tokenizer:
    """BERT's special tokens around ``w0`` to ``w1999`` and the words that inputs add."""
    tokens = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *_SPOKEN, *(f"w{i}" for i in range(2000))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def byte_tokenizer(single: str, pair: str) -> Tokenizer:
    """Bytes, as RoBERTa's and decoders' are, with special tokens where the templates put them."""
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def unigram_tokenizer() -> Tokenizer:
    """Single letters by a Unigram model, as DeBERTa-v3's is."""
    scores = [("[UNK]", 0.0), *((letter, -1.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    return Tokenizer(Unigram(scores, unk_id=0))
