"""What OpenAI's completion dialects share: the head of a request, choices, usage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from models.inputs import GuardInput
from service import extractor, verdict_shapes
from service.errors import BadRequest, UpstreamMalformed
from service.exchange import Annotations, Answer, Choice, Field, ModerationRequest
from service.extractor import Reader, Scan

MOST_CHOICES: Final = 128

# Keys whose strings never reach a model as text.
WORDS: Final = frozenset(
    {
        "stream_options", "user", "tool_choice", "function_call", "service_tier", "modalities",
        "store", "metadata", "safety_identifier", "prompt_cache_key", "reasoning_effort",
        "verbosity", "stop", "request_id", "cache_salt", "logit_bias", "session_id", "include",
        "truncation", "truncation_side", "stop_token_ids", "allowed_token_ids",
        "logprob_token_ids", "response_format", "mm_payload", "encoding_format",
    }
)  # fmt: skip
# A client's template can hide words from us; the others name what a cache of the upstream holds.
_OPAQUE: Final = ("chat_template", "kv_transfer_params", "ec_transfer_params")
_MODEL: Final = frozenset({"model"})
_CHOICE_WORDS: Final = frozenset({"finish_reason", "stop_reason"})
# The same tokens as the text that is judged, one by one, or their numbers.
_CHOICE_TOKENS: Final = ("logprobs", "token_ids", "routed_experts")
_BODY_WORDS: Final = frozenset(
    {"id", "object", "model", "service_tier", "system_fingerprint", "usage", "created"}
)

SHARED_SCHEMA: Final[Mapping[str, Any]] = {
    "stream": {"type": ["boolean", "null"]},
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MOST_CHOICES},
    "moderation": {
        "type": ["object", "null"],
        "properties": {
            "model": {"type": "string"},
            "policy": {
                "type": ["object", "null"],
                "properties": {
                    direction: {
                        "type": ["object", "null"],
                        "properties": {"mode": {"enum": ["score", "block"]}},
                    }
                    for direction in ("input", "output")
                },
            },
        },
    },
}
"""JSON Schema of the keys that ``head`` reads."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every request says."""

    model: str
    stream: bool
    choices: int
    moderation: ModerationRequest | None


def head(reader: Reader) -> Head:
    """Takes the keys that every request has; ``BadRequest`` names one that is wrong."""
    model = reader.peek("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model must be a string that names a model", param="model")
    # A sentence in place of a name is left to be scanned as what it is.
    reader.pass_words(_MODEL)
    stream = reader.take("stream")
    if not isinstance(stream, bool | None):
        raise BadRequest("stream must be true or false", param="stream")
    choices = reader.take("n")
    if choices is None:
        choices = 1
    if type(choices) is not int or not 1 <= choices <= MOST_CHOICES:
        raise BadRequest(f"n must be a whole number from 1 to {MOST_CHOICES}", param="n")
    return Head(model, bool(stream), choices, moderation_request(reader.take("moderation")))


def moderation_request(value: Any) -> ModerationRequest | None:
    """OpenAI's ``moderation`` key. Its ``model`` is not looked at: the guard is ours to choose."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRequest("moderation must be an object", param="moderation")
    policy = value.get("policy")
    if not isinstance(policy, dict | None):
        raise BadRequest("moderation.policy must be an object", param="moderation.policy")
    return ModerationRequest(*(_blocks(policy or {}, side) for side in ("input", "output")))


def _blocks(policy: Mapping[str, Any], side: str) -> bool:
    rule = policy.get(side)
    mode = rule.get("mode", "score") if isinstance(rule, dict) else rule or "score"
    if mode not in ("score", "block"):
        place = f"moderation.policy.{side}.mode"
        raise BadRequest(f"{place} must be score or block", param=place)
    return bool(mode == "block")


def without_moderation(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The body without the key that is for us, or None where it has none."""
    if "moderation" not in body:
        return None
    return {key: value for key, value in body.items() if key != "moderation"}


