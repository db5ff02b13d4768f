"""The `understudy` command: which file holds which command, and how errors leave the program.

Command files are imported when their command is called, so `--help` stays fast and imports no room.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import cast

import click

from understudy.errors import UnderstudyError

# command -> (file under understudy.cli, one line of help); the attribute has the command's name
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("init", "Write an understudy.toml with every field explained."),
    "up": ("gateway", "Run the gateway: route, stream and record."),
    "keys": ("keys", "Make, limit, list and revoke the keys that callers show to the gateway."),
    "serve": ("serve", "Serve models of your own on the OpenAI routes."),
    "traffic": ("traffic", "Import, show and export recorded traffic."),
    "models": ("catalog", "What models exist, can do, cost, and when they retire."),
    "watch": ("catalog", "Which of your models are dying, when, and what hangs on them."),
    "plan": ("catalog", "What could take over, ranked on your own traffic."),
    "prune": ("compress", "Cut heads and feed-forward channels out of a model."),
    "capture": ("capture", "Write down once what a teacher says, for any number of distillations."),
    "distil": ("distil", "Heal a pruned model by distillation from its teacher."),
    "own": ("compress", "Prune, distil, measure and export in one resumable run."),
    "fidelity": ("compress", "How far a student is from its teacher on a text."),
    "export": ("serve", "Write a checkpoint as GGUF."),
    "evaluate": ("evaluate", "Prove a candidate against the incumbent."),
    "label": ("label", "Say which of two answers is better, to calibrate a judge."),
    "verify": ("evaluate", "Recompute a certificate from its evidence."),
    "drill": ("drill", "Rehearse a whole retirement, ending in a certificate."),
    "rollout": ("rollout", "Move an alias to a candidate, or back."),
    "dashboard": ("dashboard", "Show traffic, plans, evaluations and rollouts in a browser."),
    "version": ("version", "Print the version."),
}


class _LazyGroup(click.Group):
    """A group whose commands are imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"understudy.cli.{COMMANDS[cmd_name][0]}")
        return cast(click.Command, getattr(module, cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Understudy: when the model you depend on is retired, the replacement is ready."""


def run() -> None:
    """Entry point: user errors print without a traceback and exit 2; a bug keeps its traceback."""
    try:
        main.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except UnderstudyError as error:
        from understudy.cli.options import say  # it needs msgspec, which `--help` does without

        say(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\ninterrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
