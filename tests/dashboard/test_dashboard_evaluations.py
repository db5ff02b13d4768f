"""Pages over what evaluations and own models leave on disk: real certificates, broken ones, none."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy import config as configuration
from understudy.endpoint import ScriptedModel
from understudy.evaluate import certificate as certificates
from understudy.evaluate.certify import write
from understudy.evaluate.replay import prove
from understudy.protocol import Usage
from understudy.traffic.sample import Exchange

Browse = Callable[..., Awaitable[Any]]
HOSTILE = "</pre><script>alert(1)</script>"


def exchange(number: int) -> Exchange:
    right = "yes" if number % 2 else "no"
    return Exchange(
        key=f"key{number:03}", at=1.79e9 + number, alias="assistant", target="openai/old",
        request={"messages": [{"role": "user", "content": f"{HOSTILE} q{number}"}]},
        body={"choices": [{"message": {"role": "assistant", "content": right}}]},
        answer=right if number % 5 else HOSTILE, expected=right, grades={}, task_id="",
        tags={"task": HOSTILE}, prompt_hash=f"h{number}", usage=Usage(prompt_tokens=9),
        status=200, total_s=0.2, ttft_s=0.1,
    )  # fmt: skip


@pytest.fixture
async def drill(tmp_path: Path) -> Path:
    """A finished evaluation in the folder that [drill] names."""
    folder = tmp_path / "drill"
    evidence = folder / certificates.EVIDENCE
    model = ScriptedModel("local/student", lambda _: HOSTILE)
    await prove(
        model, [exchange(n) for n in range(60)], configuration.Evaluate(margin=0.1), evidence=evidence
    )
    question = certificates.Question(
        alias="assistant", incumbent="openai/old", candidates=["local/student"], created=1.79e9
    )
    certificates.write_question(folder, question)
    write(folder)
    return folder


async def test_a_certificate_is_listed_and_opened(browse: Browse, drill: Path) -> None:
    browser = await browse()
    page = await browser.get("/evaluations")
    address = re.search(r'href="(/evaluations/[0-9a-f]+)"', page.text)
    assert address
    assert "✕ FAIL" in page.text
    one = (await browser.get(address[1])).text
    assert "Who takes over assistant from openai/old?" in one
    assert one.count("<polyline") == 2
    assert "pass at 20" in one
    assert "<script" not in one
    assert "&lt;script&gt;" in one
    assert "understudy verify drill/certificate.json" in one
    whole = await browser.get(f"{address[1]}/certificate")
    assert whole.text == (drill / "certificate.html").read_text()
    policy = whole.headers["Content-Security-Policy"]
    assert policy.startswith("sandbox allow-scripts; default-src 'none'")
    assert re.findall(r"script-src ([^;]+)", policy) == re.findall(r"script-src ([^;\"]+)", whole.text)
    assert "allow-same-origin" not in policy


async def test_guards_are_shown_in_their_units(browse: Browse, drill: Path) -> None:
    path = drill / certificates.CERTIFICATE
    made = msgspec.json.decode(path.read_bytes())
    made["candidates"][0]["proof"]["guards"] = [
        {
            "name": "cost per completed task",
            "unit": "usd",
            "incumbent": 0.5,
            "candidate": 1.25,
            "worse": True,
        },
        {"name": "p95 latency", "unit": "seconds", "incumbent": 0.25, "candidate": 2.0, "worse": False},
        {"name": "errors", "unit": "share", "incumbent": 0.01, "candidate": 0.02, "worse": False},
    ]
    path.write_bytes(msgspec.json.encode(made))
    browser = await browse()
    address = re.search(r'href="(/evaluations/[0-9a-f]+)"', (await browser.get("/evaluations")).text)
    assert address
    one = await browser.get(address[1])
    assert one.status == 200
    for shown in ("$0.50", "$1.25", "250 ms", "2.0 s", "1.0%", "2.0%"):
        assert shown in one.text, shown


async def test_a_certificate_written_anew_is_read_anew(browse: Browse, drill: Path) -> None:
    browser = await browse()
    assert "Who takes over assistant" in (await browser.get("/evaluations")).text
    path = drill / certificates.CERTIFICATE
    path.write_bytes(path.read_bytes().replace(b'"alias": "assistant"', b'"alias": "sorcerer!"'))
    assert "Who takes over sorcerer!" in (await browser.get("/evaluations")).text


async def test_a_broken_certificate_is_named(browse: Browse, tmp_path: Path) -> None:
    for name, text in (("a", "{}"), ("b", "[" * 100_000), ("c", "\xff")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "certificate.json").write_text(text, encoding="latin-1")
    page = await (await browse()).get("/evaluations")
    assert page.status == 200
    assert page.text.count("cannot be read") == 3


async def test_addresses_open_nothing_but_certificates(browse: Browse, drill: Path) -> None:
    browser = await browse()
    for name in ("..%2f..%2fetc%2fpasswd", "..%2fdrill", "drill", "certificate.json"):
        assert (await browser.get(f"/evaluations/{name}")).status == 404
        assert (await browser.get(f"/evaluations/{name}/certificate")).status == 404
    for path in ("/static/..%2fapp.py", "/static/..%2f..%2fconfig.py", "/static/"):
        assert (await browser.get(path)).status in (403, 404)


FIDELITY = {
    "tokens": 900, "documents": 9, "kl": 0.5, "kl_se": 0.01, "agreement": 0.8, "agreement_se": 0.01,
    "teacher_perplexity": 7.5, "student_perplexity": 9.25, "student_perplexity_se": 0.2,
}  # fmt: skip
REPORT = {
    "understudy": "0", "teacher": HOSTILE, "parameters_before": 134_515_008, "parameters_after": 100_886_256,
    "plan": {"layers": []}, "calibration_tokens": 50_000, "training_tokens": 200_000, "stopped": "tokens",
    "seed": 7, "before": {**FIDELITY, "kl": 2.0}, "after": FIDELITY,
    "points": [{"step": n, "tokens": n * 100, "loss": 3 - n / 9, "kl": 2 - n / 9} for n in range(9)],
    "checks": [{"step": n, "tokens": n * 300, "kl": 2 - n / 3, "answer_kl": 1.5 - n / 3} for n in range(4)],
    "seconds": {"prune": 30.0, "heal": 240.0}, "checkpoint": "own/checkpoint",
    "lineage": ["a teacher", HOSTILE],
}  # fmt: skip


async def test_an_own_model_is_shown(browse: Browse, tmp_path: Path) -> None:
    (tmp_path / "drill" / "own").mkdir(parents=True)
    (tmp_path / "drill" / "own" / "report.json").write_bytes(msgspec.json.encode(REPORT))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text('{"of": "something else"}')
    text = (await (await browse()).get("/own")).text
    for shown in ("101 M", "75.0% of the teacher", "9.25", "75.0%", "prune", "drill/own", "cannot be read"):
        assert shown in text, shown
    assert text.count("<svg") == 2
    assert "<script" not in text


async def test_an_own_model_stands_beside_the_incumbent_of_its_certificate(
    browse: Browse, drill: Path
) -> None:
    (drill / "own").mkdir()
    (drill / "own" / "report.json").write_bytes(msgspec.json.encode(REPORT))
    text = (await (await browse()).get("/own")).text
    assert "Beside the incumbent" in text
    assert "openai/old (incumbent)" in text
    assert "local/student" in text


async def test_an_operator_moves_and_moves_back(browse: Browse) -> None:
    browser = await browse()
    first = await browser.get("/rollouts")
    assert "Back to" not in first.text
    form = {"token": first.token, "alias": "assistant", "version": "0", "confirmed": "yes"}
    done = await browser.post("/rollouts", {**form, "do": "move", "to": "local/student", "reason": "PASS"})
    assert done.headers["Location"] == "/rollouts?moved=assistant"
    text = (await browser.get("/rollouts?moved=assistant")).text
    assert "assistant was changed" in text
    assert "dashboard (127.0.0.1)" in text
    stale = await browser.post("/rollouts", {**form, "do": "move", "to": "openai/other"})
    assert stale.status == 422
    assert "changed by somebody else" in stale.text
    assert "Back to openai/gpt-4-0613" in text
    assert (await browser.post("/rollouts", {**form, "version": "2", "do": "back"})).status == 303
    assert "rolled back" in (await browser.get("/rollouts")).text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"to": "nowhere"}, "ENDPOINT/MODEL"),
        ({"to": ""}, "ENDPOINT/MODEL"),
        ({"to": "gone/model"}, "unknown endpoint"),
        ({"alias": "nobody"}, "no alias"),
        ({"version": "x"}, "version"),
        ({"version": ""}, "version"),
        ({"do": "back"}, "no move"),
        ({"do": "pause"}, "nothing is on trial"),
        ({"do": "rm"}, "cannot do"),
        ({"do": "start", "to": "openai/gpt-4-0613"}, "already"),
    ],
)
async def test_a_form_filled_in_wrongly_is_explained(
    browse: Browse, fields: dict[str, str], says: str
) -> None:
    browser = await browse()
    token = (await browser.get("/rollouts")).token
    form = {"token": token, "alias": "assistant", "version": "0", "to": "local/student", "do": "move"}
    done = await browser.post("/rollouts", {**form, **fields, "confirmed": "yes"})
    assert done.status == 422
    assert says in done.text
