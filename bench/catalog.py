"""What planning costs in CPU seconds: 5,000 models loaded from files and weighed on 100,000 recorded calls
out of a store. Prints Markdown.

The models are the catalog's own, written again under other names into YAML of the same form until there are
5,000; the calls are drawn with a fixed seed over 60 days and lie in SQLite. A second ranking shows what the
first one kept (prices by model). The forecast's back-test is quoted from where it is kept. It ignores how the
calls came into the store (bench/traffic) and wall-clock time: other work on the machine stretches both, CPU
seconds least.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any, TypeVar

import msgspec
import yaml

from understudy import config
from understudy.catalog import facts
from understudy.catalog.documents import compile_documents
from understudy.catalog.facts import Catalog, load_catalog
from understudy.catalog.forecast import Fit
from understudy.catalog.plan import Plan, make_plan
from understudy.catalog.tiers import parse_rules
from understudy.protocol import CallShape, Usage
from understudy.traffic.record import Call, new_key
from understudy.traffic.store import Store, open_store

T = TypeVar("T")
MODELS, CALLS = 5_000, 100_000
NOW = 1_795_500_000.0
DAY_S = 86_400.0
BUDGET_S = 5.0
PAGE = 5_000


def crowd(folder: Path) -> None:
    """The snapshot's files, with copies of their models beside them until there are `MODELS`."""
    copytree(facts.DATA, folder)
    vendors = [p for p in sorted(folder.glob("*.yaml")) if p.stem not in facts.MIXED]
    documents = {path: yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader) for path in vendors}
    originals = [(path, model) for path, document in documents.items() for model in document["models"]]
    for n in range(MODELS - len(load_catalog())):
        path, model = originals[n % len(originals)]
        models = documents[path]["models"]
        models[f"{model}-copy{n}"] = models[model]
    for path, document in documents.items():
        path.write_text(_text(document))


def _text(document: Any) -> str:
    # without anchors for what is shared: each copy is parsed as if it stood alone
    class Plain(yaml.CSafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(document, Dumper=Plain, sort_keys=False, default_flow_style=None, width=10_000)


def traffic() -> Iterator[Call]:
    rng = random.Random(1)
    for n in range(CALLS):
        yield _call(rng, n)


def _call(rng: random.Random, n: int) -> Call:
    prompt = int(rng.lognormvariate(7, 1.2))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": f"question {n % 50}"}]}
    body |= rng.choice(
        [{}, {"stream": True}, {"tools": [{}]}, {"tools": [{}], "stream": True}, {"seed": 1, "stop": "."}]
    )
    return Call(
        key=new_key(),
        at=NOW - rng.random() * 60 * DAY_S,
        route="chat.completions",
        alias="assistant",
        target="openai/gpt-4.1",
        status=200,
        usage=Usage(
            prompt_tokens=prompt,
            completion_tokens=int(rng.lognormvariate(5, 1)),
            cached_tokens=rng.randint(0, prompt),
        ),
        task_id=f"t{rng.randint(0, 9999)}",
        request=msgspec.json.encode(body),
        response=b"{}",
    )


def timed(name: str, work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` gives, and its CPU seconds."""
    print(f"{name} …", file=sys.stderr, flush=True)
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def fill(store: Store) -> None:
    page: list[Call] = []
    for n, call in enumerate(traffic(), 1):
        page.append(call)
        if n % PAGE == 0:
            store.insert(page, "bench", n)
            page = []


def rank(catalog: Catalog, shapes: list[CallShape]) -> Plan:
    rules = parse_rules(config.Catalog().tiers)
    named = [m.id for m in catalog]
    return make_plan(catalog, "openai/gpt-4.1", shapes, named, now=NOW, tiers=rules)


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        crowd(Path(root, "data"))
        facts.DATA = Path(root, "data")
        _, compiling = timed("compiling", lambda: compile_documents(facts.DATA))
        catalog, loading = timed("loading", load_catalog)
        with open_store("sqlite:///traffic.db", Path(root)) as store:
            fill(store)
            shapes, reading = timed("reading", lambda: list(store.shapes(alias="assistant")))
        made, ranking = timed("ranking", lambda: rank(catalog, shapes))
        _, again = timed("ranking again", lambda: rank(catalog, shapes))
    assert made.calls == CALLS
    print(f"{len(catalog):,} models on {CALLS:,} calls of 60 days; {len(made.candidates):,} fit.\n")
    print("| step | CPU s |\n|---|---|")
    print(f"| load the models | {loading:.2f} |")
    print(f"| weigh and rank (cost, p10–p90, batch, fit, energy, forecast, lock-in) | {ranking:.2f} |")
    within = "within" if loading + ranking <= BUDGET_S else "OVER"
    print(f"| **load and rank, {within} the budget of {BUDGET_S:g}** | **{loading + ranking:.2f}** |")
    print(f"| read the calls from SQLite besides | {reading:.2f} |")
    print(f"| rank once more in the same process | {again:.2f} |")
    print(f"| compile the models' YAML, which a refresh does once | {compiling:.2f} |\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"Peak memory {peak:,.0f} MiB, filling the store included.\n")
    print_backtest()


def print_backtest() -> None:
    fit = msgspec.json.decode((Path(facts.__file__).parent / "data" / "forecast.json").read_bytes(), type=Fit)
    print("Forecast of retirements, back-tested (docs/forecast.md), Brier score:\n")
    print("| months | questions | survival model | Kaplan–Meier | base rate |\n|---|---|---|---|---|")
    for s in fit.scores:
        if s.models:
            cells = f"{s.brier_model:.3f} | {s.brier_kaplan_meier:.3f} | {s.brier_base_rate:.3f}"
            print(f"| {s.months} | {s.models} | {cells} |")


if __name__ == "__main__":
    main()
