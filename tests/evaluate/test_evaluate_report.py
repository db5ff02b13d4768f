"""The page: whole, self-contained, and safe against what was recorded."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from understudy.evaluate.proof import PathPoint
from understudy.evaluate.report import (
    bar,
    count,
    digest_on,
    e_plot,
    e_value,
    points,
    seconds,
    usd,
)
from understudy.evaluate.verify import verify


class Tags(HTMLParser):
    """Elements and attributes of a page; unbalanced ones are remembered."""

    VOID = {"input", "meta", "br", "line", "polyline", "circle", "link", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def page(drill: Path) -> Tags:
    tags = Tags()
    tags.feed((drill / "certificate.html").read_text())
    return tags


def test_recorded_text_stays_text(page: Tags) -> None:
    names = [tag for tag, _ in page.seen]
    assert not set(names) & {"img", "iframe", "link", "object"}
    assert names.count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.seen for name in attributes)
    assert "<script>alert(1)</script>" in "".join(page.text)
    assert page.open == []


def test_nothing_is_loaded_from_elsewhere(drill: Path, page: Tags) -> None:
    assert not any(name in attributes for _, attributes in page.seen for name in ("src", "href"))
    text = (drill / "certificate.html").read_text()
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text


def test_only_our_own_script_may_run(drill: Path) -> None:
    """The policy names one hash, and it is that of the one script on the page."""
    text = (drill / "certificate.html").read_text()
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    [allowed] = re.findall(r"script-src '(sha256-[^']+)'", text)
    assert allowed == "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "'unsafe-inline'" not in text.partition("script-src")[2].partition('"')[0]
    assert "innerHTML" not in script


def test_differences_can_be_searched_and_stand_side_by_side(page: Tags) -> None:
    boxes = [a for tag, a in page.seen if tag == "input"]
    assert [(a["type"], "hidden" in a) for a in boxes] == [("search", True)] * 2  # one for each candidate
    differences = [a for tag, a in page.seen if tag == "details" and a.get("class") == "difference"]
    assert len(differences) == 8
    assert "questions were scored differently" in " ".join(page.text)


def test_the_page_tells_the_story(page: Tags) -> None:
    text = " ".join(" ".join(page.text).split())
    for part in (
        "Can local/student take over from host/old?",
        "PASS",
        "HellaSwag",
        "60.0 ± 11.2",
        "Context length 8,192 tokens",
        "Cost per million tokens",
        "Cost per 1,000 completed tasks",
        "What would be needed next",
        "By task",
        "Where the two differ",
        "paid calls",
        "pass at 40",
        "evidence/exchanges.jsonl",
        "understudy verify certificate.json",
    ):
        assert part in text


def test_the_page_names_its_certificate(drill: Path) -> None:
    page = (drill / "certificate.html").read_text()
    assert digest_on(page) == verify(drill / "certificate.json")


def test_the_plot_stays_in_its_box_and_ends_at_the_verdict(drill: Path) -> None:
    import msgspec

    from understudy.evaluate.certificate import Certificate

    raw = (drill / "certificate.json").read_bytes()
    proof = msgspec.json.decode(raw, type=Certificate).candidates[0].proof
    plot = e_plot(proof)
    for line in (plot.passing, plot.failing):
        for x, y in (map(float, point.split(",")) for point in line.split()):
            assert plot.left <= x <= plot.right
            assert plot.top <= y <= plot.bottom
    last = plot.passing.split()[-1].split(",")
    assert float(last[0]) == plot.right
    assert float(last[1]) <= plot.pass_line.at
    assert plot.pass_line.at < plot.fail_line.at
    certain = msgspec.structs.replace(proof, path=[PathPoint(1, None, 0.0)], calls=1)
    assert e_plot(certain).passing.split()[-1].split(",")[1] == str(plot.top)
    interval = bar(proof, -9.0, 9.0, 0.0)
    assert (interval.low, interval.zero, interval.high) == (4.0, 100.0, 196.0)


def test_formats() -> None:
    assert points(-0.0312) == "−3.1"
    assert [usd(x) for x in (None, 0.0, 12.345, 0.00000292)] == ["–", "$0", "$12.35", "$0.00000292"]
    assert [seconds(x) for x in (0.0421, 1.5)] == ["42 ms", "1.50 s"]
    assert [e_value(x) for x in (None, 20.04, 0.00123)] == ["beyond doubt", "20.0", "0.001"]
    assert count(None) == "–"
