"""Bench of a student that sees: a tiny model trained on easy-VQA, then pruned, healed and asked again.

Prints Markdown. The teacher is an Idefics3 of under a million parameters, made by transformers and trained
here from nothing on the wheel easy-vqa (drawn shapes, 64 x 64 pixels, questions with one-word answers) until
it answers well; 30% of its language parameters are then taken by the recipe of `understudy own`, from chats
as a gateway records them, pictures as data URLs. Accuracy is on pictures that were in nobody's training. It
ignores speed. By default only colours are asked for, in a CPU-minute; `--about '' --steps 1500 --pictures 0`
trains on every kind of question.
"""

from __future__ import annotations

import argparse
import base64
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional

from understudy.compress import checkpoint, recipe
from understudy.compress.corpus import Chat, Document, batches, encode_chat, pack
from understudy.compress.decoder import outside_weights, states_of
from understudy.config import Own

MARKS = (
    *("<unk>", "<s>", "</s>", "<image>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
PICTURES = 32
"""Pictures in a training step, each with as many questions as `QUESTIONS`."""
QUESTIONS = 6


class Question(NamedTuple):
    text: str
    answer: str
    picture: Path

    @property
    def chat(self) -> Chat:
        """As a gateway would have recorded it."""
        url = "data:image/png;base64," + base64.b64encode(self.picture.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.text}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": self.answer}]


def questions(part: str) -> list[Question]:
    """`train` or `test`, grouped by picture in a shuffled order that follows from no clock."""
    if find_spec("easy_vqa") is None:
        sys.exit("the wheel easy-vqa is not installed: pip install easy-vqa")
    import easy_vqa

    texts, answers, pictures = getattr(easy_vqa, f"get_{part}_questions")()
    paths = getattr(easy_vqa, f"get_{part}_image_paths")()
    every = [
        Question(text.replace("?", ""), answer, Path(paths[picture]))
        for text, answer, picture in zip(texts, answers, pictures, strict=True)
    ]
    random.Random(0).shuffle(every)
    return every


def processor_of(texts: list[str]) -> Any:
    """Idefics3's own processor, with one token per word."""
    import transformers as tf

    words = sorted({word for text in texts for word in text.split()} | {"user", "assistant"})
    numbers = {word: number for number, word in enumerate((*MARKS, *words))}
    core = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=list(MARKS[3:]),
    )
    eyes = tf.Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
    )
    return tf.Idefics3Processor(eyes, tokenizer, image_seq_len=16, chat_template=TEMPLATE)


def new_model(processor: Any, seed: int) -> Any:
    import transformers as tf

    torch.manual_seed(seed)
    eyes = {
        "model_type": "idefics3_vision",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    }
    text = tf.LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    number = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = tf.Idefics3Config(
        vision_config=eyes, text_config=text, image_token_id=number, scale_factor=2, pad_token_id=2
    )
    return tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


class Shown(NamedTuple):
    """A picture's tensor and its questions as documents."""

    pixels: torch.Tensor
    asked: list[Document]


def encoded(processor: Any, asked: list[Question]) -> list[Shown]:
    """Questions by picture; a picture is processed once."""
    by_picture: dict[Path, list[Question]] = {}
    for question in asked:
        by_picture.setdefault(question.picture, []).append(question)
    shown: list[Shown] = []
    for group in by_picture.values():
        documents = [encode_chat(processor, question.chat) for question in group]
        shown.append(Shown(documents[0].media.tensors()["pixel_values"], documents))
    return shown


def steps(shown: list[Shown], count: int, seed: int) -> Iterator[list[tuple[Shown, list[Document]]]]:
    """Pictures with some of their questions, epochs in different orders."""
    order = random.Random(seed)
    while True:
        items = shown[:]
        order.shuffle(items)
        for start in range(0, len(items) - PICTURES + 1, PICTURES):
            if count == 0:
                return
            count -= 1
            yield [
                (one, order.sample(one.asked, min(QUESTIONS, len(one.asked))))
                for one in items[start : start + PICTURES]
            ]


def train(model: Any, shown: list[Shown], count: int) -> None:
    """Cross-entropy on the answers, AdamW, cosine to zero; a picture passes the tower once a step."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=count + 1, pct_start=0.1)
    losses: list[float] = []
    for number, part in enumerate(steps(shown, count, 0)):
        loss = _loss(model, part)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        if number % 100 == 99:
            print(f"step {number + 1}: loss {sum(losses[-100:]) / 100:.3f}", file=sys.stderr, flush=True)
    model.eval()


def _loss(model: Any, part: list[tuple[Shown, list[Document]]]) -> torch.Tensor:
    pixels = torch.cat([one.pixels for one, _ in part])
    features = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
    each = torch.tensor([place for place, (_, documents) in enumerate(part) for _ in documents])
    documents = [document for _, asked in part for document in asked]
    length = max(len(d.tokens) for d in documents)
    tokens = torch.full((len(documents), length), 2)
    labels = torch.full((len(documents), length), -100)
    for row, document in enumerate(documents):
        tokens[row, : len(document.tokens)] = torch.tensor(document.tokens)
        for place, answer in enumerate(document.answer):
            if answer:
                labels[row, place - 1] = document.tokens[place]
    core = model.model
    inside = core.text_model.embed_tokens(tokens)
    shown = (tokens == model.config.image_token_id)[..., None].expand_as(inside)
    inside = inside.masked_scatter(shown, features[each])
    states = core.text_model(inputs_embeds=inside, use_cache=False).last_hidden_state
    learnt = labels >= 0
    return functional.cross_entropy(model.lm_head(states[learnt]), labels[learnt])


@torch.no_grad()
def accuracy(model: Any, documents: list[Document]) -> float:
    """Share of questions whose answer's first word is the model's first choice."""
    right = total = 0
    for batch in batches(pack(documents, 64), 4096):
        states = states_of(model, batch)
        chosen = model.lm_head(states).argmax(-1)
        first = batch.answers & ~torch.cat(
            [torch.zeros_like(batch.answers[:, :1]), batch.answers[:, :-1]], dim=1
        )
        right += int((chosen == batch.labels)[first].sum())
        total += int(first.sum())
    return right / total


class Result(NamedTuple):
    guess: float
    """Accuracy of always giving the most frequent answer to the same words without the picture."""
    teacher: float
    pruned: float
    healed: float
    report: recipe.OwnReport
    tower: int
    minutes: float


def blind(trained: list[Question], asked: list[Question]) -> float:
    """What can be had without looking: the most frequent answer to each question's own words."""
    counts: dict[str, Counter[str]] = {}
    for question in trained:
        counts.setdefault(question.text, Counter())[question.answer] += 1
    best = {text: count.most_common(1)[0][0] for text, count in counts.items()}
    return sum(best.get(q.text) == q.answer for q in asked) / len(asked)


