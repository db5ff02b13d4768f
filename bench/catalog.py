"""What planning costs: 5,000 models weighed on 100,000 recorded calls, in CPU seconds. Prints Markdown.

The models are the catalog's own, repeated under other names until there are 5,000; the calls are drawn with a
fixed seed over 60 days. The forecast's back-test is quoted from where it is kept. It ignores how long reading
100,000 calls out of a store takes (bench/gateway).
"""

from __future__ import annotations

import random
import sys
import time

import msgspec

from understudy import config
from understudy.catalog.facts import DATA, Catalog, load_catalog
from understudy.catalog.forecast import Fit
from understudy.catalog.plan import make_plan
from understudy.catalog.tiers import parse_rules
from understudy.protocol import CallShape, Usage

MODELS, CALLS = 5_000, 100_000
NOW = 1_795_500_000.0
DAY_S = 86_400.0
BUDGET_S = 5.0


def crowd() -> Catalog:
    """The catalog, filled up with copies of its priced models until it has `MODELS`."""
    known = list(load_catalog())
    priced = [m for m in known if m.prices and m.context_window and not m.retires]
    copies = [
        msgspec.structs.replace(
            priced[n % len(priced)], id=f"copy{n % 40}/{priced[n % len(priced)].model}-{n}"
        )
        for n in range(MODELS - len(known))
    ]
    return Catalog([*known, *copies], load_catalog().read)


def traffic() -> list[CallShape]:
    rng = random.Random(1)
    needs = [
        frozenset(f)
        for f in ((), ("stream",), ("tools",), ("tools", "stream"), ("json_schema",), ("seed", "stop"))
    ]
    kinds = [frozenset({"text"})] * 9 + [frozenset({"text", "image"})]
    return [one(rng, needs, kinds) for _ in range(CALLS)]


def one(rng: random.Random, needs: list[frozenset[str]], kinds: list[frozenset[str]]) -> CallShape:
    prompt = int(rng.lognormvariate(7, 1.2))
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=int(rng.lognormvariate(5, 1)),
        cached_tokens=rng.randint(0, prompt),
    )
    at = NOW - rng.random() * 60 * DAY_S
    return CallShape(
        at, usage, rng.choice(kinds), rng.choice(needs), 0, f"t{rng.randint(0, 9999)}", rng.random() < 0.9
    )


def main() -> None:
    shapes = traffic()
    rules = parse_rules(config.Catalog().tiers)
    print("loading and ranking …", file=sys.stderr, flush=True)
    started = time.process_time()
    load_catalog()
    loaded = time.process_time() - started
    catalog = crowd()
    started = time.process_time()
    made = make_plan(catalog, "openai/gpt-4.1", shapes, [m.id for m in catalog], now=NOW, tiers=rules)
    ranked = time.process_time() - started
    fit = msgspec.json.decode((DATA / "forecast.json").read_bytes(), type=Fit)
    print(f"{len(catalog):,} models on {CALLS:,} calls of 60 days; {len(made.candidates):,} fit.\n")
    print("| step | CPU s |\n|---|---|")
    print(f"| load the catalog as shipped ({len(load_catalog())} models) | {loaded:.2f} |")
    print(f"| weigh and rank (cost, p10–p90, batch, fit, energy, forecast, lock-in) | {ranked:.2f} |")
    verdict = "within" if loaded + ranked <= BUDGET_S else "OVER"
    print(f"| together, {verdict} the budget of {BUDGET_S:g} | {loaded + ranked:.2f} |\n")
    print("Forecast of retirements, back-tested (docs/forecast.md), Brier score:\n")
    print("| months | questions | survival model | Kaplan–Meier | base rate |\n|---|---|---|---|---|")
    for s in fit.scores:
        if s.models:
            cells = f"{s.brier_model:.3f} | {s.brier_kaplan_meier:.3f} | {s.brier_base_rate:.3f}"
            print(f"| {s.months} | {s.models} | {cells} |")


if __name__ == "__main__":
    main()
