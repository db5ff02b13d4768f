"""What healing can do beside its plain recipe: peers, corrections, small states, matching, own samples."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
import torch

from understudy.compress import lowrank, onpolicy, optimiser
from understudy.compress.corpus import Document, collate, pack, shuffled
from understudy.compress.curve import Check, Curve, Point, plot, save_plot
from understudy.compress.distill import Corpus, Settings, heal
from understudy.compress.matching import Matching, depths, states_behind
from understudy.compress.order import Order
from understudy.compress.processes import Alone
from understudy.compress.teacher import LiveTeacher, RecordedTeacher
from understudy.errors import InputError, ModelError

SETTINGS = Settings(
    tokens=2500,
    step_tokens=320,
    micro_tokens=128,
    row_tokens=64,
    learning_rate=3e-3,
    precision="fp32",
    seed=7,
)


@pytest.fixture
def corpus() -> Corpus:
    words = torch.randint(3, 48, (70, 40), generator=torch.Generator().manual_seed(1)).tolist()
    documents = [Document(tokens, [i > 25 for i in range(40)]) for tokens in words]
    return Corpus(documents[10:], documents[:10])


def healed(make, corpus: Corpus, state: Path, teacher=None, **more: Any) -> tuple[Curve, Any]:
    student = make(seed=1)
    settings = msgspec.structs.replace(SETTINGS, **more)
    return heal(student, teacher or LiveTeacher(make()), corpus, settings, state), student


# several processes

PEER = """
from pathlib import Path
import msgspec, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from understudy.compress.corpus import Document
from understudy.compress.distill import Corpus, Settings, heal
from understudy.compress.teacher import LiveTeacher
teacher, student = (AutoModelForCausalLM.from_pretrained(name) for name in ("teacher", "student"))
job = msgspec.json.decode(Path("job.json").read_bytes(), type=tuple[list[list[int]], Settings])
documents = [Document(tokens, [i > 25 for i in range(len(tokens))]) for tokens in job[0]]
curve = heal(student, LiveTeacher(teacher), Corpus(documents[10:], documents[:10]), job[1], Path("peers"))
for model in (teacher, student):
    weight = model.model.layers[1].mlp.down_proj.weight
    assert 2 * weight.to_local().numel() == weight.numel(), "a half is here"
