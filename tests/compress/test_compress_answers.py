"""Black-box and hosted teachers: what is asked, what is kept, and how it becomes a signal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from understudy.cli.asking import vocabulary
from understudy.cli.capture import capture as capture_command
from understudy.cli.distil import distil as distil_command
from understudy.compress import answers, healing
from understudy.compress.align import Aligner, Piece, guesses, pairs_of, told_of
from understudy.compress.answers import Hosted, Sampled
from understudy.compress.corpus import encode_chat, encode_text
from understudy.compress.harvest import Answered, harvest
from understudy.compress.targets import CachedTeacher, Targets, sparse
from understudy.compress.teacher import LiveTeacher
from understudy.endpoint import ScriptedModel
from understudy.errors import EndpointError, InputError, ModelError

NO = math.nan


# alignment


def test_equal_tokens_keep_their_probabilities():
    numbers = {b"the": 1, b" cat": 2, b" dog": 3}
    pieces = [
        Piece(b"the", math.log(0.5), [(b"the", math.log(0.5)), (b"zzz", math.log(0.3))]),
        Piece(b" cat", math.log(0.2), [(b" dog", math.log(0.7)), (b" cat", math.log(0.2))]),
    ]
    one, two = guesses([1, 2], [b"the", b" cat"], pieces, numbers)
    assert dict(zip(one.tokens, one.log_p, strict=True)) == pytest.approx({1: math.log(0.5)})
    assert dict(zip(two.tokens, two.log_p, strict=True)) == pytest.approx(
        {2: math.log(0.2), 3: math.log(0.7)}
    )
    signal = sparse(told_of([one, two], 3), 10)
    assert signal.rest.tolist() == pytest.approx([0.5, 0.1], abs=1e-3)
    assert signal.known.all()


def test_spans_of_several_tokens_share_their_probability():
    """“hello” is two tokens here and three there: the student's product is to be the teacher's."""
    pieces = [Piece(b"h", -0.1), Piece(b"el", -0.2), Piece(b"lo", -0.6), Piece(b"!", -1.0)]
    found = guesses([7, 8, 9], [b"hel", b"lo", b"!"], pieces, {})
    assert [g.log_p for g in found] == [
        pytest.approx((-0.3,)),
        pytest.approx((-0.6,)),
        pytest.approx((-1.0,)),
    ]
    found = guesses([7, 8], [b"he", b"llo!"], pieces, {})
    assert sum(g.log_p[0] for g in found) == pytest.approx(-1.9)
    assert found[0].log_p[0] == pytest.approx(-0.95)


def test_characters_cut_between_tokens_are_one_span():
    snow = "☃".encode()
    found = guesses([1, 2], [snow[:1], snow[1:]], [Piece(snow[:2], -1.0), Piece(snow[2:], -1.0)], {})
    assert [g.log_p[0] for g in found] == [-1.0, -1.0]


def test_other_bytes_and_unknown_probabilities_say_nothing():
    assert not any(g.known for g in guesses([1], [b"a"], [Piece(b"b", -1.0)], {}))
    one, two = guesses([1, 2], [b"a", b"b"], [Piece(b"a", NO), Piece(b"b", -1.0)], {})
    assert (one.known, two.known) == (False, True)


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and a few pairs, with a template that writes other marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<eot>", *alphabet, "th", "on", "es"]
    bpe = models.BPE({n: i for i, n in enumerate(names)}, [("t", "h"), ("o", "n"), ("e", "s")])
    whole = Tokenizer(bpe)
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eot>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eot>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return fast


@pytest.fixture(scope="session")
def pairs_tokenizer(letters) -> PreTrainedTokenizerFast:
    """Another byte-level tokenizer with other merges and numbers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    bpe = models.BPE({n: i for i, n in enumerate([*alphabet, "<end>", "he", "ye"])}, [("h", "e"), ("y", "e")])
    whole = Tokenizer(bpe)
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>")
    fast.chat_template = letters.chat_template.replace("<eot>", "<end>").replace("[assistant]", "=assistant:")
    fast.chat_template = fast.chat_template.replace("[{{ m['role'] }}]", "={{ m['role'] }}:")
    return fast


