"""Commands `prune`, `own` and `fidelity`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from understudy.cli.bars import bars
from understudy.cli.options import config_option, json_option, print_json
from understudy.cli.texts import (
    FILE,
    OUT,
    Parts,
    config_at,
    parts_of,
    read,
    split_chats,
    text_options,
    texts_of,
)
from understudy.errors import InputError

if TYPE_CHECKING:
    from understudy.compress.importance import Score
    from understudy.config import Config, Own

SCORES = ("obs", "output", "magnitude", "wanda-sp", "minitron", "flap", "taylor")
SHAPES = ("uniform", "per-layer")


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
@click.option("--cross-layers", default=0, help="Those of them that read pictures by cross-attention.")
@click.option("--cross-heads", default=0, help="Query heads of these, whole KV groups.")
@click.option("--score", type=click.Choice(SCORES), default="obs", show_default=True, help="Of FFN channels.")
@click.option("--experts", default=0, help="Experts per layer: a mixture stays one.  [default: made dense]")
@click.option(
    "--shape",
    type=click.Choice(SHAPES),
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
    cross_layers: int,
    cross_heads: int,
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
        cross_layers=cross_layers,
        cross_heads=cross_heads,
        shape=shape,
        experts=experts,
        latency=latency,
    )
    with bars() as progress:
        job = single.PruneJob(
            teacher,
            out,
            sizes,
            plan_file,
            texts_of(calibration, alias, config_path),
            tokens,
            Method(score=score),
            speed=_speed,
        )
        plan = single.prune_only(job, lambda p: click.echo(str(p), err=True), progress, dry_run=dry_run)
    print_json(plan) if as_json else click.echo(f"plan: {plan.parameters_after:,} parameters → {out}")


@click.command()
@click.argument("teacher", required=False)
@click.option("--out", type=OUT, required=True, help="Folder of the run: checkpoint/, report.json.")
@click.option("--params", default=None, help="Share to keep (0.75) or a count (108M).")
@click.option(
    "--shape",
    type=click.Choice(SHAPES),
    default=None,
    help="per-layer: FFN sizes that differ.  [default: uniform]",
)
@click.option("--tokens", default=None, type=int, help="Tokens of healing.")
@click.option("--minutes", default=None, type=float, help="Stop healing after so many minutes.")
@click.option("--lora", default=None, type=int, help="Train corrections of this rank only.  [default: 0]")
@click.option("--baseline", default=None, help="Best model of that size off the shelf, to compare with.")
@click.option("--generic", type=FILE, default=None, help="Texts of nobody's traffic, mixed in.")
@click.option("--generic-share", default=0.25, show_default=True, help="Their share of every step.")
@text_options
@json_option
def own(
    teacher: str | None,
    out: Path,
    params: str | None,
    shape: Literal["uniform", "per-layer"] | None,
    tokens: int | None,
    minutes: float | None,
    lora: int | None,
    baseline: str | None,
    generic: Path | None,
    generic_share: float,
    data: str,
    alias: str | None,
    config_path: Path,
    as_json: bool,
) -> None:
    """Prune, heal, measure and save a student of TEACHER (default: the config's) in one resumable run."""
    from understudy.compress import recipe

    config = config_at(config_path)
    given = {"teacher": teacher, "params": params, "distil_tokens": tokens, "minutes": minutes}
    settings = _settings(config, given | {"shape": shape, "lora": lora, "baseline": baseline})
    train, held_out = split_chats(data, alias, config)
    mixed = parts_of(generic) if generic else Parts([], [])
    job = recipe.OwnJob(
        teacher=settings.teacher,
        train=train,
        held_out=held_out,
        out=out,
        settings=settings,
        seed=config.evaluate.seed,
        generic=mixed.chats,
        generic_text=mixed.texts,
        generic_share=generic_share,
        root=Path() if teacher else Path(config.root),
    )
    with bars() as progress:
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

    with bars() as progress:
        found = single.compare(teacher, student, lambda t: read(text, t), tokens, progress)
    print_json(found) if as_json else click.echo(str(found))


def _speed(checkpoint: Path) -> float:
    """Tokens a second of a checkpoint on llama.cpp, in F16."""
    from understudy.serve.export import export_gguf
    from understudy.serve.speed import tokens_per_second

    return tokens_per_second(export_gguf(checkpoint, checkpoint / "f16.gguf", "f16").path)


def _settings(config: Config, given: Mapping[str, object]) -> Own:
    """`[own]` with what the command line says instead."""
    import msgspec

    settings = msgspec.structs.replace(config.own, **{k: v for k, v in given.items() if v is not None})
    if not settings.teacher:
        raise InputError(
            "no teacher", expected="TEACHER, or teacher = … under [own]", next_step="understudy own --help"
        )
    return settings
