"""Command `capture`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli.asking import ANSWERED, capture_prompted, is_endpoint, sampled, vocabulary
from understudy.cli.bars import bars
from understudy.cli.options import json_option, print_json
from understudy.cli.texts import OUT, encoded, text_options, texts_of
from understudy.errors import InputError

if TYPE_CHECKING:
    from understudy.compress.capture import Captured


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
@click.option(
    "--shard-tokens",
    type=click.IntRange(1),
    default=1 << 18,
    show_default=True,
    help="Targets in a file, and so in one errand of a cluster's worker.",
)
@click.option("--as-they-are", is_flag=True, help="Ask a vLLM endpoint of the texts, not for new answers.")
@click.option(
    "--ray", "address", default="", help="HOST:PORT, auto or local: a Ray cluster makes the shards, or asks."
)
@click.option("--yes", is_flag=True, help="Ask an endpoint without showing the cost first.")
@text_options
@json_option
def capture(
    teacher: str,
    out: Path,
    student: Path | None,
    part: str,
    shard_tokens: int,
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

    if as_they_are:
        texts = texts_of(data, alias, config_path)
        done = capture_prompted(teacher, out, student, yes, [texts], config_path, address)
    elif is_endpoint(teacher, config_path):
        done = _capture_hosted(teacher, out, student, yes, data, alias, config_path, address)
    else:
        texts = texts_of(data, alias, config_path)
        with bars() as progress:
            job = CaptureJob(teacher, out, texts, vocabulary, student, part_of(part), address, shard_tokens)
            done = capture_only(job, progress)
    if as_json:
        print_json(done)
    else:
        each = done.bytes / max(done.tokens, 1)
        click.echo(
            f"{done.tokens:,} tokens in {done.made} new and {done.kept} old shards, "
            f"{each:.0f} bytes a token → {out}"
        )


def _capture_hosted(
    target: str,
    out: Path,
    student: Path | None,
    yes: bool,
    data: str,
    alias: str | None,
    config_path: Path,
    address: str,
) -> Captured:
    from understudy.compress import answers, checkpoint, healing
    from understudy.compress.decoder import shape_of

    if student is None:
        raise InputError(f"{target} has no tokens of its own here", expected="--student CHECKPOINT")
    cache = out.with_name(out.name + ".answers.jsonl")
    asked, found = sampled(target, 1, cache, yes, data, alias, config_path, logprobs=True, address=address)
    told = [one for one in found if one.logprobs and answers.chats_of(asked, [one])]
    if not told:
        raise InputError(
            f"{target} told no log-probabilities",
            expected="a model that honours `logprobs`",
            next_step=f"understudy distil recorded {student} --generate {target}: its texts alone",
        )
    own, chats = checkpoint.load(student), answers.chats_of(asked, told)
    documents = encoded(chats, own.reader)
    hosted = answers.Hosted(documents, told, vocabulary(own.tokenizer))
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
