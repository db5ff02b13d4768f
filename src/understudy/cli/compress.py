"""Commands `prune`, `distil`, `own` and `fidelity`."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from understudy.cli.options import config_option, json_option, print_json
from understudy.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from understudy.compress.corpus import Chat, Document
    from understudy.compress.importance import Score
    from understudy.compress.progress import Progress
    from understudy.config import Config, Own

F = TypeVar("F", bound=Callable[..., Any])
SCORES = ("output", "magnitude", "wanda-sp", "minitron", "flap", "taylor")
OUT = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


def _text_options(command: F) -> F:
    """Where texts come from."""
    data = click.option(
        "--data",
        default="traffic",
        show_default=True,
        help="traffic, or a file: JSONL of chats ({messages: […]} or […]) or plain text.",
    )
    alias = click.option("--alias", default=None, help="Only this alias's traffic.")
    return config_option(data(alias(command)))


@click.command()
@click.argument("teacher")
@click.option("--out", type=OUT, required=True, help="Folder of the pruned checkpoint.")
@click.option("--params", default="", help="Share to keep (0.75) or a count (108M).  [default: 0.75]")
@click.option("--ffn", default=0, help="FFN channels per layer.")
@click.option("--heads", default=0, help="Query heads per layer.")
@click.option("--kv-heads", default=0, help="KV heads per layer.")
@click.option("--hidden", default=0, help="Width of the hidden stream.")
@click.option("--layers", default=0, help="Decoder layers.")
@click.option(
    "--score", type=click.Choice(SCORES), default="output", show_default=True, help="Of FFN channels."
)
@click.option("--experts", default=0, help="Experts per layer: a mixture stays one.  [default: made dense]")
@click.option(
    "--shape",
    type=click.Choice(["uniform", "per-layer"]),
    default="uniform",
    show_default=True,
    help="per-layer: FFN sizes that differ, shared out by measured damage.",
)
@click.option(
    "--plan", "plan_file", type=FILE, default=None, help="Apply this plan.json; sizes are ignored then."
)
@click.option("--calibration", default="traffic", show_default=True, help="traffic, or a file.")
@click.option("--alias", default=None, help="Only this alias's traffic.")
@click.option("--tokens", default=50_000, show_default=True, help="Calibration tokens.")
@click.option("--dry-run", is_flag=True, help="Show and save the plan, prune nothing.")
@config_option
@json_option
def prune(
    teacher: str,
    out: Path,
    params: str,
    ffn: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    layers: int,
    score: Score,
    shape: Literal["uniform", "per-layer"],
    experts: int,
    plan_file: Path | None,
    calibration: str,
    alias: str | None,
    tokens: int,
    dry_run: bool,
    config_path: Path,
    as_json: bool,
) -> None:
    """Cut channels, heads, width and layers out of TEACHER (hub id, folder, GGUF file or package:NAME/FILE).

    What is left is refitted on the calibration text. A mixture of experts becomes dense, by default as
    wide as what one token passes. The plan is shown and written to OUT.plan.json first.
    """
    from understudy.compress import single
    from understudy.compress.prune import Method

    sizes = single.Sizes(
        params=params,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        layers=layers,
        shape=shape,
        experts=experts,
    )
    with _bars() as progress:
        job = single.PruneJob(
            teacher,
            out,
            sizes,
            plan_file,
            _texts(calibration, alias, config_path),
            tokens,
            Method(score=score),
        )
        plan = single.prune_only(job, lambda p: click.echo(str(p), err=True), progress, dry_run=dry_run)
    print_json(plan) if as_json else click.echo(f"plan: {plan.parameters_after:,} parameters → {out}")


@click.command()
@click.argument("teacher")
@click.argument("student", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=OUT, required=True, help="Folder of the healed checkpoint.")
@click.option("--tokens", default=200_000, show_default=True, help="Tokens of training.")
@click.option("--minutes", default=0.0, help="Stop after so many minutes (0: no limit).")
@click.option("--learning-rate", default=1e-4, show_default=True, help="Peak learning rate.")
@click.option("--held-out", default=0.1, show_default=True, help="Share of texts only measured on.")
@click.option("--seed", default=0, show_default=True)
@_text_options
@json_option
def distil(
    teacher: str,
    student: Path,
    out: Path,
    tokens: int,
    minutes: float,
    learning_rate: float,
    held_out: float,
    seed: int,
    data: str,
    alias: str | None,
    config_path: Path,
    as_json: bool,
) -> None:
    """Heal the pruned STUDENT by distillation from its TEACHER; run again after Ctrl-C to go on."""
    from understudy.compress import distill, single

    settings = distill.Settings(tokens=tokens, minutes=minutes, learning_rate=learning_rate, seed=seed)
    with _bars() as progress:
        job = single.HealJob(teacher, student, out, settings, held_out, _texts(data, alias, config_path))
        curve = single.heal_only(job, progress)
    if as_json:
        print_json(curve)
    else:
        first, best = curve.checks[0], min(c.kl for c in curve.checks)
        click.echo(
            f"held-out KL {first.kl:.4f} → {best:.4f} after {curve.points[-1].tokens:,} tokens → {out}"
        )


@click.command()
@click.argument("teacher", required=False)
@click.option("--out", type=OUT, required=True, help="Folder of the run: checkpoint/, report.json.")
@click.option("--params", default=None, help="Share to keep (0.75) or a count (108M).")
@click.option("--tokens", default=None, type=int, help="Tokens of healing.")
@click.option("--minutes", default=None, type=float, help="Stop healing after so many minutes.")
@_text_options
@json_option
def own(
    teacher: str | None,
    out: Path,
    params: str | None,
    tokens: int | None,
    minutes: float | None,
    data: str,
    alias: str | None,
    config_path: Path,
    as_json: bool,
) -> None:
    """Prune, heal, measure and save a student of TEACHER (default: the config's) in one resumable run."""
    from understudy.compress import recipe

    config = _config(config_path)
    settings = _settings(config, teacher, params, tokens, minutes)
    train, held_out = _chats(data, alias, config)
    job = recipe.OwnJob(
        teacher=settings.teacher,
        train=train,
        held_out=held_out,
        out=out,
        settings=settings,
        seed=config.evaluate.seed,
        root=Path() if teacher else Path(config.root),
    )
    with _bars() as progress:
        report = recipe.own(job, progress)
    if as_json:
        print_json(report)
        return
    click.echo(str(report.plan))
    click.echo(f"pruned: {report.before}\nhealed: {report.after}\n{report.checkpoint}")


@click.command()
@click.argument("teacher")
@click.argument("student")
@click.option("--text", required=True, type=FILE, help="JSONL of chats, or plain text.")
@click.option("--tokens", default=0, help="Measure on at most so many tokens (0: all).")
@json_option
def fidelity(teacher: str, student: str, text: Path, tokens: int, as_json: bool) -> None:
    """How far STUDENT is from TEACHER on a text: KL per token, perplexities, top-1 agreement."""
    from understudy.compress import single

    with _bars() as progress:
        found = single.compare(teacher, student, lambda t: _read(text, t), tokens, progress)
    print_json(found) if as_json else click.echo(str(found))


def _config(path: Path) -> Config:
    """The config; its defaults when nobody wrote one."""
    from understudy import config

    return config.load(path) if path.exists() or path != config.DEFAULT_PATH else config.Config()


def _settings(
    config: Config, teacher: str | None, params: str | None, tokens: int | None, minutes: float | None
) -> Own:
    import msgspec

    given = {"teacher": teacher, "params": params, "distil_tokens": tokens, "minutes": minutes}
    settings = msgspec.structs.replace(config.own, **{k: v for k, v in given.items() if v is not None})
    if not settings.teacher:
        raise InputError(
            "no teacher", expected="TEACHER, or teacher = … under [own]", next_step="understudy own --help"
        )
    return settings


def _texts(
    data: str, alias: str | None, config_path: Path
) -> Callable[[PreTrainedTokenizerBase], list[Document]]:
    """Texts of a command as a function of the tokenizer, which comes with the teacher."""

    def documents(tokenizer: PreTrainedTokenizerBase) -> list[Document]:
        from understudy.compress.corpus import encode_chat

        if data != "traffic":
            return _read(_existing(data), tokenizer)
        train, _ = _chats(data, alias, _config(config_path))
        return [encode_chat(tokenizer, chat) for chat in train]

    return documents


def _read(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    from understudy.compress.corpus import encode_chat, encode_text

    if path.suffix == ".jsonl":
        return [encode_chat(tokenizer, chat) for chat in _chats_of(path)]
    return [encode_text(tokenizer, text) for text in _text_of(path).split("\n\n") if text.strip()]


def _chats(data: str, alias: str | None, config: Config) -> tuple[list[Chat], list[Chat]]:
    """Chats to train on and chats held out: traffic split by prompt, a file by its lines' hashes."""
    if data != "traffic":
        return _split_file(_chats_of(_existing(data)), config.evaluate.held_out)
    from understudy.traffic import sample
    from understudy.traffic.store import open_store

    with open_store(config.store.url, Path(config.root)) as store:
        parts = sample.split(sample.exchanges(store, alias), config.evaluate.held_out)
    if not parts.train:
        raise InputError(
            "no recorded traffic to learn from",
            expected="chats recorded by the gateway",
            next_step="understudy up, or --data FILE.jsonl",
        )
    right = config.own.answers == "right"
    return sample.chats(parts.train, right=right), sample.chats(parts.held_out)


def _split_file(chats: list[Chat], held_out: float) -> tuple[list[Chat], list[Chat]]:
    from hashlib import sha256

    def fraction(chat: Chat) -> float:
        return int(sha256(json.dumps(chat[:-1]).encode()).hexdigest()[:13], 16) / 16**13

    train = [chat for chat in chats if fraction(chat) >= held_out]
    return train, [chat for chat in chats if fraction(chat) < held_out]


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise InputError(f"no file {name}", expected="traffic, or a file of chats (.jsonl) or text")
    return path


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from error


def _chats_of(path: Path) -> list[Chat]:
    """Chats of a JSONL file; raises InputError naming the first line that is none."""
    chats: list[Chat] = []
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if line.strip():
            chats.append(_chat(line, f"{path}:{number}"))
    return chats


def _chat(line: str, where: str) -> Chat:
    try:
        value: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg}") from error
    messages = cast(dict[str, object], value).get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: no messages", expected="a list of OpenAI messages or {messages: […]}")
    return cast("Chat", messages)


@contextmanager
def _bars() -> Generator[Progress]:
    """Progress on standard error: a bar per step with the time it still takes."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def show(step: str, done: int, total: int, note: str = "") -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total, note=note)
            bars.update(tasks[step], completed=done, total=total, note=note)

        yield show
