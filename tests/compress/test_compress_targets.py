"""Captured targets: what they cost, what they mean, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import msgspec
import pytest
import torch

from understudy.compress import plan as plans
from understudy.compress import targets
from understudy.compress.capture import Live, Part, part_of
from understudy.compress.capture import capture as capture_
from understudy.compress.corpus import Document, Row, collate, pack
from understudy.compress.decoder import extras_of, shape_of
from understudy.compress.distill import Corpus, Settings, heal
from understudy.compress.fidelity import side_of
from understudy.compress.losses import Rows, distillation_loss, kl_rows
from understudy.compress.prune import prune
from understudy.compress.signal import Dense, Head
from understudy.compress.targets import CachedTeacher, Origin, Targets, origin_of
from understudy.compress.teacher import LiveTeacher
from understudy.errors import InputError, ModelError

ORIGIN = Origin(teacher="t", tokenizer="v", template="c", vocab=48, row_tokens=64, top=12, samples=8)


@pytest.fixture
def words() -> list[Document]:
    """Chats that begin alike, so that packing shares their beginnings."""
    draw = torch.Generator().manual_seed(1)
    start = torch.randint(3, 48, (20,), generator=draw).tolist()
    ends = torch.randint(3, 48, (30, 20), generator=draw).tolist()
    return [Document([*start, *end], [i > 25 for i in range(40)]) for end in ends]


def capture(teacher: LiveTeacher, documents, folder: Path, origin: Origin, **more):
    return capture_(Live(teacher, origin).told, documents, folder, origin, **more)


def captured(model, documents, folder: Path, origin: Origin = ORIGIN, **more) -> Targets:
    capture(LiveTeacher(model), documents, folder, origin, precision="fp32", **more)
    return Targets(folder)


@pytest.mark.parametrize("share", [False, True])
def test_targets_are_the_teachers_whatever_the_packing(make, words, tmp_path: Path, share: bool):
    """Named tokens have the probabilities of the live signal; a row's places are found again."""
    model = make()
    teacher = CachedTeacher(captured(model, words, tmp_path))
    rows = pack(words, 128 if share else 64, share=share)
    assert any(d.after >= 0 for row in rows for d in row.documents) is share
    found = teacher.signal(range(len(rows)), rows)
    live = LiveTeacher(model).signal(range(len(rows)), rows)
    p = torch.softmax(live.hidden.float() @ live.head.weight.T, -1)
    torch.testing.assert_close(
        found.mass[:, :12], p.gather(1, found.tokens[:, :12]), rtol=4e-2, atol=4e-3
    )  # states are bf16 in the live one
    torch.testing.assert_close(found.mass.sum(-1), torch.ones(len(p)))
    assert float(found.rest.abs().max()) == 0
    wanted = torch.special.xlogy(p, p).sum(-1)
    torch.testing.assert_close(found.negentropy, wanted, rtol=2e-2, atol=2e-2)


def test_the_mean_of_sampled_gradients_converges_to_the_dense_one():
    """Over many draws of the tail the gradient's error falls as 1/√draws: the estimate has no bias."""
    from understudy.compress.capture import sampled

    torch.manual_seed(3)
    states, head = torch.randn(6, 8), torch.randn(200, 8)
    hidden, own = torch.randn(6, 8, requires_grad=True), torch.randn(200, 8)
    labels, ones = torch.zeros(6, dtype=torch.int64), torch.ones(6)
    exact = Rows(Dense(states, Head(head)), labels, ones, ones * 0)
    wanted = torch.autograd.grad(distillation_loss(hidden, own, exact, normaliser=6).total, hidden)[0]
    log_p = torch.log_softmax(states @ head.T, -1)
    origin = msgspec.structs.replace(ORIGIN, vocab=200, top=4)
    errors = []
    for draws in (16, 1024):
        many = log_p.repeat(draws, 1)
        chance = torch.rand(len(many), origin.samples, dtype=torch.float64)
        signal = targets.sparse(sampled(many, chance, origin), 200)
        rows = Rows(signal, labels.repeat(draws), ones.repeat(draws), (ones * 0).repeat(draws))
        wide = hidden.repeat(draws, 1)
        loss = distillation_loss(wide, own, rows, normaliser=6 * draws).total
        found = torch.autograd.grad(loss, hidden)[0]
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 4  # √64 = 8 in expectation


def test_kl_of_targets_estimates_the_dense_one(make, words, tmp_path: Path):
    teacher, student = make(), make(seed=1)
    rows = pack(words, 64)
    signal = CachedTeacher(captured(teacher, words, tmp_path)).signal([0], rows)
    batch = collate(rows)
    with torch.no_grad():
        own = side_of(
            student, student.model(input_ids=batch.tokens, position_ids=batch.positions)[0][batch.predicts]
        )
    live = LiveTeacher(teacher).signal(range(len(rows)), rows)
    assert float(kl_rows(signal, own).mean()) == pytest.approx(float(kl_rows(live, own).mean()), rel=0.02)