"""


def test_two_processes_are_one(make, corpus, tmp_path: Path):
    """torchrun with FSDP2 over gloo; five rows a step do not divide among two, nor do they by micro-batch."""
    more = {"states": "bf16", "match": 0.5, "train_vocabulary": True}
    settings = msgspec.structs.replace(SETTINGS, tokens=1200, checks=2, **more)
    alone, student = make(), make(seed=1)
    alone.save_pretrained(tmp_path / "teacher"), student.save_pretrained(tmp_path / "student")
    wanted = heal(student, LiveTeacher(alone), corpus, settings, tmp_path / "alone")
    texts = [d.tokens for d in (*corpus.held_out, *corpus.train)]
    (tmp_path / "job.json").write_bytes(msgspec.json.encode((texts, settings)))
    (tmp_path / "peer.py").write_text(PEER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    peers = [
        subprocess.Popen(
            [sys.executable, "peer.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"WORLD_SIZE": "2", "RANK": str(n), "LOCAL_RANK": str(n), "OMP_NUM_THREADS": "1",
                              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for n in range(2)
    ]  # fmt: skip
    said = [peer.communicate(timeout=120)[1] for peer in peers]
    assert [peer.returncode for peer in peers] == [0, 0], "\n".join(said)
    found = msgspec.convert(json.loads((tmp_path / "peers" / "state.json").read_bytes())["curve"], Curve)
    assert [p.loss for p in found.points] == pytest.approx([p.loss for p in wanted.points], rel=1e-4)
    assert [c.kl for c in found.checks] == pytest.approx([c.kl for c in wanted.checks], rel=1e-4)
    assert [p.tokens for p in found.points] == [p.tokens for p in wanted.points]


# memory


CRAMPED = """
import resource, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from understudy.compress.corpus import Document
from understudy.compress.distill import Corpus, Settings, heal
from understudy.compress.teacher import LiveTeacher
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=60_000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
torch.manual_seed(0)
teacher, student = (AutoModelForCausalLM.from_config(config) for _ in range(2))
documents = [Document(list(range(n, n + 256)), [True] * 256) for n in range(1, 9)]
settings = Settings(
    tokens=500, step_tokens=512, micro_tokens=512, row_tokens=256, chunk=512, checks=1, adapt=0.0
)
status = Path("/proc/self/status").read_text().splitlines()
used = next(int(line.split()[1]) for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + int(sys.argv[1]) * 2**20,) * 2)
curve = heal(student, LiveTeacher(teacher), Corpus(documents, []), settings, Path("cramped"))
print(curve.chunk, curve.micro, "|".join(curve.notes))
"""


def test_out_of_memory_is_answered_by_a_smaller_chunk_and_said(tmp_path: Path):
    """512 rows of 60,000 logits take two buffers of 117 MiB; the process may have 150 MiB more."""
    done = subprocess.run(
        [sys.executable, "-c", CRAMPED, "150"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    chunk, micro, *notes = done.stdout.split(maxsplit=2)
    assert 16 <= int(chunk) < 512
    assert micro == "2"
    assert "out of memory: logits of 256 rows at once from step 1 on" in notes[0]


def test_no_memory_at_all_is_an_error_with_a_way_out(make, corpus, tmp_path: Path):
    class Full:
        """A teacher whose signal never fits."""

        exact = True

        def may_share(self, length: int) -> bool:
            return True

        def signal(self, keys, rows):
            raise MemoryError

    settings = msgspec.structs.replace(SETTINGS, row_tokens=64)
    with pytest.raises(ModelError, match="one row of 64 tokens"):
        heal(make(seed=1), Full(), Corpus(corpus.train, []), settings, tmp_path)


# the optimiser


def test_small_states_are_adamw_to_their_precision():
    """Against torch's own in float64, over steps of changing gradients."""
    torch.manual_seed(0)
    one = torch.nn.Parameter(torch.randn(40, 30))
    two = torch.nn.Parameter(one.detach().double().clone())
    small = optimiser.adamw([one], 1e-2, 0.1, "bf16")
    exact = torch.optim.AdamW([two], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(30):
        gradient = torch.randn(40, 30)
        one.grad, two.grad = gradient, gradient.double()
        small.step(), exact.step()
    assert {s.dtype for n, s in small.state[one].items() if n != "step"} == {torch.bfloat16}
    moved = (two.detach() - one.detach().double()).norm() / 30
    assert float(moved / two.detach().norm()) < 1e-3


def test_clipping_is_torchs():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (2, 5)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for p, q in zip(parameters, others, strict=True):
        q.grad = p.grad.clone()
    wanted = torch.nn.utils.clip_grad_norm_(others, 1.0)
    assert optimiser.clip(parameters, 1.0, Alone()) == pytest.approx(float(wanted), rel=1e-6)
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    "more", [{"states": "bf16"}, {"lora": 4}, {"match": 0.3}, {"on_policy": 0.3, "answer_tokens": 16}]
)
def test_every_way_resumes_bit_identically(make, corpus, tmp_path: Path, more):
    whole, one = healed(make, corpus, tmp_path / "whole", **more)
    student, teacher = make(seed=1), LiveTeacher(make())
    settings = msgspec.structs.replace(SETTINGS, **more)

    class Killed(Exception):
        """Stands for the power cut."""

    def kill(step: str, done: int, total: int, note: str = "") -> None:
        if done > 0.8 * total:
            raise Killed

    with pytest.raises(Killed):
        heal(student, teacher, corpus, settings, tmp_path / "killed", kill)
    two = make(seed=1)
    resumed = heal(two, LiveTeacher(make()), corpus, settings, tmp_path / "killed")
    assert resumed.points == whole.points
    assert resumed.checks == whole.checks
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert whole.checks[-1].kl < whole.checks[0].kl


# low-rank corrections


def test_corrections_begin_as_nothing_and_end_in_the_weights(make, corpus, tmp_path: Path):
    student = make(seed=1)
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        before = student(input_ids=ids).logits
        lowrank.correct(student, 2, seed=0)
        torch.testing.assert_close(student(input_ids=ids).logits, before)
    for name, p in student.named_parameters():
        if name.endswith(".b"):
            p.data.normal_()
    with torch.no_grad():
        corrected = student(input_ids=ids).logits
        lowrank.merge(student)
        torch.testing.assert_close(student(input_ids=ids).logits, corrected, rtol=1e-4, atol=1e-4)
    assert {n for n, _ in student.named_parameters()} == {n for n, _ in make().named_parameters()}


def test_healing_by_corrections_saves_little(make, corpus, tmp_path: Path):
    curve, student = healed(make, corpus, tmp_path, lora=2)
    assert curve.checks[-1].kl < curve.checks[0].kl
    saved = (tmp_path / "best.safetensors").stat().st_size
    assert saved < sum(p.numel() * 4 for p in student.parameters()) / 2