def test_a_teacher_with_other_tokens_gives_spans_what_it_gives_them(make, letters, pairs_tokenizer, chats):
    """Σ of the shares over an answer = the teacher's log-probability of that answer, its end too."""
    teacher = make(vocab_size=300)
    own = [encode_chat(letters, chat) for chat in chats[:3]]
    theirs = [encode_chat(pairs_tokenizer, chat) for chat in chats[:3]]
    aligner = Aligner(
        LiveTeacher(teacher), pairs_of(own, theirs), vocabulary(letters), vocabulary(pairs_tokenizer), 32
    )
    for told, mine, other in zip(aligner.told(own), own, theirs, strict=True):
        with torch.no_grad():
            log_p = torch.log_softmax(teacher(input_ids=torch.tensor([other.tokens])).logits[0], -1)
        wanted = sum(
            float(log_p[i - 1, other.tokens[i]]) for i in range(len(other.tokens)) if other.answer[i]
        )
        signal = sparse(told, 300)
        known = signal.known.tolist()
        assert known == mine.answer[1:]
        labels = torch.tensor(mine.tokens[1:])
        mass = (signal.mass * (signal.tokens == labels[:, None])).sum(-1)
        assert float(mass[signal.known].log().sum()) == pytest.approx(wanted, rel=2e-2)


def test_plain_text_is_aligned_from_its_start(make, letters, pairs_tokenizer):
    text = "the sun shines on these"
    own, theirs = encode_text(letters, text), encode_text(pairs_tokenizer, text)
    teacher = LiveTeacher(make(vocab_size=300))
    aligner = Aligner(teacher, pairs_of([own], [theirs]), vocabulary(letters), vocabulary(pairs_tokenizer), 8)
    known = sparse(aligner.told([own])[0], 300).known
    assert len(known) == len(own.tokens) - 1
    # “th” spans the teacher's first token, of which nobody knows a probability, and “he”
    assert known.tolist().index(True) >= 1
    assert known[4:].all()


def test_pairs_must_be_of_the_same_texts():
    with pytest.raises(ModelError, match="2 texts"):
        pairs_of([1, 2], [1])  # pyright: ignore[reportArgumentType]


# sampling


def asked(count: int = 4, samples: int = 1, **more):
    requests = [
        {"messages": [{"role": "user", "content": f"question {n}"}], "max_tokens": 9} for n in range(count)
    ]
    return answers.wanted("vendor/large", requests, samples, **more)


async def test_answers_are_paid_for_once(tmp_path: Path):
    model = ScriptedModel("vendor/large", lambda request: f"yes to {request['messages'][-1]['content']}")
    cache = tmp_path / "answers.jsonl"
    first = await answers.sample(model, asked(3), cache)
    assert [one.message["content"] for one in first] == [f"yes to question {n}" for n in range(3)]
    assert await answers.sample(model, asked(4), cache) == [
        *first,
        (await answers.sample(model, asked(4), cache))[3],
    ]
    assert model.calls == 4
    assert len({w.key for w in asked(2, samples=3)}) == 6
    assert asked(2, samples=3)[0].request["temperature"] == 1.0
    chats = answers.chats_of(asked(4), await answers.sample(model, asked(4), cache))
    assert chats[2][-1] == {"role": "assistant", "content": "yes to question 2"}


async def test_a_torn_last_line_is_asked_again_and_any_other_is_named(tmp_path: Path):
    model = ScriptedModel("vendor/large", lambda request: "yes")
    cache = tmp_path / "answers.jsonl"
    await answers.sample(model, asked(3), cache, concurrency=1)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-20])
    assert len(await answers.sample(model, asked(3), cache)) == 3
    assert model.calls == 4
    assert len(cache.read_bytes().splitlines()) == 3
    cache.write_bytes(b"{}\n" + whole)
    with pytest.raises(InputError, match=r"answers\.jsonl:1 is no answer"):
        answers.known(cache)


