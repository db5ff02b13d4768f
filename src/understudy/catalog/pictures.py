"""What a picture costs in prompt tokens, by each vendor's published rule.

Rules as published on 2026-11-25: OpenAI, "Images and vision" (platform.openai.com/docs/guides/images-vision):
tiles of 512 pixels, or patches of 32 with a factor, by model; Anthropic, "Vision" (docs.claude.com), width x
height / 750 after fitting into 1,568 pixels and 1,600 tokens; Google, "Understand and count tokens"
(ai.google.dev/gemini-api/docs/tokens), 258 for a small picture or for each tile. The size is read from the
first bytes of PNG, JPEG, GIF and WebP. It ignores sound, video and whatever a vendor does not publish: no
rule, no number.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

Rule = Callable[[int, int, str], int]
"""Width and height in pixels and the detail asked for (`low`, `high`, `auto`) -> prompt tokens."""

_START = 1 << 17
"""Base64 digits of a picture that are looked at: a JPEG's size may stand behind a preview of 64 KiB."""


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int


def tiles(base: int, tile: int) -> Rule:
    """OpenAI's rule by tiles: fitted into 2,048 x 2,048, then the shorter side into 768 pixels."""

    def tokens(width: int, height: int, detail: str) -> int:
        if detail == "low":
            return base
        fit = min(1.0, 2048 / max(width, height))
        fit *= min(1.0, 768 / (fit * min(width, height)))
        across, down = math.ceil(round(width * fit) / 512), math.ceil(round(height * fit) / 512)
        return base + tile * across * down

    return tokens


def patches(factor: float) -> Rule:
    """OpenAI's rule by patches of 32 pixels, at most 1,536 of them, times the model's factor."""

    def tokens(width: int, height: int, _detail: str) -> int:
        count = math.ceil(width / 32) * math.ceil(height / 32)
        if count > 1536:
            fit = math.sqrt(32**2 * 1536 / (width * height))
            across, down = width * fit / 32, height * fit / 32
            fit *= min(math.floor(across) / across, math.floor(down) / down)
            count = math.ceil(round(width * fit) / 32) * math.ceil(round(height * fit) / 32)
        return math.ceil(min(count, 1536) * factor)

    return tokens


def anthropic(width: int, height: int, _detail: str) -> int:
    """width x height / 750; larger ones are first fitted into 1,568 pixels and 1,600 tokens."""
    fit = min(1.0, 1568 / max(width, height), math.sqrt(1600 * 750 / (width * height)))
    return math.ceil(width * fit * height * fit / 750)


def gemini(width: int, height: int, _detail: str) -> int:
    """258 up to 384 x 384; beyond, 258 for each tile of two thirds of the shorter side, 256 to 768."""
    if max(width, height) <= 384:
        return 258
    unit = min(768, max(256, math.floor(min(width, height) / 1.5)))
    return 258 * math.ceil(width / unit) * math.ceil(height / unit)


RULES: tuple[tuple[str, Rule], ...] = (
    (r"gpt-5-mini|gpt-4\.1-mini", patches(1.62)),
    (r"gpt-5-nano|gpt-4\.1-nano", patches(2.46)),
    (r"o4-mini", patches(1.72)),
    (r"gpt-4o-mini", tiles(2833, 5667)),
    (r"gpt-5(-chat)?(-\d{4}.*|-latest)?$", tiles(70, 140)),
    (r"gpt-4o|gpt-4\.1|gpt-4\.5", tiles(85, 170)),
    (r"o1|o3", tiles(75, 150)),
    (r"claude-", anthropic),
    (r"gemini-(2|3)", gemini),
)
"""The first that a model's name begins with holds."""


def rule_of(model: str) -> Rule | None:
    """The rule for a model named as its vendor names it, with or without the vendor before a slash."""
    name = model.rpartition("/")[2]
    return next((rule for pattern, rule in RULES if re.match(pattern, name)), None)


def tokens_of(model: str, request: Mapping[str, Any]) -> int | None:
    """Prompt tokens of all pictures of a chat request; None without a rule or for a size not to be seen."""
    rule, total = rule_of(model), 0
    for message in cast("list[dict[str, Any]]", request.get("messages") or []):
        content = message.get("content")
        for part in cast("list[dict[str, Any]]", content) if isinstance(content, list) else []:
            if part.get("type") == "text":
                continue
            size = _size_of(part) if part.get("type") == "image_url" else None
            if rule is None or size is None:
                return None
            given = cast("dict[str, Any]", part["image_url"])
            total += rule(size.width, size.height, str(given.get("detail") or "auto"))
    return total


def _size_of(part: dict[str, Any]) -> Size | None:
    given = part.get("image_url")
    url = str(cast("dict[str, Any]", given).get("url") or "") if isinstance(given, dict) else ""
    if not url.startswith("data:image/"):
        return None
    digits = url.partition(",")[2][:_START]
    try:
        return size_of(base64.b64decode(digits[: len(digits) // 4 * 4]))
    except (binascii.Error, ValueError):
        return None


def size_of(raw: bytes) -> Size | None:
    """The size in a picture's first bytes; None for another format or too few of them."""
    try:
        if raw[:8] == b"\x89PNG\r\n\x1a\n":
            return Size(*struct.unpack(">II", raw[16:24]))
        if raw[:4] == b"GIF8":
            return Size(*struct.unpack("<HH", raw[6:10]))
        if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
            return _webp(raw)
        return _jpeg(raw) if raw[:2] == b"\xff\xd8" else None
    except (struct.error, IndexError):
        return None


def _webp(raw: bytes) -> Size | None:
    """RFC 9649: lossy, lossless and extended files keep their size in three ways."""
    if raw[12:16] == b"VP8 ":
        width, height = struct.unpack("<HH", raw[26:30])
        return Size(width & 0x3FFF, height & 0x3FFF)
    if raw[12:16] == b"VP8L":
        (bits,) = struct.unpack("<I", raw[21:25])
        return Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if raw[12:16] == b"VP8X" and len(raw) >= 30:
        return Size(*(int.from_bytes(raw[at : at + 3], "little") + 1 for at in (24, 27)))
    return None


def _jpeg(raw: bytes) -> Size | None:
    """ITU-T T.81, B.2.2: the size stands in the frame header, SOF0 to SOF15 but for DHT, JPG and DAC."""
    at = 2
    while at + 9 <= len(raw) and raw[at] == 0xFF:
        kind, length = raw[at + 1], struct.unpack(">H", raw[at + 2 : at + 4])[0]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", raw[at + 5 : at + 9])
            return Size(width, height)
        at += 2 + length
    return None
