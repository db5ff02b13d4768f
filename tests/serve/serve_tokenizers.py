"""Tiny real tokenizers and the shape of the tiny models, for the serve room's tests."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The understudy learns the leading role so that the show goes on the night the lead is gone.",
    "Count to ten: 1 2 3 4 5 6 7 8 9 10. In 1987 there were 365 shows, and it's said we'll see 2000.",
    "Très bien, naïve café — größer, 東京 and 😀 are written in other letters.",
    "def total(xs):\n    return sum(xs)\n\n\tprint(total([1, 2, 3]))\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,  # not hidden / heads, as after pruning heads
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.15,  # logits far enough apart for greedy choices to be clear
}


def byte_level_tokenizer(split: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens; GPT-2's split rules unless others are given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer, "<|im_start|>", "<|im_end|>")


def spaces_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE tokenizer with byte fallback and a token in front, as Llama 2 has."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *fallback], show_progress=False)
    tokenizer.train_from_iterator([text for text in CORPUS[:2] for _ in range(2)], trainer)
    form = json.loads(tokenizer.to_str())
    # the trainer took the byte tokens for special; in a real file they are ordinary
    form["added_tokens"] = [t for t in form["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(form))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer, "<s>", "</s>")


def _wrapped(tokenizer: Tokenizer, bos: str, eos: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