def test_a_token_costs_at_most_150_bytes(make, tmp_path: Path):
    model = make(vocab_size=300)
    long = torch.randint(3, 300, (40, 120), generator=torch.Generator().manual_seed(1)).tolist()
    origin = Origin(teacher="t", tokenizer="v", template="c", vocab=300, row_tokens=120)
    done = capture(LiveTeacher(model), [Document(t, [False] * 120) for t in long], tmp_path, origin)
    assert done.tokens == 40 * 119
    assert done.bytes / done.tokens <= 150


def test_capture_goes_on_and_is_shared_out(make, words, tmp_path: Path):
    """Two machines make the files one machine makes; a second capture makes none."""
    teacher = LiveTeacher(make())
    alone = capture(teacher, words, tmp_path / "one", ORIGIN, shard_tokens=200, precision="fp32")
    for number in (1, 2):
        capture(
            teacher, words, tmp_path / "two", ORIGIN, part=Part(number, 2), shard_tokens=200, precision="fp32"
        )
    files = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("one", "two")]
    assert files[0] == files[1]
    assert alone.made == len(files[0]) - 1 > 3
    for name in files[0]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    next((tmp_path / "one").glob("*.safetensors")).unlink()
    again = capture(teacher, words, tmp_path / "one", ORIGIN, shard_tokens=200, precision="fp32")
    assert (again.made, again.kept) == (1, alone.made - 1)


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_corrupted_shard_is_found_and_named(make, words, tmp_path: Path, harm: str):
    teacher = LiveTeacher(make())
    capture(teacher, words, tmp_path, ORIGIN, shard_tokens=400, precision="fp32")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-40] if harm == "cut" else sound[:-40] + b"\x00" * 39 + b"\x01")
    with pytest.raises(ModelError, match=f"{shard.name} is corrupted"):
        Targets(tmp_path)
    assert capture(teacher, words, tmp_path, ORIGIN, shard_tokens=400, precision="fp32").made == 1
    assert shard.read_bytes() == sound


@pytest.mark.parametrize("part", ["teacher", "tokenizer", "template", "row_tokens"])
def test_another_origin_is_refused(make, words, tmp_path: Path, part: str):
    capture(LiveTeacher(make()), words[:2], tmp_path, ORIGIN)
    value = 32 if part == "row_tokens" else "other"
    with pytest.raises(ModelError, match=f"of another {part}"):
        targets.begin(tmp_path, msgspec.structs.replace(ORIGIN, **{part: value}))


def test_another_text_is_refused(make, words, tmp_path: Path):
    found = captured(make(), words[:5], tmp_path)
    assert found.missing(words) == 25
    with pytest.raises(ModelError, match="40 tokens has no targets"):
        CachedTeacher(found).signal([0], [Row([words[6]], 64)])


def test_a_folder_without_targets(tmp_path: Path):
    with pytest.raises(ModelError, match="no targets in"):
        Targets(tmp_path)
    (tmp_path / "targets.json").write_text("[]")
    with pytest.raises(ModelError, match="not a manifest"):
        Targets(tmp_path)


def test_origin_knows_tokenizer_and_template(tokenizer):
    one = origin_of("t", tokenizer, 48, 64)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    assert origin_of("t", other, 48, 64).template != one.template
    assert origin_of("t", other, 48, 64).tokenizer == one.tokenizer
    other.add_tokens(["more"])
    assert origin_of("t", other, 48, 64).tokenizer != one.tokenizer


@pytest.mark.parametrize("text", ["0/2", "3/2", "x", "1", "-1/2"])
def test_parts_that_are_none(text: str):
    with pytest.raises(InputError, match="part"):
        part_of(text)
    assert part_of("2/3") == Part(2, 3)


def test_healing_on_targets_comes_as_near_as_on_the_live_teacher(make, text, words, tmp_path: Path):
    teacher = make()
    student = copy.deepcopy(teacher)
    prune(student, plans.decide(shape_of(student), extras_of(student), ffn=8, heads=4), text)
    corpus = Corpus(words[8:], words[:8])
    settings = Settings(
        tokens=6000, step_tokens=256, micro_tokens=128, row_tokens=64, learning_rate=3e-3, precision="fp32"
    )
    cached = CachedTeacher(captured(teacher, words, tmp_path / "targets"))
    curves = [
        heal(copy.deepcopy(student), who, corpus, settings, tmp_path / name)
        for name, who in (("live", LiveTeacher(teacher)), ("cached", cached))
    ]
    first, last = ([curve.checks[i].kl for curve in curves] for i in (0, -1))
    assert first[1] == pytest.approx(first[0], rel=0.03)
    assert last[1] < 0.6 * first[1]
    assert last[1] == pytest.approx(last[0], rel=0.1)


@pytest.mark.parametrize(
    "more", [{"divergence": "reverse"}, {"temperature": 2.0}, {"on_policy": 0.1}, {"match": 1.0}]
)
def test_what_targets_cannot_give_is_refused(make, words, tmp_path: Path, more):
    cached = CachedTeacher(captured(make(), words, tmp_path / "targets"))
    with pytest.raises(InputError, match="whole distributions"):
        heal(make(), cached, Corpus(words, []), Settings(**more), tmp_path / "heal")
