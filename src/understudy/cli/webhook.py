"""The webhook of `[rollout]`: told of every change of a route, whoever made it.

It ignores why a route changed; one that cannot be told changes nothing back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from understudy import config as configuration
from understudy.cli.options import say
from understudy.errors import UserError

if TYPE_CHECKING:
    from understudy.config import Config
    from understudy.traffic.routes import Route


def tell(config: Config, route: Route, waits_for: Sequence[str] = ()) -> None:
    """POST a route as it is now, where the config names somebody to tell; a failure is told on standard
    error."""
    if config.rollout is None or not config.rollout.webhook:
        return
    from understudy.catalog.notify import send

    body = {"source": "understudy rollout", "route": route._asdict(), "waits_for": list(waits_for)}
    try:
        send(configuration.resolve_secret(config.rollout.webhook, Path(config.root)), body)
    except UserError as error:  # what was done is done, whoever could not be told
        say(f"webhook: {error}", err=True)
