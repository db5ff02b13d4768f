"""Command `up`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import msgspec

from understudy import config as configuration
from understudy.cli.options import config_option, json_option


@click.command()
@config_option
@click.option("--listen", metavar="HOST:PORT", help="Instead of [gateway] listen; port 0 takes a free one.")
@json_option
def up(config_path: Path, listen: str | None, as_json: bool) -> None:
    """Run the gateway: route, stream and record, until Ctrl-C; with a [dashboard], its pages as well.

    SIGHUP has the config read again: calls in flight and open connections stay. With --json one line of JSON
    says when it listens, and where.
    """
    read = partial(_load, config_path, listen)
    config = read()
    from understudy.gateway import processes

    with _dashboard(config, config_path) as pages, _controller(config, config_path):
        processes.up(read, ready=lambda url: _say(config, url, pages, as_json))


def _load(path: Path, listen: str | None) -> configuration.Config:
    config = configuration.load(path)
    if not listen:
        return config
    gateway = msgspec.structs.replace(config.gateway, listen=listen)
    return msgspec.structs.replace(config, gateway=gateway)


@contextmanager
def _dashboard(config: configuration.Config, config_path: Path) -> Generator[str]:
    """The dashboard beside the block, where the config has one; yields its address, or nothing."""
    if config.dashboard is None:
        yield ""
        return
    from understudy.child import running

    # until the gateway hears signals itself, being told to stop must still end the child
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments = ["dashboard", "--config", str(config_path)]
    with running("dashboard", arguments, config.path("dashboard.log")) as pages:
        yield str(pages["url"])


@contextmanager
def _controller(config: configuration.Config, config_path: Path) -> Generator[None]:
    """Whoever takes trials through their course beside the block, where the config has a [rollout]; one that
    ends is started again."""
    if config.rollout is None:
        yield
        return
    from understudy.child import kept_running

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    arguments = ["rollout", "run", "--config", str(config_path)]
    with kept_running("rollout run", arguments, config.path("rollout.log")):
        yield


def _say(config: configuration.Config, url: str, pages: str, as_json: bool) -> None:
    aliases = sorted(config.aliases)
    if as_json:
        shown = {"dashboard": pages} if pages else {}
        click.echo(json.dumps({"url": url, "aliases": aliases, "pid": os.getpid(), **shown}))
        return
    model = aliases[0] if aliases else "ENDPOINT/MODEL"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]})
    click.echo(f"listening on {url}; aliases: {', '.join(aliases) or 'none'}; Ctrl-C to stop")
    click.echo(f'  OpenAI(base_url="{url}", api_key="unused")')
    click.echo(f"  curl {url}/chat/completions -d '{body}'")
    if pages:
        click.echo(f"  dashboard at {pages}")
