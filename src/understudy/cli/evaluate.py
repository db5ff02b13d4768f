"""`understudy evaluate …` and `understudy verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from understudy.cli.options import config_option, json_option, print_json, print_json_line, say

if TYPE_CHECKING:
    from understudy.evaluate.certificate import Certificate
    from understudy.evaluate.proof import MetricResult
    from understudy.evaluate.replay import Forecast, Progress
    from understudy.evaluate.scores import Repeated, Study, Table
    from understudy.evaluate.sequential import Design
    from understudy.evaluate.task import TaskFigures


@click.group()
def evaluate() -> None:
    """Prove a candidate against the incumbent."""


@evaluate.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--incumbent", help="Model whose scores are known for free.")
@click.option("--candidate", help="Model whose scores are paid for.")
@click.option(
    "--margin",
    type=click.FloatRange(0, 1, True, True),
    default=0.03,
    show_default=True,
    help="Non-inferiority margin in points of the score.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 0.5, True, True),
    default=0.05,
    show_default=True,
    help="Largest probability of a PASS for a model worse by the margin.",
)
@click.option(
    "--beta",
    type=click.FloatRange(0, 0.5, True, True),
    default=0.10,
    show_default=True,
    help="Largest probability of a FAIL for a model as good.",
)
@click.option("--seed", type=int, default=20260101, show_default=True, help="Draws the order of the items.")
@click.option(
    "--unit",
    type=click.Choice(["item", "cluster"]),
    default="item",
    show_default=True,
    help="Draw single items, or whole clusters.",
)
@click.option("--all-pairs", is_flag=True, help="Every ordered pair of models in the file.")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Orders to try (with --all-pairs).",
)
@click.option(
    "--diversity", is_flag=True, help="Where models fail together: every pair, or those of --incumbent."
)
@click.option("--skip-broken", is_flag=True, help="Leave broken lines out instead of refusing the file.")
@json_option
def scores(
    file: Path,
    incumbent: str | None,
    candidate: str | None,
    margin: float,
    alpha: float,
    beta: float,
    seed: int,
    unit: Literal["item", "cluster"],
    all_pairs: bool,
    repeats: int,
    diversity: bool,
    skip_broken: bool,
    as_json: bool,
) -> None:
    """Decide from scores at hand: a CSV or JSONL FILE of item,cluster,model,score.

    Each candidate score counts as a paid call; the verdict comes as soon as the evidence suffices.
    """
    from understudy.evaluate.scores import read
    from understudy.evaluate.sequential import Design

    if not (all_pairs or diversity) and not (incumbent and candidate):
        raise click.UsageError("give --incumbent and --candidate, or --all-pairs, or --diversity")
    table = read(file, skip_broken=skip_broken)
    _list_broken(table.broken)
    if diversity:
        _print_diversity(table, incumbent or "", as_json)
        return
    design = Design(margin, alpha, beta)
    if all_pairs:
        _print_pairs(table, design, seed, repeats, unit, as_json)
        return
    from understudy.evaluate.scores import study

    result = study(table, incumbent or "", candidate or "", design, seed=seed, unit=unit)
    if as_json:
        print_json(result)
    else:
        _print_study(result)


def _list_broken(broken: list[str]) -> None:
    from understudy.evaluate.scores import LISTED

    if broken:
        say(f"left out {len(broken)} broken line(s)", err=True)
    for line in broken[:LISTED]:
        say(f"  {line}", err=True)


def _print_diversity(table: Table, incumbent: str, as_json: bool) -> None:
    from understudy.evaluate.diversity import of_table, warning

    pairs = of_table(table, incumbent=incumbent)
    if as_json:
        print_json(pairs)
        return
    for pair in pairs:
        overlap = "–" if pair.error_overlap is None else f"{pair.error_overlap:.1%}"
        alike = "–" if pair.capa is None else f"{pair.capa:.2f} ({pair.low:.2f} to {pair.high:.2f})"
        say(
            f"{pair.first} and {pair.second}: both wrong on {pair.both_wrong:,} of {pair.items:,}"
            f" (error overlap {overlap}), CAPA {alike}"
        )
        if line := warning(pair):
            say(f"  {line}")


def _print_pairs(
    table: Table, design: Design, seed: int, repeats: int, unit: Literal["item", "cluster"], as_json: bool
) -> None:
    from understudy.evaluate.scores import all_pairs

    for pair in all_pairs(table, design, seed=seed, repeats=repeats, unit=unit):
        print_json_line(pair) if as_json else say(_pair_line(pair))


def _pair_line(pair: Repeated) -> str:
    counts = " ".join(f"{name} {count}" for name, count in sorted(pair.verdicts.items()))
    return (
        f"{pair.candidate} for {pair.incumbent}: {counts}; {pair.calls:,.1f} of {pair.items:,} calls"
        f" ({pair.share:.1%}); difference {points(pair.difference_all)}"
    )


def _print_study(result: Study) -> None:
    low, high = result.interval
    say(f"verdict         {result.verdict}")
    say(f"calls           {result.calls:,}")
    say(f"items           {result.items:,}")
    say(
        f"difference      {points(result.difference)} points,"
        f" {result.level:.0%} interval {points(low)} to {points(high)}"
    )
    say(f"difference_all  {points(result.difference_all)} points")
    say(
        f"e-values        pass {_e_value(result.e_pass)} (needs {1 / result.alpha:g}),"
        f" fail {_e_value(result.e_fail)} (needs {1 / result.beta:g})"
    )
    if result.future is not None:
        say(
            f"other items     {points(result.future.low)} to {points(result.future.high)} points"
            f" ({result.future.clusters:,} clusters seen)"
        )
    for line in result.doubts:
        say(f"doubt           {line}")
    if result.unpaired:
        say(f"left out        {result.unpaired:,} score(s) of items that only one model has")


def points(difference: float) -> str:
    """A difference in points of 100, signed."""
    return f"{100 * difference:+.1f}"


def _e_value(value: float | None) -> str:
    return "certain" if value is None else f"{value:.3g}"


@evaluate.command("run")
@click.option("--alias", required=True, help="The alias whose recorded traffic is replayed.")
@click.option("--candidate", "targets", multiple=True, required=True, help="ENDPOINT/MODEL; may be repeated.")
@click.option("--budget", type=click.IntRange(0), help="Most calls per candidate (0: all held-out items).")
@click.option(
    "--budget-usd", type=click.FloatRange(0), help="Most US dollars per candidate (0: no limit in money)."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("evaluation"),
    show_default=True,
    help="Folder for evidence and certificate.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Answers to each of the first 20 questions, the incumbent's too: how much each differs from itself.",
)
@click.option(
    "--unit",
    type=click.Choice(["item", "cluster"]),
    help="Draw single calls, or every call of a conversation at once ([evaluate] otherwise).",
)
@click.option("--dry-run", is_flag=True, help="Tell calls and tokens first; nothing is called.")
@click.option("--ray", "address", default="", help="HOST:PORT, auto or local: a Ray cluster asks.")
@config_option
@json_option
def run_(
    alias: str,
    targets: tuple[str, ...],
    budget: int | None,
    budget_usd: float | None,
    out: Path,
    repeats: int,
    unit: Literal["item", "cluster"] | None,
    dry_run: bool,
    address: str,
    config_path: Path,
    as_json: bool,
) -> None:
    """Replay recorded traffic to candidates until the evidence suffices, and certify the outcome.

    Held-out calls only; what is already in the folder is not paid for again.
    """
    import msgspec

    from understudy import config
    from understudy.evaluate import trial
    from understudy.evaluate.replay import forecast
    from understudy.fleet import reaching

    loaded = config.load(config_path)
    settings = loaded.evaluate if budget is None else msgspec.structs.replace(loaded.evaluate, budget=budget)
    if budget_usd is not None:
        settings = msgspec.structs.replace(settings, budget_usd=budget_usd)
    if unit is not None:
        settings = msgspec.structs.replace(settings, unit=unit)
    sample = trial.held_out(loaded, alias)
    if dry_run:
        prices = [trial.price_of(loaded, target) for target in targets]
        told = forecast(sample, settings, candidates=len(targets), repeats=repeats, prices=prices)
        _print_forecast(told, as_json)
        return
    show = None if as_json else _show_progress
    with reaching(address) as reach:
        certificate = trial.run(
            trial.evaluate(loaded, alias, targets, sample, settings, out, show, repeats=repeats, reach=reach)
        )
    if as_json:
        print_json(certificate)
    else:
        _print_certificate(certificate, out)


def _show_progress(name: str, now: Progress) -> None:
    if now.calls % 10 == 0 or now.verdict != "UNDECIDED":
        e_values = f"pass {now.e_pass:.3g}, fail {now.e_fail:.3g}"
        say(f"{name}  {now.calls:,} of {now.items:,} calls  {e_values}  {now.verdict}", err=True)


def _print_forecast(told: Forecast, as_json: bool) -> None:
    if as_json:
        print_json(told)
        return
    drawn = f", drawn as {told.draws:,} whole conversations" if told.unit == "cluster" else ""
    say(f"held-out items   {told.items:,}{drawn}")
    say(f"a PASS needs     {', '.join(told.rests_on)}")
    say(f"calls at most    {told.most_calls:,}")
    say(f"calls expected   {told.expected_if_as_good:,.0f} if as good as the incumbent,")
    say(f"                 {told.expected_if_worse:,.0f} if worse by three margins")
    say(f"tokens expected  {told.prompt_tokens:,.0f} prompt, {told.completion_tokens:,.0f} completion")
    say(f"tokens at most   {told.prompt_tokens_most:,} prompt, {told.completion_tokens_most:,} completion")
    if told.usd is not None and told.usd_most is not None:
        say(f"money            ${told.usd:,.4g} expected, ${told.usd_most:,.4g} at most per candidate")
    else:
        say("money            not known: no price of a candidate in the catalog or the overlay")
    if told.judge_calls_most:
        say(
            f"judge            {told.judge_calls:,.0f} comparisons expected,"
            f" {told.judge_calls_most:,} at most per candidate"
        )
    if told.repeat_calls:
        say(f"repeats          {told.repeat_calls:,} calls more, the incumbent's among them")


def _print_certificate(certificate: Certificate, out: Path) -> None:
    for candidate in certificate.candidates:
        proof = candidate.proof
        say(
            f"{proof.verdict}  {proof.candidate}: {points(proof.difference)} points"
            f" ({points(proof.interval[0])} to {points(proof.interval[1])}),"
            f" {proof.calls:,} of {proof.items:,} calls, {proof.paid:,} paid{_drawn(proof.unit)}"
        )
        say(f"  {proof.rests_on}")
        for metric in proof.metrics if len(proof.metrics) > 1 else []:
            say(_metric_line(metric))
    for task in certificate.tasks:
        say(_task_line(task))
    for line in flicker_lines(certificate):
        say(line)
    for line in certificate.next:
        say(f"next: {line}")
    say(f"certificate: {out / 'certificate.json'} and {out / 'certificate.html'}")


def _drawn(unit: Literal["item", "cluster"]) -> str:
    return ", drawn by whole conversations" if unit == "cluster" else ""


def _metric_line(metric: MetricResult) -> str:
    what = metric.verdict if metric.required else "reported"
    low, high = metric.interval
    return (
        f"  {metric.name}: {what}, {points(metric.difference)} points ({points(low)} to {points(high)}),"
        f" {metric.asked:,} of {metric.items:,} items"
    )


def _task_line(task: TaskFigures) -> str:
    done = f"{task.completion:.1%} ({task.completion_low:.1%} to {task.completion_high:.1%})"
    line = f"tasks: {task.model} completed {task.completed:,} of {task.calls:,}, {done}"
    if task.usd is None or task.usd_low is None or task.usd_high is None:
        return line
    cost, low, high = (f"${1000 * usd:,.4g}" for usd in (task.usd, task.usd_low, task.usd_high))
    return f"{line}; {cost} per 1,000 completed ({low} to {high})"


def flicker_lines(certificate: Certificate) -> list[str]:
    """What repeats said, a line for each model."""
    lines: list[str] = []
    for one in certificate.flicker:
        lines.append(
            f"flicker: {one.model} changed its words in {one.texts_differ:.0%} and its score in"
            f" {one.scores_differ:.0%} of repeats of {one.items:,} questions"
        )
        if one.moves is not None and one.difference is not None:
            lines.append(
                f"  the measured difference is {points(one.difference)} points;"
                f" flicker alone moves it by up to {100 * one.moves:.1f}"
            )
    return lines


@evaluate.command("benchmark")
@click.argument("suites", nargs=-1, required=True, metavar="SUITE…")
@click.option("--model", required=True, help="ENDPOINT/MODEL.")
@click.option("--versus", help="ENDPOINT/MODEL to take the paired difference from: the incumbent.")
@click.option("--folder", type=click.Path(path_type=Path), help="Holds the data sets ([evaluate] otherwise).")
@click.option(
    "--items", type=click.IntRange(0), help="Items sampled from each (0: all; [evaluate] otherwise)."
)
@click.option("--generative", is_flag=True, help="Ask by chat: for APIs without log-probabilities.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("benchmarks"),
    show_default=True,
    help="Folder of the answers; those in it are not asked for again.",
)
@config_option
@json_option
def benchmark_(
    suites: tuple[str, ...],
    model: str,
    versus: str | None,
    folder: Path | None,
    items: int | None,
    generative: bool,
    out: Path,
    config_path: Path,
    as_json: bool,
) -> None:
    """Run public benchmarks on an endpoint: hellaswag, mmlu, arc_easy, arc_challenge, piqa, boolq,
    winogrande, gsm8k, mmmu.

    Items come from Arrow, Parquet, JSONL or CSV files; nothing is downloaded.
    """
    from understudy import config
    from understudy.evaluate import trial

    loaded = config.load(config_path)
    settings = loaded.evaluate
    report = trial.run(
        trial.benchmark(
            loaded,
            [versus, model] if versus else [model],
            suites,
            folder or loaded.path(settings.benchmark_folder),
            out,
            items=settings.benchmark_items if items is None else items,
            generative=generative,
        )
    )
    if as_json:
        print_json(report)
        return
    for one in report.accuracies:
        say(
            f"{one.suite} {one.metric}  {one.model}: {100 * one.accuracy:.1f} ± {100 * one.stderr:.1f}"
            f" on {one.items:,} of {one.population:,} items{_few(one.few)}"
        )
    for pair in report.differences:
        span = f"{points(pair.low)} to {points(pair.high)}"
        say(f"{pair.suite}  difference {points(pair.difference)} points ({span}){_few(pair.few)}")


@evaluate.command("users")
@click.option("--alias", required=True, help="The alias whose recorded traffic is read.")
@config_option
@json_option
def users_(alias: str, config_path: Path, as_json: bool) -> None:
    """What users had to put up with, by the model that answered: retries, rephrasings, negative feedback."""
    from understudy import config
    from understudy.evaluate import trial

    found = trial.users(config.load(config_path), alias)
    if as_json:
        print_json(found)
        return
    for arm in found:
        say(f"{arm.model}  {arm.tasks:,} tasks")
        for name, rate in (
            ("asked again", arm.retried),
            ("asked otherwise", arm.rephrased),
            ("negative feedback", arm.negative),
            ("frustrated", arm.frustrated),
            ("completed", arm.completed),
        ):
            span = f"{rate.share:6.1%} ({rate.low:.1%} to {rate.high:.1%}) of {rate.of:,}"
            say(f"  {name:<18} {span if rate.of else 'nobody said'}")
        if arm.more_frustrated is not None:
            more, low, high = (points(part) for part in arm.more_frustrated)
            say(f"  frustrated {more} points more than with {found[0].model} ({low} to {high})")


@evaluate.command("lm-eval")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK…")
@click.option("--model", required=True, help="ENDPOINT/MODEL.")
@click.option("--versus", help="ENDPOINT/MODEL to take the paired difference from: the incumbent.")
@click.option("--folder", type=click.Path(path_type=Path), help="Local data sets, looked into first.")
@click.option("--items", type=click.IntRange(0), default=0, help="Most items of each task (0: all).")
@click.option("--fewshot", type=click.IntRange(0), help="Examples in the prompt (the task's own otherwise).")
@click.option("--chat", is_flag=True, help="Ask by chat: tasks that generate only.")
@config_option
@json_option
def lm_eval_(
    tasks: tuple[str, ...],
    model: str,
    versus: str | None,
    folder: Path | None,
    items: int,
    fewshot: int | None,
    chat: bool,
    config_path: Path,
    as_json: bool,
) -> None:
    """Run any TASK of lm-evaluation-harness on an endpoint (extra: lm-eval)."""
    from understudy import config
    from understudy.evaluate import trial
    from understudy.evaluate.harness import differences, run_tasks

    loaded = config.load(config_path)
    runs = [
        run_tasks(
            trial.connect(loaded, target),
            tasks,
            folder=folder,
            items=items,
            fewshot=fewshot,
            chat=chat,
            concurrency=loaded.evaluate.concurrency,
        )
        for target in ([versus, model] if versus else [model])
    ]
    versus_ = differences(runs[0], runs[1]) if len(runs) > 1 else []
    if as_json:
        print_json({"models": runs, "differences": versus_})
        return
    for run in runs:
        for one in run.figures:
            error = "" if one.stderr is None else f" ± {one.stderr:.4f}"
            say(
                f"{one.task} {one.metric}  {run.model}: {one.value:.4f}{error}"
                f" on {one.items:,} items{_few(one.few)}"
            )
    for pair in versus_:
        span = f"{pair.low:+.4f} to {pair.high:+.4f}"
        say(f"{pair.task} {pair.metric}  difference {pair.difference:+.4f} ({span}){_few(pair.few)}")


def _few(few: bool) -> str:
    return "  (few items: read the error first)" if few else ""


@click.command()
@click.argument("certificate", type=click.Path(path_type=Path, dir_okay=False))
@json_option
@click.pass_context
def verify(context: click.Context, certificate: Path, as_json: bool) -> None:
    """Recompute a certificate from its evidence.

    Exit code 0: every number, record and file is as certified; 1: something differs (listed); 2: the file is
    no certificate.
    """
    from understudy.errors import EvidenceError
    from understudy.evaluate.verify import verify as check

    try:
        digest = check(certificate)
    except EvidenceError as error:
        if not as_json:
            raise
        print_json({"ok": False, "certificate": certificate, "differences": error.differences})
        context.exit(1)
    if as_json:
        print_json({"ok": True, "certificate": certificate, "sha256": digest, "differences": []})
    else:
        say(f"{certificate}: every number follows from its evidence\nsha256 {digest}")
