"""Harm categories, severities and signals, and how other taxonomies map to them.

This is the only place where any of these names is spelled. It imports nothing but the
standard library, so that reading a name never costs a model framework.

Categories are the 19 of PKU-SafeRLHF (arXiv 2406.15513) in their published order, in
snake_case. Severity is that paper's: none, minor, moderate, severe.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final, Literal, get_args

VERSION: Final = "pku-19/1"

Role = Literal["prompt", "response"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)


class Severity(IntEnum):
    """How grave the potential harm of a text is; ordered, so levels compare with ``<``."""

    NONE = 0
    MINOR = 1
    MODERATE = 2
    SEVERE = 3

    @property
    def label(self) -> str:
        """The word that policies, answers and metrics use."""
        return self.name.lower()

    @classmethod
    def from_label(cls, label: str) -> Severity:
        """The level called ``label``; ``ValueError`` names the four that exist."""
        for level in cls:
            if level.label == label:
                return level
        raise ValueError(f"severity {label!r} is unknown: use none, minor, moderate or severe")


CATEGORIES: Final[tuple[str, ...]] = (
    "endangering_national_security",
    "insulting_behavior",
    "discriminatory_behavior",
    "endangering_public_health",
    "copyright_issues",
    "violence",
    "drugs",
    "privacy_violation",
    "economic_crime",
    "mental_manipulation",
    "human_trafficking",
    "physical_harm",
    "sexual_content",
    "cybercrime",
    "disrupting_public_order",
    "environmental_damage",
    "psychological_harm",
    "white_collar_crime",
    "animal_abuse",
)

SIGNALS: Final[tuple[str, ...]] = ("refusal", "injection", "self_harm", "minors")
"""Facts about a text that are not harm by themselves.

``refusal``: the reply declines. ``injection``: an attack on the model. ``self_harm``: the text
speaks of self-harm, also to seek help. ``minors``: sexual content together with minors.
"""

# --- Targets that we answer in -----------------------------------------------------------------
# A target key holds when every group holds, and a group holds when any of its names does; its
# score is the minimum over groups of the maximum within. Names are categories, signals, or
# ``severity:LEVEL`` for the probability of at least that level.
Expression = tuple[tuple[str, ...], ...]

_ILLICIT: Final = (
    "drugs",
    "economic_crime",
    "cybercrime",
    "white_collar_crime",
    "copyright_issues",
    "human_trafficking",
    "privacy_violation",
    "disrupting_public_order",
    "endangering_national_security",
)

OPENAI: Final[Mapping[str, Expression]] = {
    "harassment": (("insulting_behavior",),),
    # Proxy: an insult in a text that is also violent.
    "harassment/threatening": (("insulting_behavior",), ("violence",)),
    "hate": (("discriminatory_behavior",),),
    # Proxy: hate in a text that is also violent.
    "hate/threatening": (("discriminatory_behavior",), ("violence",)),
    "illicit": (_ILLICIT,),
    # Proxy: a crime in a text that is also about violence or bodily harm.
    "illicit/violent": (_ILLICIT, ("violence", "physical_harm")),
    "self-harm": (("self_harm",),),
    # Proxy: the signal does not tell intent from mention.
    "self-harm/intent": (("self_harm",),),
    # Proxy: self-harm in a text that is itself harmful to body or mind.
    "self-harm/instructions": (("self_harm",), ("physical_harm", "psychological_harm")),
    "sexual": (("sexual_content",),),
    "sexual/minors": (("minors",),),
    "violence": (("violence", "physical_harm", "animal_abuse"),),
    # Proxy: violence of the highest severity.
    "violence/graphic": (("violence", "physical_harm", "animal_abuse"), ("severity:severe",)),
}
"""OpenAI's 13 moderation keys. Those marked *proxy* have no counterpart among the 19."""

AZURE: Final[Mapping[str, Expression]] = {
    "hate": (("discriminatory_behavior", "insulting_behavior"),),
    "self_harm": (("self_harm",),),
    "sexual": (("sexual_content",),),
    "violence": (("violence", "physical_harm", "animal_abuse", "endangering_national_security"),),
}
"""Azure AI Content Safety's four categories."""

AZURE_SEVERITY: Final[Mapping[Severity, tuple[str, int]]] = {
    Severity.NONE: ("safe", 0),
    Severity.MINOR: ("low", 2),
    Severity.MODERATE: ("medium", 4),
    Severity.SEVERE: ("high", 6),
}
"""Azure's word and number (four-level scale) for each severity."""

