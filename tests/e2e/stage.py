"""A small stage for the drill: a two-layer teacher, its tokenizer, a workload and a config, all made here."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from understudy.serve.export import export_gguf

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = ["red", "green", "blue", "grey", "white", "black", "brown", "pink"]
THINGS = ["apple", "leaf", "sky", "stone", "snow", "coal", "bark", "rose", "door", "cup"]

WORKLOAD = """
import json
import os
import urllib.request
from pathlib import Path

from openai import OpenAI

COLOURS = {colours!r}
THINGS = {things!r}
client = OpenAI()
done = Path(os.environ["UNDERSTUDY_WORKLOAD_DONE"])
finished = set(done.read_text().split()) if done.exists() else set()
pairs = [(c, t) for c in COLOURS for t in THINGS][: int(os.environ.get("UNDERSTUDY_WORKLOAD_REQUESTS", "80"))]
for number, (colour, thing) in enumerate(pairs):
    if str(number) in finished:
        continue
    task = "colour" if number % 4 else "open"
    question = f"Is the {{thing}} {{colour}}? Say yes or no, then the colour of it in one word, please."
    answer = client.chat.completions.with_raw_response.create(
        model=os.environ["UNDERSTUDY_ALIAS"],
        messages=[
            {{"role": "system", "content": "Answer briefly."}},
            {{"role": "user", "content": question}},
        ],
        max_tokens=6,
        temperature=0,
        stream=bool(number % 2),
        extra_headers={{"x-task-id": f"t{{number}}", "x-tags": f"task={{task}}"}},
    )
    parsed = answer.parse()
    if number % 2:
        for _ in parsed:
            pass
    if task == "colour":
        said = {{"call": answer.headers["x-understudy-call"], "expected": colour}}
        url = os.environ["OPENAI_BASE_URL"] + "/feedback"
        urllib.request.urlopen(url, json.dumps(said).encode()).close()
    with done.open("a") as file:
        file.write(f"{{number}}\\n")
"""

CONFIG = """
[gateway]
listen = "127.0.0.1:{gateway}"

[store]
url = "sqlite:///run/calls.db"
segments = "run/segments"

[endpoints.vendor]
base_url = "http://127.0.0.1:{serve}/v1"

[endpoints.local]
base_url = "http://127.0.0.1:{serve}/v1"

[endpoints.court]
base_url = "http://127.0.0.1:{serve}/v1"

[aliases.assistant]
model = "vendor/lead"

[catalog]
overlay = "models.yaml"

[serve]
listen = "127.0.0.1:{serve}"
threads = 1
context = 512

[serve.models]
lead = "teacher.gguf"
magistrate = "teacher.gguf"
student = "run/student-f16.gguf"

[own]
teacher = "teacher"
params = "0.75"
calibration_tokens = 4000
distil_tokens = 12000

[evaluate]
margin = 0.2
judge = "court/magistrate"
benchmarks = ["hellaswag"]
benchmark_folder = "benchmarks"

[drill]
alias = "assistant"
out = "run"
workload = ["python", "workload.py"]
candidates = ["local/student"]
"""

OVERLAY = """
models:
  vendor/lead:
    context_window: 512
    inputs: [text]
    prices: {{input: 1.0, output: 2.0}}
    retires: {retires}
  local/student: {{context_window: 512, inputs: [text], hosting: {{usd_per_hour: 0.1, tokens_per_s: 100}}}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over our own sentences."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator([f"Is the {t} {c}? yes no" for t in THINGS for c in COLOURS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def set_up(folder: Path, *, retires: str = "2099-12-31") -> None:
    """Everything `understudy drill` needs, in ``folder``."""
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "teacher")
    words.save_pretrained(folder / "teacher")
    export_gguf(folder / "teacher", folder / "teacher.gguf", "f16")
    (folder / "workload.py").write_text(WORKLOAD.format(colours=COLOURS, things=THINGS))
    (folder / "understudy.toml").write_text(CONFIG.format(gateway=free_port(), serve=free_port()))
    (folder / "models.yaml").write_text(OVERLAY.format(retires=retires))
    _benchmark(folder / "benchmarks" / "hellaswag")


def _benchmark(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = [
        {
            "activity_label": "Painting",
            "ctx_a": f"Somebody paints the {thing}.",
            "ctx_b": "then they",
            "endings": [f"look at the {thing}", "sleep", "run away", f"eat the {colour} brush"],
            "label": str(index % 4),
        }
        for index, (thing, colour) in enumerate(zip(THINGS, COLOURS, strict=False))
    ]
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