def test_corrections_wake_nothing_that_was_filled_up_with_zeros(make, corpus, tmp_path: Path):
    """Channels of a layer that keeps fewer than its file says, and a KV group of no use."""
    student = make(seed=1)
    layer = student.model.layers[0]
    half = layer.self_attn.v_proj.weight.shape[0] // 2
    per_head = layer.self_attn.o_proj.weight.shape[1] // 2
    with torch.no_grad():
        layer.mlp.gate_proj.weight[:4].zero_(), layer.mlp.up_proj.weight[:4].zero_()
        layer.mlp.down_proj.weight[:, :4].zero_()
        layer.self_attn.v_proj.weight[:half].zero_(), layer.self_attn.o_proj.weight[:, :per_head].zero_()
    settings = msgspec.structs.replace(SETTINGS, lora=2, tokens=1000)
    curve = heal(student, LiveTeacher(make()), corpus, settings, tmp_path)
    assert curve.best > 0
    for dead in (
        layer.mlp.gate_proj.weight[:4],
        layer.mlp.up_proj.weight[:4],
        layer.mlp.down_proj.weight[:, :4],
        layer.self_attn.v_proj.weight[:half],
        layer.self_attn.o_proj.weight[:, :per_head],
    ):
        assert not dead.any()
    assert layer.mlp.down_proj.weight[:, 4:].all()


# hidden states