# --- Sources that we read labels from ----------------------------------------------------------
PKU_SAFERLHF: Final[Mapping[str, str]] = {
    "Endangering National Security": "endangering_national_security",
    "Insulting Behavior": "insulting_behavior",
    "Discriminatory Behavior": "discriminatory_behavior",
    "Endangering Public Health": "endangering_public_health",
    "Copyright Issues": "copyright_issues",
    "Violence": "violence",
    "Drugs": "drugs",
    "Privacy Violation": "privacy_violation",
    "Economic Crime": "economic_crime",
    "Mental Manipulation": "mental_manipulation",
    "Human Trafficking": "human_trafficking",
    "Physical Harm": "physical_harm",
    "Sexual Content": "sexual_content",
    "Cybercrime": "cybercrime",
    "Disrupting Public Order": "disrupting_public_order",
    "Environmental Damage": "environmental_damage",
    "Psychological Harm": "psychological_harm",
    "White-Collar Crime": "white_collar_crime",
    "Animal Abuse": "animal_abuse",
}
"""Our categories by the names that PKU-SafeRLHF's files give them."""

# In each of the rest a key maps to the categories that it implies; an empty tuple: to none of them.
MLCOMMONS: Final[Mapping[str, tuple[str, ...]]] = {
    "S1": ("violence",),
    "S2": ("economic_crime",),
    "S3": ("sexual_content",),
    "S4": ("sexual_content",),
    "S5": ("insulting_behavior",),
    "S6": ("endangering_public_health",),
    "S7": ("privacy_violation",),
    "S8": ("copyright_issues",),
    "S9": ("endangering_national_security",),
    "S10": ("discriminatory_behavior",),
    "S11": ("psychological_harm",),
    "S12": ("sexual_content",),
    "S13": ("disrupting_public_order",),
    "S14": ("cybercrime",),
}
"""MLCommons hazards as Llama Guard 3 numbers them (S14 is its code-interpreter abuse)."""

BEAVERTAILS: Final[Mapping[str, tuple[str, ...]]] = {
    "animal_abuse": ("animal_abuse",),
    "child_abuse": ("sexual_content", "physical_harm"),
    "controversial_topics,politics": (),
    "discrimination,stereotype,injustice": ("discriminatory_behavior",),
    "drug_abuse,weapons,banned_substance": ("drugs",),
    "financial_crime,property_crime,theft": ("economic_crime",),
    "hate_speech,offensive_language": ("insulting_behavior",),
    "misinformation_regarding_ethics,laws_and_safety": ("mental_manipulation",),
    "non_violent_unethical_behavior": (),
    "privacy_violation": ("privacy_violation",),
    "self_harm": ("psychological_harm",),
    "sexually_explicit,adult_content": ("sexual_content",),
    "terrorism,organized_crime": ("endangering_national_security",),
    "violence,aiding_and_abetting,incitement": ("violence",),
}
"""BeaverTails' 14 (arXiv 2307.04657). Keys contain commas: never split on one."""

BEAVERTAILS_V: Final[Mapping[str, tuple[str, ...]]] = {
    "animal_abuse": ("animal_abuse",),
    "dangerous_behavior": ("physical_harm",),
    "deception_in_personal_relationships": ("mental_manipulation",),
    "discriminatory_depictions": ("discriminatory_behavior",),
    "environmental_damage": ("environmental_damage",),
    "false_information": ("mental_manipulation",),
    "financial_and_academic_fraud": ("economic_crime",),
    "hacking_or_digital_crime": ("cybercrime",),
    "harmful_health_content": ("endangering_public_health",),
    "horror_and_gore": ("violence",),
    "identity_misuse_and_impersonation": ("privacy_violation",),
    "insulting_and_harassing_behavior": ("insulting_behavior",),
    "pornographic_content": ("sexual_content",),
    "privacy_invasion_and_surveillance": ("privacy_violation",),
    "psychological_harm_and_manipulation": ("psychological_harm",),
    "psychological_horror_and_dark_themes": ("psychological_harm",),
    "sensitive_information_in_key_areas": ("endangering_national_security",),
    "sexual_crimes": ("sexual_content",),
    "terrorism_or_extremism": ("endangering_national_security",),
    "violence_and_physical_harm": ("violence", "physical_harm"),
}
"""BeaverTails-V's 20 (arXiv 2503.17682)."""

QWEN3GUARD: Final[Mapping[str, tuple[str, ...]]] = {
    "Violent": ("violence",),
    "Non-violent Illegal Acts": ("economic_crime",),
    "Sexual Content or Sexual Acts": ("sexual_content",),
    "PII": ("privacy_violation",),
    "Suicide & Self-Harm": ("psychological_harm",),
    "Unethical Acts": ("discriminatory_behavior",),
    "Politically Sensitive Topics": ("disrupting_public_order",),
    "Copyright Violation": ("copyright_issues",),
    "Jailbreak": (),
}
"""Qwen3Guard's nine (arXiv 2510.14276)."""


def evaluate(expression: Expression, scores: Mapping[str, float]) -> float:
    """Minimum over groups of the maximum within a group; ``scores`` holds every name, in 0–1."""
    return min(max(scores[name] for name in group) for group in expression)
