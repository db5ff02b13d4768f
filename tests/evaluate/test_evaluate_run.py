"""`evaluate run` as a user meets it: a recorded store, a real server as candidate, a certificate."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from understudy.cli.evaluate import evaluate, verify
from understudy.config import load
from understudy.errors import InputError
from understudy.evaluate.trial import price_of
from understudy.protocol import Usage
from understudy.traffic.record import Call, Feedback, new_key
from understudy.traffic.store import open_store


class Candidate(BaseHTTPRequestHandler):
    """Answers the parity of the number asked about; keeps count."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).asked += 1
        body = json.dumps(completion(answer(request["messages"][-1]["content"]))).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


def answer(question: str) -> str:
    if "Answer A" in question:
        return "verdict: TIE"
    return "even" if int(question.split()[-1]) % 2 == 0 else "odd"


def completion(text: str) -> dict[str, object]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 6, "completion_tokens": 1, "total_tokens": 7}}


@pytest.fixture
def server() -> Iterator[str]:
    Candidate.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Candidate) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def project(tmp_path: Path, server: str) -> Path:
    """A config and a store with 160 recorded calls, half of them answered wrongly."""
    config = tmp_path / "understudy.toml"
    config.write_text(
        f"[endpoints.old]\nbase_url = '{server}'\n[endpoints.new]\nbase_url = '{server}'\n"
        "[aliases.assistant]\nmodel = 'old/m'\n"
        "[evaluate]\nmargin = 0.1\nheld_out = 0.9\nconcurrency = 4\n"
    )
    with open_store("sqlite:///understudy.db", tmp_path) as store:
        store.insert([record for i in range(160) for record in recorded(i)], "segment", 1)
    return config


def recorded(i: int) -> list[Call | Feedback]:
    request = {"model": "assistant", "messages": [{"role": "user", "content": f"Even or odd: {i}"}]}
    key = new_key()
    call = Call(
        key=key, at=1.79e9 + i, route="chat.completions", alias="assistant", target="old/m", status=200,
        request=json.dumps(request).encode(), response=json.dumps(completion("even")).encode(),
    )  # fmt: skip
    right = "even" if i % 2 == 0 else "odd"
    return [call, Feedback(key=new_key(), call=key, at=1.79e9 + i, expected=right)]


def run(project: Path, *more: str) -> Result:
    out = project.parent / "out"
    base = [
        "run",
        "--alias",
        "assistant",
        "--candidate",
        "new/m",
        "--config",
        str(project),
        "--out",
        str(out),
    ]
    return CliRunner().invoke(evaluate, [*base, *more], catch_exceptions=False)


def test_a_dry_run_tells_and_calls_nothing(project: Path) -> None:
    told = json.loads(run(project, "--dry-run", "--json").stdout)
    assert 100 < told["items"] <= 160
    assert told["expected_if_as_good"] <= told["most_calls"]
    assert Candidate.asked == 0
    assert "calls expected" in run(project, "--dry-run").stdout


def test_a_candidate_is_proven_certified_and_not_paid_for_twice(project: Path) -> None:
    first = run(project)
    assert "PASS  new/m" in first.stdout
    paid = Candidate.asked
    assert 0 < paid < 100
    certificate = project.parent / "out" / "certificate.json"
    assert CliRunner().invoke(verify, [str(certificate)]).exit_code == 0
    again = json.loads(run(project, "--json").stdout)
    assert again["verdict"] == "PASS"
    assert again["candidates"][0]["proof"]["paid"] == paid == Candidate.asked


def test_a_budget_ends_it(project: Path) -> None:
    told = json.loads(run(project, "--budget", "5", "--json").stdout)
    assert (told["verdict"], Candidate.asked) == ("UNDECIDED", 5)