def test_matching_by_hand():
    """‖P·h − t‖²/‖t‖² with P = 1: (1 + 4)/25 for (4, 1) beside (3, −1)… and a projection that learns."""
    match = Matching(1, 2, 2)
    own, wanted = torch.tensor([[4.0, 1.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    loss = match([own], [wanted], torch.tensor([1.0, 0.5]))
    assert float(loss.detach()) == pytest.approx((1 + 9) / 25 + 0.5)
    loss.backward()
    assert match.projections[0].grad is not None


@pytest.mark.parametrize(
    ("layers", "count", "found"), [(30, 4, [7, 14, 21, 29]), (2, 4, [0, 1]), (5, 1, [4])]
)
def test_depths_are_spread_and_end_with_the_last(layers, count, found):
    assert depths(layers, count) == found


def test_states_behind_layers(make, documents):
    model = make()
    batch = collate(pack(documents[:4], 64))
    with torch.no_grad():
        final, (first, last) = states_behind(model, batch, [0, 1])
        assert first.shape == last.shape == final.shape
        torch.testing.assert_close(model.model.norm(last), final)


def test_matching_moves_the_stream(make, corpus, tmp_path: Path):
    """Narrower students are matched through their projection."""
    curve, _ = healed(make, corpus, tmp_path, teacher=LiveTeacher(make(hidden_size=60)), match=1.0)
    assert curve.checks[-1].kl < curve.checks[0].kl
    assert curve.points[-1].loss < curve.points[0].loss


# on policy


def test_samples_follow_from_the_seed_and_stop_at_the_end_of_turn(make):
    model = make()
    model.generation_config.eos_token_id = 2
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10]]
    one, two, other = (onpolicy.sampled(model, prompts, 12, seed) for seed in (1, 1, 2))
    assert one == two != other
    for prompt, document in zip(prompts, one, strict=True):
        assert document.tokens[: len(prompt)] == prompt
        answer = document.tokens[len(prompt) :]
        assert document.answer == [False] * len(prompt) + [True] * len(answer)
        assert 2 not in answer[:-1]


def test_padding_changes_no_sample_distribution(make):
    """Left padding is not seen: greedy continuation alone and beside a longer prompt are the same."""
    model = make()
    model.generation_config.eos_token_id = None
    alone = onpolicy.sampled(model, [[3, 4, 5]] * 400, 1, 5)
    beside = onpolicy.sampled(model, [[3, 4, 5], [6, 7, 8, 9, 10]] * 400, 1, 5)[::2]
    counts = [
        torch.bincount(torch.tensor([d.tokens[3] for d in ds]), minlength=48) / 400 for ds in (alone, beside)
    ]
    with torch.no_grad():
        p = torch.softmax(model(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1], -1)
    for found in counts:
        assert float((found - p).abs().sum()) / 2 < 0.15  # total variation


def test_own_samples_are_learnt_by_reverse_kl(make, corpus, tmp_path: Path):
    """What the first step reports is Σ s·(log s − log t) over the sampled answers, in float64."""
    teacher, student = make(), make(seed=1)
    settings = msgspec.structs.replace(
        SETTINGS, on_policy=1.0, answer_tokens=16, tokens=1, checks=1, learning_rate=1e-12
    )
    count, seed = settings.step_tokens // settings.row_tokens, settings.seed * 1_000_003
    prompts = onpolicy.prompts_of(corpus.train, settings.row_tokens - settings.answer_tokens)
    drawn = [prompts[i] for i in shuffled(range(len(prompts)), seed)[: 2 * count]]
    total, answered = 0.0, 0
    for said in onpolicy.sampled(student, drawn, settings.answer_tokens, seed):
        ids = torch.tensor([said.tokens])
        with torch.no_grad():
            mine, wanted = (
                m(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (student, teacher)
            )
        each = (mine.exp() * (mine - wanted)).sum(-1)[torch.tensor(said.answer[1:])]
        total, answered = total + float(each.sum()), answered + len(each)
    curve = heal(student, LiveTeacher(teacher), corpus, settings, tmp_path)
    assert answered > 100
    assert curve.points[0].kl == pytest.approx(total / answered, rel=0.01)  # the teacher's states are bf16


def test_prompts_end_before_the_last_answer():
    document = Document(list(range(10)), [i in (2, 3, 7, 8) for i in range(10)])
    assert onpolicy.prompts_of([document], 20) == [[0, 1, 2, 3, 4, 5, 6]]
    assert onpolicy.prompts_of([document], 7) == []
    assert onpolicy.prompts_of([Document([1, 2], [False, False])], 20) == []


def test_no_prompts_to_sample_to(make, corpus, tmp_path: Path):
    plain = Corpus([Document(d.tokens, [False] * 40) for d in corpus.train], [])
    with pytest.raises(ModelError, match="no prompt"):
        healed(make, plain, tmp_path, on_policy=0.2)


# teachers and texts


def test_a_black_box_is_cross_entropy_on_its_answers(make, corpus, tmp_path: Path):
    """Only answers are learnt, and what is reported is their −log probability."""
    curve, _ = healed(make, corpus, tmp_path, teacher=RecordedTeacher(48), adapt=0.0)
    assert curve.checks[0].kl == pytest.approx(curve.checks[0].answer_nll, rel=1e-4)
    assert curve.checks[0].kl == pytest.approx(curve.checks[0].answer_kl, rel=1e-6)
    assert curve.points[-1].kl < curve.points[0].kl
    with pytest.raises(InputError, match="whole distributions"):
        healed(make, corpus, tmp_path / "other", teacher=RecordedTeacher(48), divergence="reverse")


def test_generic_texts_join_by_their_ratio():
    order = Order(own=7, generic=20, per_step=8, share=0.25, seed=0)
    steps = [order.step(n) for n in range(14)]
    assert all(sum(i >= 7 for i in step) == 2 for step in steps)
    assert sorted({i for step in steps for i in step}) == list(range(27))
    every = sorted(i for step in steps[:7] for i in step if i < 7)
    assert every == sorted(list(range(7)) * 6)  # 42 places: six whole epochs
    assert Order(3, 0, 2, 0.5, 0).step(0)[0] < 3


def test_generic_texts_are_part_of_the_run(make, corpus, tmp_path: Path):
    mixed = Corpus(corpus.train[:20], corpus.held_out, corpus.train[20:])
    curve, _ = healed(make, mixed, tmp_path, generic=0.5)
    assert curve.checks[-1].kl < curve.checks[0].kl
    with pytest.raises(ModelError, match="other texts or settings"):
        healed(make, mixed._replace(generic=corpus.train[21:]), tmp_path, generic=0.5)


# the plot


def test_the_plot_holds_what_was_measured(tmp_path: Path):
    points = [Point(step=i, tokens=1000 * i, loss=1.0, kl=0.9 / i, learning_rate=1e-3) for i in range(1, 900)]
    checks = [
        Check(step=i, tokens=i, kl=1 / (1 + i), answer_kl=0.5, answer_nll=1.0, loss=1.0) for i in (0, 9)
    ]
    save_plot(Curve(points=points, checks=checks), tmp_path / "curve.svg")
    svg = ElementTree.fromstring((tmp_path / "curve.svg").read_text())
    lines = [e for e in svg if e.tag.endswith("polyline")]
    assert len(lines) == 3
    sizes = [len(line.attrib["points"].split()) for line in lines]
    assert sizes[0] <= 200
    assert sizes[1:] == [2, 2]
    heights = [float(at.split(",")[1]) for at in lines[1].attrib["points"].split()]
    assert heights[1] > heights[0]  # lower KL stands lower
    assert "nan" not in plot(Curve(), "nothing yet")
