"""What a model is made for, where that is not answering chats: a classifier must not win for being cheap.

The overlay's ``purpose`` decides; else the vendor's own words in the id do, for vendors name such models by
their trade (prompt-guard, embed, tts). It ignores how good a model is at its trade, and models that chat
with a leaning (code, vision): those stay candidates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from understudy.catalog.facts import ModelFacts
from understudy.catalog.workload import Group

CHAT = "chat"
_TRADES: tuple[tuple[str, str], ...] = (
    ("classifying", r"guard|safeguard|moderation"),
    ("embeddings", r"embed(ding|dings)?|textembedding|multimodalembedding|gecko|similarity"),
    ("reranking", r"rerank"),
    ("speech", r"tts|whisper|transcribe|asr|speech"),
    ("voice", r"realtime|audio|voxtral|live"),
    ("images", r"image|images|imagen|imagetext|dall"),
    ("video", r"sora|veo"),
    ("music", r"lyria"),
    ("reading pages", r"ocr"),
    ("robots", r"robotics"),
    ("using a computer", r"computer"),
    ("research that takes minutes", r"research"),
    ("searching the web", r"search"),
    ("filling in code", r"fim"),
)
"""Trade, and the words of an id that tell it; the first that matches holds."""
_WORDS = tuple((trade, re.compile(rf"(?:^|[-./_ @])(?:{words})(?=$|[-./_ @\d])")) for trade, words in _TRADES)
_ANY = re.compile("|".join(words.pattern for _, words in _WORDS))


def purpose_of(facts: ModelFacts) -> str:
    """`CHAT`, or what else the model is for."""
    if facts.purpose:
        return facts.purpose.value
    name = facts.model.lower()
    if not _ANY.search(name):  # of most models one look tells
        return CHAT
    return next(trade for trade, words in _WORDS if words.search(name))


def unsuited(purpose: str, group: Group) -> Iterator[str]:
    """The reason why calls of this kind are none of the business of a model made for ``purpose``; nothing
    where they are."""
    if purpose not in (CHAT, *({"voice"} if "audio" in group.modalities else ())):
        yield f"made for {purpose}"
