"""Pages from templates: everything is escaped unless it is markup that this room made itself.

It ignores what pages show; a name that a template asks for and that is not there is an error, not a blank.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from understudy.dashboard import formats
from understudy.traffic.redact import BUILT_IN

_NAMES = "|".join(rule.name for rule in BUILT_IN)
_REDACTED = re.compile(rf"\[(?:(?:{_NAMES})(?::[0-9a-f]{{8}})?|[A-Za-z_]\w{{0,30}}:[0-9a-f]{{8}})\]")
"""What `traffic.redact` leaves in place of what it took out."""
_MARK = Markup("<mark>{}</mark>")


def redactions(text: str) -> Markup:
    """The text, escaped, with what was redacted marked as such."""
    parts: list[Markup] = []
    end = 0
    for found in _REDACTED.finditer(text):
        parts += [escape(text[end : found.start()]), _MARK.format(found[0])]
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


_FILTERS = (
    formats.count,
    formats.short,
    formats.usd,
    formats.percent,
    formats.seconds,
    formats.moment,
    formats.iso,
    formats.day,
    formats.calendar_day,
    formats.ago,
    formats.signed,
    formats.evidence,
    redactions,
)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast(dict[str, Any], environment.filters)
    filters.update({function.__name__: function for function in _FILTERS})
    return environment


def render(template: str, **values: object) -> str:
    """The text of a page."""
    return _environment().get_template(template).render(**values)