def refuse(reader: Reader, scan: Scan, keys: Iterable[str]) -> None:
    """Takes as unscannable ``keys``, and on any route what only an upstream understands."""
    reader.refuse(scan, (*keys, *_OPAQUE))
    options = reader.peek("chat_template_kwargs")
    if isinstance(options, dict) and options.get("chat_template") is not None:
        scan.unscannable.append("chat_template_kwargs.chat_template")


def annotated(body: Mapping[str, Any], asked: Annotations) -> Mapping[str, Any]:
    """``body`` with the verdicts that were asked for, each choice's with the choice."""
    shown = dict(body)
    if asked.openai:
        shown["moderation"] = verdict_shapes.moderation(asked)
    if asked.azure:
        shown["prompt_filter_results"] = verdict_shapes.prompt_filter_results(asked)
        shown["choices"] = [
            {
                **choice,
                "content_filter_results": verdict_shapes.choice_filter_results(
                    asked, choice["index"]
                ),
            }
            for choice in body["choices"]
        ]
    return shown


def definitions(reader: Reader, key: str, scan: Scan) -> None:
    """Takes a list of tools, each a field of its own, so that a verdict on it serves again."""
    tools = reader.take(key)
    if not tools:
        return
    for number, tool in enumerate(tools if isinstance(tools, list) else [tools]):
        scan.add("tool_definition", f"{key}[{number}]", extractor.definition(tool))


def documents(reader: Reader, scan: Scan) -> None:
    """Takes retrieved documents, each a field of its own."""
    value = reader.take("documents")
    if not value:
        return
    for number, document in enumerate(value if isinstance(value, list) else [value]):
        scan.add("document", f"documents[{number}]", extractor.leaves(document))


def choices(reader: Reader) -> Sequence[Mapping[str, Any]]:
    """Takes the choices of an answer."""
    raw = reader.take("choices")
    if not isinstance(raw, list) or not all(isinstance(item, dict) for item in raw):
        raise UpstreamMalformed("the upstream's answer has no list of choices")
    return raw


def index(choice: Mapping[str, Any], position: int) -> int:
    """A choice's number."""
    number = choice.get("index", position)
    if type(number) is not int:
        raise UpstreamMalformed(f"choice {position} of the upstream's answer has no number")
    return number


def rest_of_choice(choice: Mapping[str, Any], taken: Iterable[str], path: str, scan: Scan) -> None:
    """Scans what stands in a choice beside its text."""
    reader = Reader(choice, path)
    for key in (*taken, "index", *_CHOICE_TOKENS):
        reader.take(key)
    reader.pass_words(_CHOICE_WORDS)
    reader.rest(scan)


def answer(
    found: Sequence[Choice],
    reader: Reader,
    scan: Scan,
    body: Mapping[str, Any],
    echoes: Iterable[str],
) -> Answer:
    """The answer that ``found`` make. What stands around them is judged with the first."""
    if len({choice.index for choice in found}) != len(found):
        raise UpstreamMalformed("two choices of the upstream's answer have the same index")
    for key in echoes:
        reader.take(key)
    reader.pass_words(_BODY_WORDS)
    reader.rest(scan)
    if not found:
        # Nothing to judge it with.
        scan.unscannable += (piece.path or "body" for piece in scan.pieces)
    elif scan.pieces:
        extra = tuple(
            Field(piece.name, piece.path, GuardInput("response", piece.text))
            for piece in scan.pieces
        )
        found = [replace(found[0], fields=(*found[0].fields, *extra)), *found[1:]]
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Answer(
        tuple(found),
        body,
        count(usage.get("prompt_tokens")),
        count(usage.get("completion_tokens")),
        tuple(scan.unscannable),
    )


def around(body: Mapping[str, Any]) -> dict[str, Any]:
    """What stands around the choices of an answer, but for what could say anything: it may be of an
    attempt that was withheld.
    """
    return {
        key: value
        for key, value in body.items()
        if key in _BODY_WORDS and extractor.are_words(value)
    }


def renumbered(choice: Choice, index: int) -> Choice:
    """``choice`` under another number."""
    return replace(choice, index=index, body={**choice.body, "index": index})


def count(value: Any) -> int:
    """A number of tokens; 0 where it is none."""
    return value if type(value) is int and value >= 0 else 0
