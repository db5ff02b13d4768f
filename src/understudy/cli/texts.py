"""Where a command's texts come from: recorded traffic, a file of chats, or running text.

It ignores what the texts are for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click

from understudy.cli.options import config_option
from understudy.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from understudy.compress.corpus import Chat, Document
    from understudy.config import Config
    from understudy.traffic.sample import Exchange, Split

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
OUT = click.Path(path_type=Path, file_okay=False)


def text_options(command: F) -> F:
    """Where texts come from."""
    data = click.option(
        "--data",
        default="traffic",
        show_default=True,
        help="traffic, or a file: JSONL of chats ({messages: […]} or […]) or plain text.",
    )
    alias = click.option("--alias", default=None, help="Only this alias's traffic.")
    return config_option(data(alias(command)))


def config_at(path: Path) -> Config:
    """The config; its defaults when nobody wrote one."""
    from understudy import config

    return config.load(path) if path.exists() or path != config.DEFAULT_PATH else config.Config()


def texts_of(
    data: str, alias: str | None, config_path: Path
) -> Callable[[PreTrainedTokenizerBase], list[Document]]:
    """Texts of a command as a function of the tokenizer, which comes with the teacher."""

    def documents(tokenizer: PreTrainedTokenizerBase) -> list[Document]:
        from understudy.compress.corpus import encode_chat

        if data != "traffic":
            return read(existing(data), tokenizer)
        train, _ = split_chats(data, alias, config_at(config_path))
        return [encode_chat(tokenizer, chat) for chat in train]

    return documents


class Parts(NamedTuple):
    """What a file holds: one of both is empty."""

    chats: list[Chat]
    texts: list[str]


def parts_of(path: Path) -> Parts:
    """Chats of a JSONL file, paragraphs of any other."""
    if path.suffix == ".jsonl":
        return Parts(chats_of(path), [])
    return Parts([], [text for text in _text_of(path).split("\n\n") if text.strip()])


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """A file's chats or paragraphs as tokens."""
    from understudy.compress.corpus import encode_chat, encode_text

    chats, texts = parts_of(path)
    return [encode_chat(tokenizer, chat) for chat in chats] + [encode_text(tokenizer, t) for t in texts]


def encoded(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    from understudy.compress.corpus import encode_chat

    return [encode_chat(tokenizer, chat) for chat in chats]


def split_chats(data: str, alias: str | None, config: Config) -> tuple[list[Chat], list[Chat]]:
    """Chats to train on and chats held out: traffic split by prompt, a file by its lines' hashes."""
    if data != "traffic":
        return _split_file(chats_of(existing(data)), config.evaluate.held_out)
    from understudy.traffic import sample

    parts = _split_traffic(alias, config)
    right = config.own.answers == "right"
    return sample.chats(parts.train, right=right), sample.chats(parts.held_out)


def train_exchanges(alias: str | None, config: Config) -> list[Exchange]:
    """Recorded calls on the training side of the split."""
    return _split_traffic(alias, config).train


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


def existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise InputError(f"no file {name}", expected="traffic, or a file of chats (.jsonl) or text")
    return path


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from error


def chats_of(path: Path) -> list[Chat]:
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