def test_whole_conversations_from_dry_run_to_verify(project: Path) -> None:
    """Recorded calls of ten turns each: what is foretold, asked, shown and verified is drawn by tens."""
    with open_store("sqlite:///understudy.db", project.parent) as store:
        talks = [msgspec.structs.replace(r, task_id=f"talk {i // 10}") for i in range(160, 420)
                 for r in recorded(i)[:1] if isinstance(r, Call)]  # fmt: skip
        store.insert(talks, "segment2", 1)
    told = json.loads(run(project, "--unit", "cluster", "--dry-run", "--json").stdout)
    assert (told["unit"], Candidate.asked) == ("cluster", 0)
    assert told["draws"] < told["items"]
    assert "whole conversations" in run(project, "--unit", "cluster", "--dry-run").stdout
    first = run(project, "--unit", "cluster")
    assert "drawn by whole conversations" in first.stdout
    certificate = project.parent / "out" / "certificate.json"
    assert json.loads(certificate.read_bytes())["candidates"][0]["proof"]["unit"] == "cluster"
    assert "whole conversations, seed" in certificate.with_suffix(".html").read_text()
    assert CliRunner().invoke(verify, [str(certificate)]).exit_code == 0
    header = next((project.parent / "out" / "evidence").glob("new-m*.jsonl"))
    header.write_bytes(header.read_bytes().replace(b'"unit":"cluster"', b'"unit":"item"', 1))
    assert CliRunner().invoke(verify, [str(certificate)]).exit_code == 1


def test_an_alias_without_traffic_is_named(project: Path) -> None:
    arguments = ["run", "--alias", "other", "--candidate", "new/m", "--config", str(project)]
    result = CliRunner().invoke(evaluate, arguments)
    assert isinstance(result.exception, InputError)
    assert "no held-out exchange of 'other'" in str(result.exception)


def test_repeats_ask_both_arms_again_and_are_foretold(project: Path) -> None:
    assert json.loads(run(project, "--repeats", "2", "--dry-run", "--json").stdout)["repeat_calls"] == 40
    told = json.loads(run(project, "--repeats", "2", "--json").stdout)
    assert [f["model"] for f in told["flicker"]] == ["old/m", "new/m"]
    assert told["flicker"][1]["texts_differ"] == 0.0
    assert Candidate.asked == told["candidates"][0]["proof"]["paid"] + 40
    assert "flicker: new/m changed its words in 0%" in run(project, "--repeats", "2").stdout


def test_a_judge_of_the_config_is_asked_beside_the_graders(project: Path) -> None:
    text = project.read_text().replace("[evaluate]\n", "[evaluate]\njudge = 'old/claude'\n")
    project.write_text(text)
    told = json.loads(run(project, "--json").stdout)
    judged = told["judged"][0]
    assert (judged["judge"], judged["candidate"]) == ("old/claude", "new/m")
    assert judged["ties"] == judged["pairs"] > 0
    assert judged["preference"]["value"] == 0.5
    project.write_text(text.replace("old/claude", "new/m"))
    with pytest.raises(InputError, match="is an arm"):
        run(project, "--json")


def test_a_cache_and_a_budget_in_money_of_the_config(project: Path) -> None:
    text = project.read_text().replace("[evaluate]\n", "[evaluate]\ncache = 'kept'\n")
    project.write_text(text)
    first = json.loads(run(project, "--json").stdout)["candidates"][0]["proof"]
    asked = Candidate.asked
    again = json.loads(run(project, "--json", "--out", str(project.parent / "second")).stdout)
    assert first["paid"] == asked
    assert again["candidates"][0]["proof"]["paid"] == Candidate.asked - asked <= 4
    assert CliRunner().invoke(verify, [str(project.parent / "second" / "certificate.json")]).exit_code == 0
    with pytest.raises(InputError, match="no price of new/m is known"):
        run(project, "--budget-usd", "1", "--out", str(project.parent / "third"))
    assert "money            not known" in run(project, "--dry-run").stdout


def test_the_price_of_a_target_comes_from_the_catalog_by_its_vendors_url(tmp_path: Path) -> None:
    path = tmp_path / "understudy.toml"
    path.write_text(
        "[endpoints.big]\nbase_url = 'https://api.openai.com/v1'\n"
        "[endpoints.own]\nbase_url = 'http://127.0.0.1:1/v1'\n"
    )
    loaded = load(path)
    price = price_of(loaded, "big/gpt-4o")
    once, twice = price(Usage(prompt_tokens=1000)), price(Usage(prompt_tokens=2000))
    assert once is not None
    assert once > 0.0
    assert twice == pytest.approx(2 * once)
    assert price_of(loaded, "own/student")(Usage(prompt_tokens=1000)) is None
