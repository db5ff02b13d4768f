"""Command `distil`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from understudy.cli.asking import ANSWERED, capture_prompted, is_endpoint, once, sampled, vocabulary
from understudy.cli.bars import bars, tells
from understudy.cli.options import json_option, print_json
from understudy.cli.texts import FILE, OUT, config_at, encoded, read, text_options, texts_of, train_exchanges
from understudy.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from understudy.compress.corpus import Document
    from understudy.traffic.sample import Exchange


@click.command()
@click.argument("teacher")
@click.argument("student", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=OUT, required=True, help="Folder of the healed checkpoint; its plot is OUT.svg.")
@click.option("--tokens", default=200_000, show_default=True, help="Tokens of training.")
@click.option("--minutes", default=0.0, help="Stop after so many minutes (0: no limit).")
@click.option("--learning-rate", default=0.0, help="Peak learning rate (0: by the student's distance).")
@click.option("--held-out", default=0.1, show_default=True, help="Share of texts only measured on.")
@click.option("--seed", default=0, show_default=True)
@click.option("--targets", type=OUT, default=None, help="Folder of `capture`: no teacher is loaded.")
@click.option("--generate", default=None, help="ENDPOINT/MODEL that answers the prompts anew first.")
@click.option("--samples", default=1, show_default=True, help="Answers to each prompt, with --generate.")
@click.option("--ray", "address", default="", help="HOST:PORT, auto or local: a Ray cluster asks.")
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
@text_options
@json_option
def distil(
    teacher: str,
    student: Path,
    out: Path,
    held_out: float,
    targets: Path | None,
    generate: str | None,
    samples: int,
    address: str,
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
    of traffic without failures and near-duplicates. Under torchrun the same command uses every process. With
    --ray a cluster asks the endpoints, and makes a model's targets in OUT.targets, as `capture --ray` does.
    """
    from understudy.compress import distill, healing

    if address and generate is None and (targets is not None or teacher == healing.RECORDED):
        raise InputError(
            f"--ray {address} with nothing to ask of it",
            expected="--generate ENDPOINT/MODEL, or a TEACHER without --targets",
        )
    texts = texts_of(data, alias, config_path)
    if generate is not None:
        texts = _generated(generate, samples, out, yes, data, alias, config_path, address)
    elif targets is not None and data == "traffic" and (targets / ANSWERED).exists():
        texts = texts_of(str(targets / ANSWERED), None, config_path)
    elif teacher == healing.RECORDED and data == "traffic":
        texts = _harvested(alias, config_path)
    settings = distill.Settings(**recipe, generic=generic_share if generic else 0.0)
    mixed = partial(read, generic) if generic else None
    if targets is None and teacher != healing.RECORDED:
        every = [texts, mixed] if mixed else [texts]
        beside = out.with_name(out.name + ".targets")
        if is_endpoint(teacher, config_path):
            targets = beside
            capture_prompted(teacher, targets, student, yes, every, config_path, address)
        elif address:
            targets = beside
            _capture_there(teacher, targets, student, every, address)
    with bars() as progress:
        job = healing.HealJob(
            teacher, student, out, settings, held_out, texts, mixed, targets=targets, resume=resume
        )
        curve = healing.heal_only(job, progress)
    if not tells():
        return
    if as_json:
        print_json(curve)
        return
    for note in curve.notes:
        click.echo(note)
    first, kept = curve.checks[0], curve.checks[curve.best]
    click.echo(f"held-out KL {first.kl:.4f} → {kept.kl:.4f} after {curve.points[-1].tokens:,} tokens → {out}")


def _generated(
    target: str,
    samples: int,
    out: Path,
    yes: bool,
    data: str,
    alias: str | None,
    config_path: Path,
    address: str,
) -> Callable[[PreTrainedTokenizerBase], list[Document]]:
    from understudy.compress import answers

    cache = out.with_name(out.name + ".answers.jsonl")
    found = sampled(target, samples, cache, yes, data, alias, config_path, address=address)
    chats = answers.chats_of(*found)
    return partial(encoded, chats)


def _capture_there(
    teacher: str,
    out: Path,
    student: Path,
    texts: list[Callable[[PreTrainedTokenizerBase], list[Document]]],
    address: str,
) -> None:
    """An open teacher's targets of all texts, by the cluster at ``address``."""
    from understudy.compress.healing import CaptureJob, capture_only

    once(teacher, f"understudy capture {teacher} --ray {address}, then distil --targets")

    def every(tokenizer: PreTrainedTokenizerBase) -> list[Document]:
        return [document for read in texts for document in read(tokenizer)]

    with bars() as progress:
        capture_only(CaptureJob(teacher, out, every, vocabulary, student, ray=address), progress)


def _harvested(alias: str | None, config_path: Path) -> Callable[[PreTrainedTokenizerBase], list[Document]]:
    """Recorded answers that are worth learning, and a line on what was left out."""
    from understudy.compress.harvest import Answered, harvest
    from understudy.traffic import sample

    config = config_at(config_path)
    right = config.own.answers == "right"
    scored = [
        Answered(chat, 1.0 if right and exchange.expected is not None else _score(exchange))
        for exchange in train_exchanges(alias, config)
        for chat in sample.chats([exchange], right=right)
    ]
    found = harvest(scored)
    click.echo(str(found), err=True)
    return partial(encoded, found.chats)


def _score(exchange: Exchange) -> float | None:
    """How good a recorded answer was: by its grader where the right one is known, else by feedback."""
    from understudy.evaluate import grade

    if exchange.expected is not None:
        standard = grade.standard(exchange)
        return grade.grade(standard.grader, grade.reply_of(exchange.body), standard.expected)
    return min(exchange.grades.values()) if exchange.grades else None
