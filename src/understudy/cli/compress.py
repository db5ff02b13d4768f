"""Commands `prune`, `capture`, `distil`, `own` and `fidelity`."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from understudy.cli.options import config_option, json_option, print_json
from understudy.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from understudy.compress.answers import Sampled, Wanted
    from understudy.compress.capture import Captured
    from understudy.compress.corpus import Chat, Document
    from understudy.compress.importance import Score
    from understudy.compress.progress import Progress
    from understudy.config import Config, Own
    from understudy.endpoint import Endpoint
    from understudy.traffic.sample import Exchange, Split

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
@click.option("--latency", default=0.0, help="Tokens per second to reach on llama.cpp here, in F16.")
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
    latency: float,
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
        latency=latency,
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
            speed=_speed,
        )
        plan = single.prune_only(job, lambda p: click.echo(str(p), err=True), progress, dry_run=dry_run)
    print_json(plan) if as_json else click.echo(f"plan: {plan.parameters_after:,} parameters → {out}")


@click.command()
@click.argument("teacher")
@click.option("--out", type=OUT, required=True, help="Folder of the targets.")
@click.option(
    "--student",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Checkpoint whose tokens they are told in; needed where TEACHER's are others.",
)
@click.option(
    "--part", default="1/1", show_default=True, help="NUMBER/OF: this machine's share of the shards."
)
@click.option("--as-they-are", is_flag=True, help="Ask a vLLM endpoint of the texts, not for new answers.")
@click.option(
    "--ray", "address", default="", help="HOST:PORT, auto or local: a Ray cluster makes the shards."
)
@click.option("--yes", is_flag=True, help="Ask an endpoint without showing the cost first.")
@_text_options
@json_option
def capture(
    teacher: str,
    out: Path,
    student: Path | None,
    part: str,
    as_they_are: bool,
    address: str,
    yes: bool,
    data: str,
    alias: str | None,
    config_path: Path,
    as_json: bool,
) -> None:
    """Write down what TEACHER says of every text once, for any number of `distil --targets`.

    TEACHER is a model, or ENDPOINT/MODEL of the config that tells log-probabilities: then it answers the
    prompts anew, or, being a vLLM server with the student's tokenizer, is asked of the texts --as-they-are.
    Run again to go on; several machines share the work with --part, or a cluster with --ray, whose nodes must
    see TEACHER and the folder under the same names.
    """
    from understudy.compress.capture import part_of
    from understudy.compress.healing import CaptureJob, capture_only

    if address and (as_they_are or _is_endpoint(teacher, config_path)):
        raise InputError(f"--ray with the endpoint {teacher}", expected="a model whose weights are here")
    if as_they_are:
        texts = _texts(data, alias, config_path)
        done = _capture_prompted(teacher, out, student, yes, [texts], config_path)
    elif _is_endpoint(teacher, config_path):
        done = _capture_hosted(teacher, out, student, yes, data, alias, config_path)
    else:
        texts = _texts(data, alias, config_path)
        with _bars() as progress:
            job = CaptureJob(teacher, out, texts, _vocabulary, student, part_of(part), address)
            done = capture_only(job, progress)
    if as_json:
        print_json(done)
    else:
        each = done.bytes / max(done.tokens, 1)
        click.echo(
            f"{done.tokens:,} tokens in {done.made} new and {done.kept} old shards, "
            f"{each:.0f} bytes a token → {out}"
        )


@click.command()
@click.argument("teacher")
@click.argument("student", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=OUT, required=True, help="Folder of the healed checkpoint; its plot is OUT.svg.")
@click.option("--tokens", default=200_000, show_default=True, help="Tokens of training.")
@click.option("--minutes", default=0.0, help="Stop after so many minutes (0: no limit).")
@click.option("--learning-rate", default=3e-5, show_default=True, help="Peak learning rate.")
@click.option("--held-out", default=0.1, show_default=True, help="Share of texts only measured on.")
@click.option("--seed", default=0, show_default=True)
@click.option("--targets", type=OUT, default=None, help="Folder of `capture`: no teacher is loaded.")
@click.option("--generate", default=None, help="ENDPOINT/MODEL that answers the prompts anew first.")
@click.option("--samples", default=1, show_default=True, help="Answers to each prompt, with --generate.")
@click.option("--yes", is_flag=True, help="Don't ask whether the cost of an endpoint is all right.")
@click.option("--generic", type=FILE, default=None, help="Texts of nobody's traffic, mixed in.")
@click.option("--generic-share", default=0.25, show_default=True, help="Their share of every step.")
@click.option(
    "--divergence",
    type=click.Choice(["forward", "reverse", "jensen-shannon", "skew"]),
    default="forward",
    show_default=True,
)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--match", default=0.0, show_default=True, help="Weight of hidden-state matching.")
@click.option(
    "--on-policy", default=0.0, show_default=True, help="Share of the run on the student's answers."
)
@click.option("--lora", default=0, show_default=True, help="Train corrections of this rank only.")
@click.option("--states", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--resume", is_flag=True, help="Refuse to begin: only go on.")
@_text_options
@json_option
def distil(
    teacher: str,
    student: Path,
    out: Path,
    held_out: float,
    targets: Path | None,
    generate: str | None,
    samples: int,
    yes: bool,
    generic: Path | None,
    generic_share: float,
    resume: bool,
    data: str,
    alias: str | None,
    config_path: Path,
    as_json: bool,
    **recipe: Any,
) -> None:
    """Heal the pruned STUDENT by distillation from its TEACHER; run again after Ctrl-C to go on.

    TEACHER is a model, or ENDPOINT/MODEL of a vLLM server in the config, whose `prompt_logprobs` are asked
    first and kept in OUT.targets, or the word `recorded`: then only the answers in the texts are known, those
    of traffic without failures and near-duplicates. Under torchrun the same command uses every process.
    """
    from understudy.compress import distill, healing

    texts = _texts(data, alias, config_path)
    if generate is not None:
        texts = _generated(generate, samples, out, yes, data, alias, config_path)
    elif targets is not None and data == "traffic" and (targets / ANSWERED).exists():
        texts = _texts(str(targets / ANSWERED), None, config_path)
    elif teacher == healing.RECORDED and data == "traffic":
        texts = _harvested(alias, config_path)
    settings = distill.Settings(**recipe, generic=generic_share if generic else 0.0)
    mixed = partial(_read, generic) if generic else None
    if targets is None and _is_endpoint(teacher, config_path):
        targets = out.with_name(out.name + ".targets")
        every = [texts, mixed] if mixed else [texts]
        _capture_prompted(teacher, targets, student, yes, every, config_path)
    with _bars() as progress:
        job = healing.HealJob(
            teacher, student, out, settings, held_out, texts, mixed, targets=targets, resume=resume
        )
        curve = healing.heal_only(job, progress)
    if not _tells():
        return
    if as_json:
        print_json(curve)
        return
    for note in curve.notes:
        click.echo(note)
    first, best = curve.checks[0], min(c.kl for c in curve.checks)
    click.echo(f"held-out KL {first.kl:.4f} → {best:.4f} after {curve.points[-1].tokens:,} tokens → {out}")


@click.command()
@click.argument("teacher", required=False)
@click.option("--out", type=OUT, required=True, help="Folder of the run: checkpoint/, report.json.")
@click.option("--params", default=None, help="Share to keep (0.75) or a count (108M).")
@click.option("--tokens", default=None, type=int, help="Tokens of healing.")
@click.option("--minutes", default=None, type=float, help="Stop healing after so many minutes.")
@click.option("--baseline", default=None, help="Best model of that size off the shelf, to compare with.")
@_text_options
@json_option
def own(
    teacher: str | None,
    out: Path,
    params: str | None,
    tokens: int | None,
    minutes: float | None,
    baseline: str | None,
    data: str,
    alias: str | None,
    config_path: Path,
    as_json: bool,
) -> None:
    """Prune, heal, measure and save a student of TEACHER (default: the config's) in one resumable run."""
    from understudy.compress import recipe

    config = _config(config_path)
    given = {"teacher": teacher, "params": params, "distil_tokens": tokens, "minutes": minutes}
    settings = _settings(config, given | {"baseline": baseline})
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
    click.echo(f"pruned: {report.before}\nhealed: {report.after}\n{report.beside_baseline}")
    for note in report.notes:
        click.echo(note)
    click.echo(report.checkpoint)


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


ANSWERED = "answered.jsonl"
"""Beside a hosted teacher's targets: the chats they are of."""


def _is_endpoint(name: str, config_path: Path) -> bool:
    endpoint, slash, _ = name.partition("/")
    return bool(slash) and not Path(name).exists() and endpoint in _config(config_path).endpoints


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of every token, control tokens' names left empty."""
    from understudy.serve.token_bytes import piece

    added = cast(Any, tokenizer).added_tokens_decoder
    return [b"" if token in added else piece(tokenizer, token, added) for token in range(len(tokenizer))]


def _requests(data: str, alias: str | None, config: Config) -> list[dict[str, Any]]:
    """What to ask a teacher: the training side's prompts, as they were recorded."""
    from understudy.compress.answers import request_of

    if data != "traffic":
        return [request_of(chat) for chat in _chats_of(_existing(data))]
    return [request_of((), exchange.request) for exchange in _train_exchanges(alias, config)]


def _sampled(
    target: str,
    samples: int,
    cache: Path,
    yes: bool,
    data: str,
    alias: str | None,
    config_path: Path,
    *,
    logprobs: bool = False,
) -> tuple[list[Wanted], list[Sampled]]:
    """Answers of an endpoint, its cost said (and, on a terminal, agreed to) before anything is asked."""
    import asyncio

    from understudy.compress import answers
    from understudy.evaluate import trial

    config = _config(config_path)
    asked = answers.wanted(target, _requests(data, alias, config), samples, logprobs=logprobs)
    cost = answers.estimate(asked, cache, trial.price_of(config, target))
    click.echo(str(cost), err=True)
    if cost.answers > cost.cached and not yes:
        click.confirm("ask for them?", abort=True, err=True)

    async def ask(progress: Progress) -> list[Sampled]:
        async with trial.connect(config, target) as endpoint:
            paced = trial.paced(endpoint, config.evaluate)
            most = config.evaluate.concurrency
            return await answers.sample(paced, asked, cache, concurrency=most, progress=progress)

    with _bars() as progress:
        return asked, asyncio.run(ask(progress))


def _generated(
    target: str, samples: int, out: Path, yes: bool, data: str, alias: str | None, config_path: Path
) -> Callable[[PreTrainedTokenizerBase], list[Document]]:
    from understudy.compress import answers

    cache = out.with_name(out.name + ".answers.jsonl")
    chats = answers.chats_of(*_sampled(target, samples, cache, yes, data, alias, config_path))
    return partial(_encoded, chats)


def _encoded(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    from understudy.compress.corpus import encode_chat

    return [encode_chat(tokenizer, chat) for chat in chats]


def _capture_hosted(
    target: str, out: Path, student: Path | None, yes: bool, data: str, alias: str | None, config_path: Path
) -> Captured:
    from understudy.compress import answers, checkpoint, healing
    from understudy.compress.decoder import shape_of

    if student is None:
        raise InputError(f"{target} has no tokens of its own here", expected="--student CHECKPOINT")
    cache = out.with_name(out.name + ".answers.jsonl")
    asked, found = _sampled(target, 1, cache, yes, data, alias, config_path, logprobs=True)
    told = [one for one in found if one.logprobs and answers.chats_of(asked, [one])]
    if not told:
        raise InputError(
            f"{target} told no log-probabilities",
            expected="a model that honours `logprobs`",
            next_step=f"understudy distil recorded {student} --generate {target}: its texts alone",
        )
    own, chats = checkpoint.load(student), answers.chats_of(asked, told)
    documents = _encoded(chats, own.reader)
    hosted = answers.Hosted(documents, told, _vocabulary(own.tokenizer))
    done = healing.capture_hosted(
        target,
        own.tokenizer,
        shape_of(own.model).vocab,
        documents,
        hosted.told,
        out,
        answers.LIKELIEST + 1,
    )
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (out / ANSWERED).write_text("\n".join(lines) + "\n")
    return done


def _capture_prompted(
    target: str,
    out: Path,
    student: Path | None,
    yes: bool,
    texts: list[Callable[[PreTrainedTokenizerBase], list[Document]]],
    config_path: Path,
) -> Captured:
    """What a vLLM server says of texts, its cost said (and, on a terminal, agreed to) before it is asked."""
    from understudy.compress import checkpoint, healing
    from understudy.evaluate import trial
    from understudy.protocol import Usage

    if student is None:
        raise InputError(f"{target} has no tokens of its own here", expected="--student CHECKPOINT")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"{target} would be asked by every process of torchrun",
            expected="its targets",
            next_step=f"understudy capture {target} --as-they-are, then distil --targets",
        )
    config, own = _config(config_path), checkpoint.load(student)
    documents = [document for read in texts for document in read(own.reader)]
    count = sum(len(d.tokens) for d in documents)
    usd = trial.price_of(config, target)(Usage(prompt_tokens=count, completion_tokens=len(documents)))
    cost = "no price known" if usd is None else f"about ${usd:,.4g}"
    missing = healing.uncaptured(out, documents)
    click.echo(
        f"{target} is asked of {len(documents):,} texts ({missing:,} of them new): at most {count:,} prompt "
        f"tokens, {cost}",
        err=True,
    )
    if missing and not yes:
        click.confirm("ask for them?", abort=True, err=True)
    most = config.evaluate.concurrency

    @asynccontextmanager
    async def connect() -> AsyncGenerator[Endpoint]:
        async with trial.connect(config, target) as endpoint:
            yield trial.paced(endpoint, config.evaluate)

    with _bars() as progress:
        return healing.capture_prompted(target, own, documents, connect, out, most, progress)


def _harvested(alias: str | None, config_path: Path) -> Callable[[PreTrainedTokenizerBase], list[Document]]:
    """Recorded answers that are worth learning, and a line on what was left out."""
    from understudy.compress.harvest import Answered, harvest
    from understudy.traffic import sample

    config = _config(config_path)
    right = config.own.answers == "right"
    scored = [
        Answered(chat, 1.0 if right and exchange.expected is not None else _score(exchange))
        for exchange in _train_exchanges(alias, config)
        for chat in sample.chats([exchange], right=right)
    ]
    found = harvest(scored)
    click.echo(str(found), err=True)
    return partial(_encoded, found.chats)


def _score(exchange: Exchange) -> float | None:
    """How good a recorded answer was: by its grader where the right one is known, else by feedback."""
    from understudy.evaluate import grade

    if exchange.expected is not None:
        standard = grade.standard(exchange)
        return grade.grade(standard.grader, grade.reply_of(exchange.body), standard.expected)
    return min(exchange.grades.values()) if exchange.grades else None


def _train_exchanges(alias: str | None, config: Config) -> list[Exchange]:
    """Recorded calls on the training side of the split."""
    return _split_traffic(alias, config).train


def _speed(checkpoint: Path) -> float:
    """Tokens a second of a checkpoint on llama.cpp, in F16."""
    from understudy.serve.export import export_gguf
    from understudy.serve.speed import tokens_per_second

    return tokens_per_second(export_gguf(checkpoint, checkpoint / "f16.gguf", "f16").path)


def _config(path: Path) -> Config:
    """The config; its defaults when nobody wrote one."""
    from understudy import config

    return config.load(path) if path.exists() or path != config.DEFAULT_PATH else config.Config()


def _settings(config: Config, given: Mapping[str, object]) -> Own:
    """`[own]` with what the command line says instead."""
    import msgspec

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

    parts = _split_traffic(alias, config)
    right = config.own.answers == "right"
    return sample.chats(parts.train, right=right), sample.chats(parts.held_out)


def _split_traffic(alias: str | None, config: Config) -> Split:
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
    return parts


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
            chats.append(_beside(_chat(line, f"{path}:{number}"), path.parent))
    return chats


def _beside(chat: Chat, folder: Path) -> Chat:
    """The chat with relative paths of pictures taken from where its file lies."""
    for message in chat:
        content: object = message.get("content")
        for part in cast("list[object]", content) if isinstance(content, list) else []:
            picture = cast("dict[str, Any]", part).get("image_url") if isinstance(part, dict) else None
            if isinstance(picture, dict):
                url = str(cast("dict[str, Any]", picture).get("url") or "")
                if url and not url.startswith("data:") and "://" not in url:
                    picture["url"] = str((folder / url).absolute())
    return chat


def _chat(line: str, where: str) -> Chat:
    try:
        value: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg}") from error
    messages = cast(dict[str, object], value).get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: no messages", expected="a list of OpenAI messages or {messages: […]}")
    return cast("Chat", messages)


def _tells() -> bool:
    """Under torchrun the first process alone speaks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _bars() -> Generator[Progress]:
    """Progress on standard error: a bar per step with the time it still takes."""
    if not _tells():
        from understudy.compress.progress import silent

        yield silent
        return
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