async def test_failures_are_left_out_and_all_failures_are_an_error(tmp_path: Path):
    flaky = ScriptedModel("vendor/large", lambda r: "yes", fail=lambda call: call == 2)
    assert len(await answers.sample(flaky, asked(3), tmp_path / "a.jsonl", concurrency=1)) == 2
    dead = ScriptedModel("vendor/large", lambda r: "yes", fail=lambda call: True)
    with pytest.raises(EndpointError, match="503"):
        await answers.sample(dead, asked(3), tmp_path / "b.jsonl")


async def test_the_estimate_knows_what_is_cached(tmp_path: Path):
    cache = tmp_path / "answers.jsonl"

    def price(usage):
        return (usage.prompt_tokens + 10 * usage.completion_tokens) / 1e6

    before = answers.estimate(asked(4), cache, price)
    assert (before.answers, before.cached, before.completion_tokens) == (4, 0, 36)
    assert before.usd == pytest.approx((before.prompt_tokens + 360) / 1e6)
    await answers.sample(ScriptedModel("vendor/large", lambda r: "one two"), asked(3), cache)
    after = answers.estimate(asked(4), cache, lambda usage: None)
    assert (after.cached, after.completion_tokens, after.usd) == (3, 2, None)
    assert "1 answers to ask for (3 of 4 are cached)" in str(after)


def test_cut_and_empty_answers_are_not_learnt():
    wants = asked(3)
    found = [
        Sampled(key=w.key, target="t", message={"role": "assistant", "content": text}, finish=finish)
        for w, text, finish in zip(wants, ("whole", "cut o", " "), ("stop", "length", "stop"), strict=True)
    ]
    assert [chat[-1]["content"] for chat in answers.chats_of(wants, found)] == ["whole"]


def test_a_recorded_request_is_asked_without_how_it_was_sent():
    recorded = {"model": "gpt", "stream": True, "messages": [1], "tools": [2], "temperature": 0.2, "n": 2}
    assert answers.request_of((), recorded) == {"messages": [1], "tools": [2], "temperature": 0.2}
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 1}]
    assert answers.request_of(chat) == {"messages": [{"role": "user", "content": "x"}]}


# hosted log-probabilities


def test_hosted_logprobs_become_a_signal(tokenizer):
    chat = [{"role": "user", "content": "is it warm"}, {"role": "assistant", "content": "yes because"}]
    document = encode_chat(tokenizer, chat)
    words = vocabulary(tokenizer)
    yes, because = (tokenizer.convert_tokens_to_ids(w) for w in ("yes", "because"))
    told = [
        {"token": "yes", "logprob": math.log(0.6), "bytes": list(b"yes"),
         "top_logprobs": [{"token": "no", "logprob": math.log(0.3), "bytes": None}]},
        {"token": "because", "logprob": math.log(0.25), "top_logprobs": []},
    ]  # fmt: skip
    one = Sampled(key="k", target="t", message=chat[-1], finish="stop", logprobs=told)
    signal = sparse(Hosted([document], [one], words).told([document])[0], len(words))
    at = [i for i, said in enumerate(document.answer[1:]) if said]
    assert signal.known.tolist() == [i in at for i in range(len(document.tokens) - 1)]
    first, second, end = (
        dict(zip(signal.tokens[i].tolist(), signal.mass[i].tolist(), strict=True)) for i in at
    )
    no = tokenizer.convert_tokens_to_ids("no")
    assert (first[yes], first[no]) == (pytest.approx(0.6, rel=2e-3), pytest.approx(0.3, rel=2e-3))
    assert second[because] == pytest.approx(0.25, rel=2e-3)
    assert signal.rest[at].tolist() == pytest.approx([0.1, 0.75, 0.0], abs=1e-3)
    assert end[document.tokens[at[-1] + 1]] == 1


# harvesting


def chat(question: str, answer: str):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


LONG = " ".join(f"word{n}" for n in range(80))


def test_failures_go_and_the_better_of_two_alike_stays():
    found = harvest(
        [
            Answered(chat("a question of its own", "a fine answer"), 1.0),
            Answered(chat("another one entirely", "a wrong answer"), 0.0),
            Answered(chat(LONG, "nobody graded this"), None),
            Answered(chat(LONG, "nobody graded that"), 0.9),
            Answered(chat(LONG + " and much more of another kind, so that many shingles differ", "no"), 1.0),
        ]
    )
    assert [c[-1]["content"] for c in found.chats] == ["a fine answer", "nobody graded that", "no"]
    assert (found.failed, found.alike) == (1, 1)
    assert "left out 1 failures, 1 near-duplicates" in str(found)


