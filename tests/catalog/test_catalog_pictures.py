"""What pictures cost: the vendors' own examples, sizes out of real files, and the ratio a plan counts by."""

from __future__ import annotations

import base64
import io
import json
import math
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from understudy.catalog.pictures import rule_of, size_of, tokens_of
from understudy.catalog.tokens import Counted, token_ratio
from understudy.cli.main import main


@pytest.mark.parametrize(
    ("model", "width", "height", "detail", "tokens"),
    [
        ("openai/gpt-4o", 1024, 1024, "high", 765),  # OpenAI's guide: four tiles
        ("gpt-4o", 2048, 4096, "high", 1105),  # six tiles
        ("gpt-4o", 4096, 8192, "low", 85),
        ("gpt-4o-mini", 4096, 8192, "low", 2833),
        ("gpt-5", 1024, 1024, "high", 630),
        ("gpt-4.1-mini", 1024, 1024, "high", 1659),  # 1,024 patches x 1.62
        ("o4-mini", 1800, 2400, "high", 2498),  # 1,452 patches x 1.72
        ("anthropic/claude-sonnet-4-5", 200, 200, "auto", 54),  # Anthropic's table
        ("claude-sonnet-4-5", 1000, 1000, "auto", 1334),
        ("claude-sonnet-4-5", 1092, 1092, "auto", 1590),
        ("claude-sonnet-4-5", 4000, 4000, "auto", 1600),
        ("google/gemini-2.5-flash", 384, 384, "auto", 258),  # Google's guide
        ("gemini-2.5-flash", 960, 540, "auto", 1548),  # six tiles
    ],
)
def test_the_vendors_own_examples(model, width, height, detail, tokens):
    assert rule_of(model)(width, height, detail) == tokens


def test_a_model_without_a_published_rule_has_none():
    assert rule_of("mistral/pixtral-12b") is None
    assert tokens_of("mistral/pixtral-12b", _request(_file("PNG"))) is None
    assert tokens_of("mistral/pixtral-12b", {"messages": [{"role": "user", "content": "hi"}]}) == 0


def _file(form: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 40)).save(buffer, form, **how)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("PNG", {}),
        ("GIF", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}),
    ],
)
def test_the_size_stands_in_the_first_bytes(form, how):
    raw = _file(form, **how)
    assert size_of(raw) == (96, 40)
    assert all(size_of(raw[:count]) in (None, (96, 40)) for count in range(60))


def _request(raw: bytes) -> dict[str, object]:
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    parts = [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}]}


def test_a_plan_counts_pictures_by_the_candidates_rule(tmp_path: Path):
    words = Tokenizer(models.WordLevel({"what": 0, "is": 1, "this": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    call = Counted(_request(_file("PNG")), prompt_tokens=100)
    found = token_ratio(tmp_path / "tokenizer.json", [call], "google/gemini-2.5-flash")
    assert found.mean == pytest.approx((3 + 258) / 100)
    assert token_ratio(tmp_path / "tokenizer.json", [call], "local/nobody") is None


def test_a_plan_counts_pictures_without_anybodys_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Recorded with GPT-4o, whose picture of 96 x 40 is one tile, 255 tokens; words stay as recorded."""
    monkeypatch.chdir(tmp_path)
    Path("understudy.toml").write_text(
        "[endpoints.openai]\nbase_url = 'http://127.0.0.1:1/v1'\n[aliases.eyes]\nmodel = 'openai/gpt-4o'\n"
        "[catalog]\noverlay = 'facts.yaml'\n"
    )
    names = ("google/gemini-2.5-flash", "anthropic/claude-haiku-4-5")
    facts = "{inputs: [text, image], context_window: 9000, prices: {input: 1.0, output: 10.0}}"
    Path("facts.yaml").write_text("models:\n" + "".join(f"  {name}: {facts}\n" for name in names))
    usage = {"prompt_tokens": 300, "completion_tokens": 20}
    choice = {"index": 0, "message": {"role": "assistant", "content": "a box"}, "finish_reason": "stop"}
    line = {
        "request": {"model": "gpt-4o", **_request(_file("PNG"))},
        "response": {"model": "gpt-4o", "choices": [choice], "usage": usage},
    }
    Path("log.jsonl").write_text("\n".join(json.dumps({**line, "at": 1.79e9 + n}) for n in range(4)))
    invoke = partial(CliRunner().invoke, main, catch_exceptions=False)
    assert (
        invoke(["traffic", "import", "log.jsonl", "--alias", "eyes", "--endpoint", "openai"]).exit_code == 0
    )
    names = ("google/gemini-2.5-flash", "anthropic/claude-haiku-4-5")
    made = json.loads(invoke(["plan", "eyes", *(f"--candidate={n}" for n in names), "--json"]).stdout)
    found = {c["model"]: c for c in made["candidates"]}
    for name, picture in zip(names, (258, math.ceil(96 * 40 / 750)), strict=True):
        cost = (300 - 255 + picture) * 1e-6 + 20 * 10e-6
        assert found[name]["usd_per_call"] == pytest.approx(cost), name
        assert found[name]["tokens"].startswith("counted with its rule for pictures on 4 calls")
