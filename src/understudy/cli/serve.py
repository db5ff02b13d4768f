"""Commands `serve` and `export`."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from understudy import config as configuration
from understudy.cli.options import config_option, json_option, print_json
from understudy.errors import InputError


@click.command()
@config_option
@click.option("--model", "models", multiple=True, metavar="NAME=PATH", help="A model to serve; repeatable.")
@click.option("--listen", metavar="HOST:PORT", help="Instead of [serve] listen; port 0 takes a free one.")
@click.option(
    "--threads", type=click.IntRange(min=0), help="CPU threads for one model; 0: the cores at hand."
)
@json_option
def serve(
    config_path: Path, models: tuple[str, ...], listen: str | None, threads: int | None, as_json: bool
) -> None:
    """Serve GGUF files and checkpoint folders on the OpenAI routes.

    Models come from [serve.models] of the config and from --model; with --model no config file is needed.
    """
    config = _config(config_path, bool(models))
    named = dict(_named(model) for model in models)
    settings = msgspec.structs.replace(
        config.serve,
        models={**config.serve.models, **named},
        listen=listen or config.serve.listen,
        threads=config.serve.threads if threads is None else threads,
    )
    if not settings.models:
        raise InputError(
            "no model to serve",
            expected="[serve.models] in the config, or --model NAME=PATH",
            next_step="understudy serve --model student=student.gguf",
        )
    from understudy.serve import server

    server.serve(settings, Path(config.root), lambda url: _ready(url, list(settings.models), as_json))


def _config(path: Path, optional: bool) -> configuration.Config:
    if optional and not path.exists() and path == configuration.DEFAULT_PATH:
        return configuration.Config()
    return configuration.load(path)


def _named(model: str) -> tuple[str, str]:
    name, _, path = model.partition("=")
    if not name or not path:
        raise InputError(f"--model {model!r}", expected="NAME=PATH, e.g. student=student.gguf")
    # relative to where the user stands, unlike a path in the config
    return name, path if path.startswith("package:") else str(Path(path).absolute())


def _ready(url: str, models: list[str], as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode({"url": url, "models": models}).decode())
    else:
        click.echo(f"serving {', '.join(models)} at {url}")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The GGUF file.")
@click.option(
    "--kind",
    type=click.Choice(("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")),
    default="f16",
    show_default=True,
    help="Type of the weight matrices.",
)
@json_option
def export(checkpoint: Path, out: Path, kind: str, as_json: bool) -> None:
    """Write a checkpoint folder as one GGUF file."""
    from understudy.serve.export import export_gguf

    report = export_gguf(checkpoint, out, kind)
    if as_json:
        print_json(report._asdict())
    else:
        click.echo(
            f"{report.path}: {report.architecture} {report.kind}, {report.parameters:,} parameters, "
            f"{report.bytes / 1e6:.1f} MB, context {report.context}, in {report.seconds:.1f} s"
        )
