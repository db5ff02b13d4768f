"""`understudy init`: write a config in which every field is explained.

The explanations are the fields' own docstrings in config.py, so the file can't drift from the code.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import cast

import click
import msgspec

from understudy import config
from understudy.cli.options import json_option, print_json
from understudy.errors import InputError

_EXAMPLES: dict[type[config.Section], tuple[str, dict[str, object]]] = {
    config.Endpoint: (
        "endpoints.openai",
        {"base_url": "https://api.openai.com/v1", "api_key": "env:OPENAI_API_KEY"},
    ),
    config.Alias: ("aliases.assistant", {"model": "openai/gpt-4.1"}),
}
_OTHERS = """
# Anthropic's and Gemini's own APIs; applications go on speaking what they speak. Take the # away to use them:
# [endpoints.anthropic]
# kind = "anthropic"
# base_url = "https://api.anthropic.com/v1"
# api_key = "env:ANTHROPIC_API_KEY"
# default = { max_tokens = 8192 }
#
# [endpoints.gemini]
# kind = "gemini"
# base_url = "https://generativelanguage.googleapis.com/v1beta"
# api_key = "env:GEMINI_API_KEY"
# drop = ["user"]
#
# [aliases.claude]
# model = "anthropic/claude-sonnet-4-5"
# fallback = ["gemini/gemini-2.5-pro", "openai/gpt-4.1"]
"""
_ORDER: tuple[tuple[str, type[config.Section]], ...] = (
    ("gateway", config.Gateway),
    ("store", config.Store),
    ("endpoints.openai", config.Endpoint),
    ("aliases.assistant", config.Alias),
    ("redact", config.Redact),
    ("telemetry", config.Telemetry),
    ("catalog", config.Catalog),
    ("serve", config.Serve),
    ("own", config.Own),
    ("evaluate", config.Evaluate),
    ("rollout", config.Rollout),
    ("dashboard", config.Dashboard),
    ("drill", config.Drill),
)


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False), default=Path("understudy.toml"))
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@json_option
def init(path: Path, force: bool, as_json: bool) -> None:
    """Write an understudy.toml with every field explained."""
    if path.exists() and not force:
        raise InputError(
            f"{path} is there already", expected="a new file", next_step=f"understudy init {path} --force"
        )
    path.write_text(template())
    if as_json:
        print_json({"path": path})
    else:
        click.echo(f"wrote {path}; next: set your key (export OPENAI_API_KEY=…), then `understudy up`")


def template() -> str:
    """The text of a fresh config: what must be set stands as a line, every default as a comment."""
    head = "# Understudy's config. Lines behind # show defaults.\n"
    sections = [_section_text(name, kind) for name, kind in _ORDER]
    place = next(n for n, (_, kind) in enumerate(_ORDER) if kind is config.Alias) + 1
    return head + "\n".join([*sections[:place], _OTHERS, *sections[place:]])


def _section_text(name: str, kind: type[config.Section]) -> str:
    values = _EXAMPLES.get(kind, ("", {}))[1]
    documents = field_documents(kind)
    lines = [f"\n[{name}]"]
    for field in msgspec.structs.fields(kind):
        lines.append(f"# {' '.join(documents[field.name].split())}")
        if field.name in values:
            lines.append(f"{field.name} = {_toml(values[field.name])}")
        else:
            default = [] if field.default is msgspec.NODEFAULT else field.default
            if field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            lines.append(f"# {field.name} = {_toml(default)}")
    return "\n".join(lines) + "\n"


def field_documents(kind: type[config.Section]) -> dict[str, str]:
    """Field name -> the docstring beneath it in config.py."""
    tree = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, document in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(document, ast.Expr)
            and isinstance(document.value, ast.Constant)
        ):
            found[field.target.id] = str(document.value.value)
    return found


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        inner = ", ".join(f"{name} = {_toml(v)}" for name, v in cast(dict[str, object], value).items())
        return f"{{ {inner} }}" if inner else "{}"
    return msgspec.json.encode(value).decode()