def test_near_duplicates_are_found_among_many_different_ones():
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in draw.integers(0, 3000, 120)) for _ in range(150)]
    copies = [text + " x" for text in texts[:40]]
    found = harvest([Answered(chat(text, "yes"), None) for text in texts + copies])
    assert (len(found.chats), found.alike) == (150, 40)
    assert [c[0]["content"] for c in found.chats] == texts


# the commands


def run(command, *arguments, fails: bool = False) -> Result:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception and not (fails or isinstance(result.exception, SystemExit)):
        raise result.exception
    assert (result.exit_code != 0) is fails, result.output
    return result


def invoke(command, *arguments) -> str:
    return run(command, *arguments).stdout


@pytest.fixture
def data(tmp_path: Path, chats) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": c}) for c in chats))
    return path


@pytest.fixture
def student(tmp_path: Path, make, tokenizer) -> Path:
    from understudy.compress.checkpoint import save

    return save(make(seed=1), tokenizer, tmp_path / "student")


def test_capture_then_distil_without_the_teacher(folder: Path, student: Path, data: Path, tmp_path: Path):
    out = invoke(capture_command, folder, "--out", tmp_path / "targets", "--data", data, "--json")
    assert json.loads(out)["made"] == 1
    out = invoke(capture_command, folder, "--out", tmp_path / "targets", "--data", data)
    assert "0 new and 1 old shards" in out
    healed = tmp_path / "healed"
    common = (student, "--out", healed, "--data", data, "--tokens", 1500, "--learning-rate", "1e-3")
    curve = json.loads(invoke(distil_command, folder, *common, "--targets", tmp_path / "targets", "--json"))
    assert curve["checks"][-1]["kl"] < curve["checks"][0]["kl"]
    assert (tmp_path / "healed.svg").read_text().startswith("<svg")
    with pytest.raises(ModelError, match="of another teacher"):
        invoke(distil_command, student, *common, "--targets", tmp_path / "targets")
    with pytest.raises(ModelError, match="of another teacher"):
        invoke(distil_command, tmp_path / "mistyped", *common, "--targets", tmp_path / "targets")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(chat("is the dog on it", "no")))
    with pytest.raises(ModelError, match="1 of 1 are missing"):
        invoke(distil_command, folder, student, "--out", healed, "--data", other, "--held-out", 0,
               "--targets", tmp_path / "targets")  # fmt: skip
    with pytest.raises(ModelError, match="nothing to resume"):
        invoke(distil_command, folder, *common, "--resume")


def test_another_tokenizer_goes_through_capture(make, letters, pairs_tokenizer, data: Path, tmp_path: Path):
    from understudy.compress.checkpoint import save

    teacher = save(make(vocab_size=300), letters, tmp_path / "teacher")
    student = save(make(vocab_size=300, seed=1), pairs_tokenizer, tmp_path / "student")
    common = (
        student,
        "--out",
        tmp_path / "healed",
        "--data",
        data,
        "--tokens",
        3000,
        "--learning-rate",
        "3e-3",
    )
    with pytest.raises(ModelError, match="different tokenizers"):
        invoke(distil_command, teacher, *common)
    targets = tmp_path / "targets"
    invoke(capture_command, teacher, "--student", student, "--out", targets, "--data", data)
    assert CachedTeacher(Targets(targets)).targets.origin.samples == 0
    curve = json.loads(invoke(distil_command, teacher, *common, "--targets", targets, "--json"))
    assert curve["checks"][-1]["kl"] < curve["checks"][0]["kl"]


