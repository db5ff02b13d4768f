"""Commands `models`, `watch`, `plan` and `traffic` as a user types them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from understudy.cli.main import main
from understudy.errors import ConfigError, InputError
from understudy.protocol import Usage
from understudy.traffic.record import Call, new_key
from understudy.traffic.store import open_store

CONFIG = """
[endpoints.openai]
base_url = "https://api.openai.com/v1"
[endpoints.hosted]
base_url = "http://127.0.0.1:9/v1"
[aliases.assistant]
model = "hosted/smol"
fallback = ["openai/gpt-4.1"]
[catalog]
overlay = "facts.yaml"
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    Path("understudy.toml").write_text(CONFIG)
    Path("facts.yaml").write_text(
        "models:\n  hosted/smol: {retires: 2026-01-01, successor: local/student, context_window: 2048, "
        "prices: {input: 0.1, output: 0.4}}\n"
    )

    def invoke(*words: str) -> Result:
        return CliRunner().invoke(main, words)

    return invoke


def calls(count: int) -> None:
    request = {"model": "smol", "messages": [{"role": "user", "content": "Is the sky blue?"}]}
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
    response = {"model": "smol", "choices": [choice], "usage": usage}
    now = time.time() - 86_400 * 10
    lines = [
        {"request": request, "response": response, "at": now + n, "expected": "yes"} for n in range(count)
    ]
    Path("log.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(lines) + b"{broken\n")


def test_models_lists_searches_and_shows_the_overlay(run: Callable[..., Result]) -> None:
    assert "openai/gpt-4.1-mini" in run("models", "GPT-4.1").output
    smol = msgspec.json.decode(run("models", "smol", "hosted", "--json").output)[0]
    assert smol["retires"]["value"] == "2026-01-01"
    assert smol["retires"]["claims"][0]["source"] == "overlay facts.yaml"
    assert isinstance(run("models", "nosuchmodel").exception, InputError)


def test_models_needs_no_config(run: Callable[..., Result]) -> None:
    Path("understudy.toml").unlink()
    assert "818" not in run("models", "claude", "haiku").output.splitlines()[0]
    assert run("models", "claude", "haiku").exit_code == 0


def test_traffic_import_show_export_then_watch_and_plan(run: Callable[..., Result]) -> None:
    calls(20)
    done = run("traffic", "import", "log.jsonl", "--alias", "assistant", "--endpoint", "hosted")
    assert done.exit_code == 0
    assert "20 calls imported, 20 feedback (20 plain)" in done.output
    assert "line 21: not a JSON object" in done.output
    again = run("traffic", "import", "log.jsonl", "--alias", "assistant", "--endpoint", "hosted", "--json")
    assert msgspec.json.decode(again.stdout)[0]["known"] == 20

    listed = msgspec.json.decode(run("traffic", "show", "--limit", "2", "--json").output)
    assert listed[0]["cost"]["usd"] == pytest.approx(1000 * 0.1e-6 + 100 * 0.4e-6)
    assert listed[0]["at"] > listed[1]["at"]
    whole = run("traffic", "show", listed[0]["key"]).output
    assert "Is the sky blue?" in whole
    assert '"expected": "yes"' in whole
    assert "20 of 20 calls" in run("traffic", "show").output
    assert "0 of 20 calls" in run("traffic", "show", "--failed").output
    assert isinstance(run("traffic", "show", "f" * 32).exception, InputError)

    assert msgspec.json.decode(run("traffic", "export", "out.jsonl", "--json").output)["calls"] == 20
    assert len(run("traffic", "export", "-", "--limit", "3").output.splitlines()) == 3
    assert isinstance(run("traffic", "export", "-", "--since", "soon").exception, InputError)

    watched = run("watch", "--json")
    assert watched.exit_code == 1
    report = msgspec.json.decode(watched.output)
    first = report["exposures"][0]
    assert (report["events"][0]["kind"], report["events"][0]["target"]) == ("retirement", "hosted/smol")
    assert (first["target"], first["severity"], first["calls"]) == ("hosted/smol", "retired", 20)
    assert [b["level"] for b in first["bindings"]] == ["alias"]
    assert "local/student" in run("watch").output

    slack = msgspec.json.decode(run("watch", "--slack").output)
    assert slack["blocks"][0]["type"] == "header"
    tiers = msgspec.json.decode(run("models", "--tiers", "--by", "day", "--json").output)
    assert (tiers[0]["tier"], tiers[0]["calls"]) == ("mid-range", 20)  # by its price of $0.10
    assert f"tokens  {'▓' * 40}\n" in run("models", "--tiers").output

    for name in ("assistant", "hosted/smol", "smol"):
        made = msgspec.json.decode(run("plan", name, "--json").output)
        assert (made["calls"], made["incumbent"]["usd_per_call"]) == (20, pytest.approx(0.00014))
    few = run("plan", "assistant", "--latest", "5", "--json")
    assert msgspec.json.decode(few.stdout)["calls"] == 5
    assert "the latest 5 calls, since 20" in few.stderr
    assert msgspec.json.decode(run("plan", "assistant", "--days", "11", "--json").stdout)["calls"] == 20
    assert "is recorded in that time" in str(run("plan", "assistant", "--days", "2").exception)
    text = run("plan", "assistant", "--candidate", "openai/gpt-4.1", "--candidate", "gpt-4.1-nano").output
    assert "20 calls" in text
    assert "openai/gpt-4.1 " in text


def test_plan_ranks_as_asked_and_tells_tiers_changes_and_best_uses(run: Callable[..., Result]) -> None:
    calls(20)
    run("traffic", "import", "log.jsonl", "--alias", "assistant", "--endpoint", "hosted")
    made = msgspec.json.decode(run("plan", "assistant", "--rank", "score", "--json").output)
    scores = [c["scores"].get("MMLU", -1.0) for c in made["candidates"]]
    assert scores[:3] == sorted(scores, reverse=True)[:3]
    assert scores[0] > 80
    assert made["ranking"].startswith("1. the higher MMLU")
    text = run("plan", "assistant", "--top", "40").output
    assert "bulk work: the cheapest for this traffic" in text
    changes = " ".join(text.split())
    assert "default: temperature, where you send none, has a default that differs" in changes
    assert "temperature above 1" not in changes  # no call sends one
    assert "lock-in: 0% of the calls" in text
    assert isinstance(run("plan", "assistant", "--candidate", "gpt-4o-typo").exception, InputError)


def test_watch_is_content_when_nothing_ends(run: Callable[..., Result]) -> None:
    Path("understudy.toml").write_text(
        CONFIG.replace("hosted/smol", "hosted/own").replace("openai/gpt-4.1", "hosted/b")
    )
    done = run("watch")
    assert (done.exit_code, "none of 2 bound models" in done.output) == (0, True)


def test_watch_within_no_days_takes_only_what_is_over(run: Callable[..., Result]) -> None:
    Path("facts.yaml").write_text("models:\n  hosted/smol: {retires: 2099-01-01}\n")
    Path("understudy.toml").write_text(CONFIG.replace('fallback = ["openai/gpt-4.1"]', ""))
    assert run("watch").exit_code == 0
    assert run("watch", "--within", "40000").exit_code == 1


def record(alias: str, target: str, status: int = 200, answered_by: str = "") -> None:
    call = Call(
        key=new_key(),
        at=time.time() - 3600,
        route="chat.completions",
        alias=alias,
        target=target,
        status=status,
        usage=Usage(prompt_tokens=1000, completion_tokens=100) if status < 400 else None,
        answered_by=answered_by,
    )
    with open_store("sqlite:///understudy.db", Path()) as store:
        store.insert([call], alias, 1)


def test_watch_names_ids_that_applications_ask_for_even_in_vain(run: Callable[..., Result]) -> None:
    Path("understudy.toml").write_text(CONFIG.replace("hosted/smol", "openai/gpt-4o"))
    record("gpt-4-0314", "openai/gpt-4-0314", status=404)
    record("gpt-nobody-knows", "openai/gpt-nobody-knows", status=404)
    record("assistant", "openai/gpt-4o", answered_by="gpt-4o-2024-05-13")
    report = msgspec.json.decode(run("watch", "--json").output)
    bound = {b["target"]: b["level"] for e in report["exposures"] for b in e["bindings"]}
    assert bound["openai/gpt-4-0314"] == "requested"
    assert bound["openai/gpt-4o-2024-05-13"] == "answering"
    (answers,) = (e for e in report["exposures"] if e["target"] == "openai/gpt-4o-2024-05-13")
    assert (answers["calls"], answers["bindings"][0]["name"]) == (1, "openai/gpt-4o")
    assert "gpt-nobody-knows" not in str(report)


def test_watch_tells_what_is_yours_from_what_nobody_knows(run: Callable[..., Result]) -> None:
    served = CONFIG.replace("hosted/smol", "local/student").replace("openai/gpt-4.1", "hosted/b")
    served += """
[endpoints.local]
base_url = "http://127.0.0.1:8091/v1"
[serve]
models = {student = "student.gguf"}
[own]
teacher = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""
    Path("understudy.toml").write_text(served)
    done = run("watch")
    assert "nothing is known of: hosted/b\n" in done.output
    assert "yours, whatever vendors do: local/student\n" in done.output


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("plan", "assistant"), InputError, "no answered call of 'assistant'"),
        (("traffic", "import", "absent.jsonl"), InputError, "absent.jsonl"),
        (("plan", "assistant", "--config", "absent.toml"), ConfigError, "absent.toml"),
    ],
)
def test_bad_input_is_named(
    run: Callable[..., Result], words: tuple[str, ...], kind: type[Exception], message: str
) -> None:
    error = run(*words).exception
    assert isinstance(error, kind)
    assert message in str(error)