class Sizes(NamedTuple):
    """How much of everything."""

    steps: int
    heal: int
    """Tokens of healing."""
    asked: int
    """Questions that all three are asked."""
    pictures: int
    """To train on; 0: all."""
    about: str = ""
    """Only questions with these words; empty: every kind."""


def measure(folder: Path, sizes: Sizes) -> Result:
    """Train the teacher, take 30% of its language parameters, heal, ask all three the same questions."""
    started = time.process_time()
    count, heal, asked, pictures, about = sizes
    trained, tested = ([q for q in questions(part) if about in q.text] for part in ("train", "test"))
    processor = processor_of([text for q in (*trained, *tested) for text in (q.text, q.answer)])
    model = new_model(processor, 0)
    shown = encoded(processor, trained if not pictures else _of_pictures(trained, pictures))
    train(model, shown, count)
    checkpoint.save(model, processor.tokenizer, folder / "teacher", processor=processor)
    documents = [encode_chat(processor, q.chat) for q in tested[:asked]]
    taught, held_out = trained[: max(heal // 40, 200)], trained[-200:]
    settings = Own(
        params="0.7", calibration_tokens=20_000, distil_tokens=heal, learning_rate=3e-4, teacher="teacher"
    )
    job = recipe.OwnJob(
        teacher="teacher",
        train=[q.chat for q in taught],
        held_out=[q.chat for q in held_out],
        out=folder / "own",
        settings=settings,
        seed=0,
        root=folder,
    )
    pruned: list[float] = []

    def watch(step: str, done: int, total: int, note: str = "") -> None:
        ready = (folder / "own" / "before.json").exists()
        if ready and not pruned:
            student = checkpoint.load(folder / "own" / "pruned").model
            pruned.append(accuracy(student, documents))
        if done == total:
            print(f"{step} {note}", file=sys.stderr, flush=True)

    report = recipe.own(job, watch)
    student = checkpoint.load(folder / "own" / "checkpoint").model
    return Result(
        guess=blind(trained, tested[:asked]),
        teacher=accuracy(model, documents),
        pruned=pruned[0],
        healed=accuracy(student, documents),
        report=report,
        tower=sum(p.numel() for p in outside_weights(model)),
        minutes=(time.process_time() - started) / 60,
    )


def _of_pictures(asked: list[Question], count: int) -> list[Question]:
    first = list(dict.fromkeys(q.picture for q in asked))[:count]
    return [q for q in asked if q.picture in set(first)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--heal", type=int, default=8_000)
    parser.add_argument("--asked", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=600, help="Train on so many pictures (0: all).")
    parser.add_argument("--about", default="what color", help="Only questions with these words.")
    given = parser.parse_args()
    sizes = Sizes(**vars(given))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), sizes)
    plan, report = found.report.plan, found.report
    print(
        f"An Idefics3 of {plan.parameters_before + found.tower:,} parameters, {plan.parameters_before:,} of "
        f"them language, trained here on easy-VQA for {given.steps:,} steps; {given.asked:,} questions "
        f"{f'with the words {given.about!r} ' if given.about else ''}about pictures that nobody trained on.\n"
    )
    print("| | language parameters | accuracy | of the teacher's |")
    print("| --- | --- | --- | --- |")
    print(f"| most frequent answer, blind | | {found.guess:.1%} | |")
    before, after = plan.parameters_before, plan.parameters_after
    for name, size, share in (
        ("teacher", before, found.teacher),
        ("pruned, refitted", after, found.pruned),
        ("healed", after, found.healed),
    ):
        print(f"| {name} | {size:,} | {share:.1%} | {share / found.teacher:.1%} |")
    print(
        f"\n{plan.teacher} → {plan.student} (−{plan.removed:.1%}); KL on held-out answers "
        f"{report.before.answer_kl:.4f} → {report.after.answer_kl:.4f}; {report.training_tokens:,} tokens of "
        f"healing; the tower and projector ({found.tower:,} parameters) as they were. {found.minutes:.1f} "
        f"CPU-minutes, peak "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB."
    )


if __name__ == "__main__":
    main()