@pytest.fixture
async def vendor():
    """An endpoint that answers “yes” with log-probabilities, and counts."""
    calls: list[dict] = []

    async def respond(request: web.Request) -> web.Response:
        asked = await request.json()
        calls.append(asked)
        content = [{"token": "yes", "logprob": -0.1, "top_logprobs": [{"token": "no", "logprob": -2.5}]}]
        choice = {"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        if asked.get("logprobs"):
            choice["logprobs"] = {"content": content}
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        return web.json_response({"choices": [choice | {"index": 0}], "usage": usage})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", respond)
    async with TestServer(app) as server:
        server.calls = calls  # pyright: ignore[reportAttributeAccessIssue]
        yield server


async def in_thread(command, *arguments, fails: bool = False) -> Result:
    """Commands bring their own event loop."""
    import asyncio

    return await asyncio.to_thread(run, command, *arguments, fails=fails)


async def test_hosted_teachers_by_the_commands(vendor, student: Path, data: Path, tmp_path: Path):
    config = tmp_path / "understudy.toml"
    config.write_text(f'[endpoints.vendor]\nbase_url = "{vendor.make_url("/v1")}"\n')
    common = ("--data", data, "--config", config)
    training = ("--tokens", 1500, "--learning-rate", "3e-3", "--json", "--config", config)
    # texts alone: the cost is said first, and saying nothing asks for nothing
    generate = ("recorded", student, "--out", tmp_path / "one", "--generate", "vendor/large", *common)
    said = await in_thread(distil_command, *generate, fails=True)
    assert "40 answers to ask for (0 of 40 are cached)" in said.stderr
    assert vendor.calls == []
    out = await in_thread(distil_command, *generate, "--yes", *training)
    curve = json.loads(out.stdout)
    assert curve["checks"][-1]["kl"] < curve["checks"][0]["kl"]
    assert len(vendor.calls) == 40
    out = await in_thread(distil_command, *generate, *training)
    assert "0 answers to ask for (40 of 40 are cached)" in out.stderr
    assert len(vendor.calls) == 40
    # with log-probabilities
    targets = tmp_path / "targets"
    hosted = ("vendor/large", "--student", student, "--out", targets)
    await in_thread(capture_command, *hosted, "--yes", *common)
    assert vendor.calls[-1]["top_logprobs"] == 20
    out = await in_thread(
        distil_command, "", student, "--out", tmp_path / "two", "--targets", targets, *training
    )
    curve = json.loads(out.stdout)
    assert curve["checks"][-1]["kl"] < curve["checks"][0]["kl"]
    with pytest.raises(InputError, match="--student"):
        await in_thread(capture_command, "vendor/large", "--out", targets, *common)


def test_recorded_answers_are_harvested_from_traffic(student: Path, chats, tmp_path: Path):
    """Feedback or a grader says which failed; the same call twice is learnt once."""
    from understudy.traffic.record import Call, Feedback
    from understudy.traffic.store import open_store

    config = tmp_path / "understudy.toml"
    config.write_text("[evaluate]\nheld_out = 0.1\n")
    calls, said = [], []
    for number, one in enumerate([*chats, *chats[:3]]):
        body = {"choices": [{"index": 0, "message": one[-1], "finish_reason": "stop"}]}
        key = f"00000000-0000-7000-8000-{number:012d}"
        calls.append(
            Call(
                key=key,
                at=1.7e9 + number,
                route="chat.completions",
                alias="a",
                target="v/m",
                status=200,
                request=json.dumps({"model": "a", "messages": one[:-1]}).encode(),
                response=json.dumps(body).encode(),
            )
        )
        if number in (5, 6):
            said.append(Feedback(key=f"f{number}", at=1.7e9, call=key, metric="right", value=0.0))
        if number in (7, 8):
            right = one[-1]["content"] if number == 7 else "something else altogether"
            said.append(Feedback(key=f"e{number}", at=1.7e9, call=key, expected=right))
    with open_store("sqlite:///understudy.db", tmp_path) as store:
        store.insert([*calls, *said], "s", 1)
    out = run(
        distil_command,
        "recorded",
        student,
        "--out",
        tmp_path / "healed",
        "--tokens",
        800,
        "--config",
        config,
    )
    assert "34 answers; left out 3 failures, 2 near-duplicates" in out.stderr
    assert healing.RECORDED == "recorded"
