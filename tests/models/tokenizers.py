"""A tokenizer of whole words, so that tests can read windows."""

from functools import cache

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
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
