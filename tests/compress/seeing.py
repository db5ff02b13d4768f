"""Two-layer models of every family that sees or hears, their processors, and chats with pictures or sound."""

from __future__ import annotations

import base64
import io
import struct
import tempfile
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tekken
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForMultimodalLM, PreTrainedModel, PreTrainedTokenizerFast

from understudy import voxtral
from understudy.compress.corpus import Chat

MARKS = (
    *("<unk>", "<s>", "</s>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"),
    *("<|vision_end|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|image|>"),
    *(
        "<|AUDIO|>",
        "<|audio_bos|>",
        "<|audio_eos|>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ),
    *("<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>"),
)
TALK = (
    "user assistant what is the shape color red blue green circle square yes no it sound long short".split()  # noqa: SIM905
)
NUMBERS = {word: number for number, word in enumerate((*MARKS, *TALK))}
TEXT: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 48,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SIGLIP: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_EYES: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
WHISPER: dict[str, Any] = {"num_mel_bins": 16, "max_source_positions": 50}


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    eyes = CLIPVisionConfig(**SIGLIP | {"projection_dim": 24})
    return LlavaConfig(
        vision_config=eyes,
        text_config=LlamaConfig(**TEXT),
        image_token_id=NUMBERS["<image>"],
        image_seq_length=16,
    )


def _idefics(name: str) -> Any:
    import transformers

    config = getattr(transformers, name + "Config")
    eyes = {"model_type": name.lower() + "_vision"} | SIGLIP
    text = transformers.LlamaConfig(**TEXT)
    number = NUMBERS["<image>"]
    return config(vision_config=eyes, text_config=text, image_token_id=number, scale_factor=2, pad_token_id=2)


def _gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        **TEXT | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    )
    return Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**SIGLIP | {"vision_use_head": False}),
        mm_tokens_per_image=4,
        image_token_id=NUMBERS["<image_soft_token>"],
        boi_token_id=NUMBERS["<start_of_image>"],
        eoi_token_id=NUMBERS["<end_of_image>"],
    )


def _qwen(name: str) -> Any:
    import transformers

    eyes: dict[str, Any] = {
        "Qwen2VL": QWEN_EYES | {"embed_dim": 24, "hidden_size": 48, "mlp_ratio": 2},
        "Qwen2_5_VL": QWEN_EYES
        | {"hidden_size": 24, "out_hidden_size": 48, "intermediate_size": 32, "window_size": 32},
        "Qwen3VL": QWEN_EYES
        | {"hidden_size": 24, "out_hidden_size": 48, "intermediate_size": 32, "deepstack_visual_indexes": [0]}
        | {"num_position_embeddings": 16},
    }[name]
    marks = {
        "image_token_id": NUMBERS["<|image_pad|>"],
        "video_token_id": NUMBERS["<|video_pad|>"],
        "vision_start_token_id": NUMBERS["<|vision_start|>"],
        "vision_end_token_id": NUMBERS["<|vision_end|>"],
    }
    text = TEXT | MROPE | ({"head_dim": 8} if name == "Qwen3VL" else {})
    return getattr(transformers, name + "Config")(text_config=text, vision_config=eyes, **marks)


def _mllama() -> Any:
    from transformers import MllamaConfig
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    eyes = MllamaVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        image_size=32,
        patch_size=8,
        max_num_tiles=2,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=72,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )
    text = MllamaTextConfig(**TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]})
    return MllamaConfig(vision_config=eyes, text_config=text, image_token_index=NUMBERS["<|image|>"])


def _qwen2_audio() -> Any:
    from transformers import Qwen2AudioConfig

    ears = WHISPER | {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    text = {"model_type": "qwen2"} | TEXT
    return Qwen2AudioConfig(audio_config=ears, text_config=text, audio_token_index=NUMBERS["<|AUDIO|>"])


def _voxtral() -> Any:
    from transformers import VoxtralConfig

    ears = {
        "num_mel_bins": 16,
        "max_source_positions": 100,
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {"model_type": "llama", "head_dim": 8} | TEXT | {"vocab_size": tekken.VOCAB}
    return VoxtralConfig(
        audio_config=ears, text_config=text, audio_token_id=tekken.MARKS.index(voxtral.SOUND)
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "idefics3": lambda: _idefics("Idefics3"),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "gemma3": _gemma3,
    "qwen2_vl": lambda: _qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL"),
    "qwen3_vl": lambda: _qwen("Qwen3VL"),
    "mllama": _mllama,
    "qwen2_audio": _qwen2_audio,
    "voxtral": _voxtral,
}
MARK = {
    "llava": "<image>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "gemma3": "<start_of_image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "mllama": "<|image|>",
    "qwen2_audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}


def model_of(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of random weights: every parameter is moved, so that biases, gains and gates count."""
    torch.manual_seed(seed)
    model = AutoModelForMultimodalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.lm_head.weight[2] *= 0.1  # else some end every answer at once
    return model


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(NUMBERS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Fuse()
    special = {"gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>")}.get(family)
    names = ("image_token", "boi_token", "eoi_token")
    more = dict(zip(names, special, strict=True)) if special else {}
    if family == "mllama":
        more = {"image_token": "<|image|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=[mark for mark in MARKS[3:] if mark not in more.values()],
        **({"extra_special_tokens": more} if more else {}),
    )


def template_of(family: str) -> str:
    kind = "audio" if family == "qwen2_audio" else "image"
    return (
        "{% for m in messages %}<s>{{ m['role'] }} {% for p in m['content'] %}{% if p['type'] == '"
        + kind
        + "' %}"
        + MARK[family]
        + " {% else %}{{ p['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant {% endif %}"
    )


@cache
def processor_of(family: str) -> Any:
    """The family's own processor with pictures of 32 x 32 pixels, or sound of a second."""
    import transformers as tf

    from understudy.processor import without_video

    words, template = tokenizer_of(family), template_of(family) if family in MARK else ""
    if family == "llava":
        eyes = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        return tf.LlavaProcessor(
            eyes,
            words,
            patch_size=8,
            vision_feature_select_strategy="default",
            image_token="<image>",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family in ("idefics3", "smolvlm"):
        name = "Idefics3" if family == "idefics3" else "SmolVLM"
        eyes = getattr(tf, name + "ImageProcessorPil")(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        )
        maker = without_video(getattr(tf, name + "Processor"))
        video = {"video_processor": None} if family == "smolvlm" else {}
        return maker(eyes, words, image_seq_len=4, chat_template=template, **video)
    if family == "gemma3":
        eyes = tf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        return tf.Gemma3Processor(eyes, words, image_seq_length=4, chat_template=template)
    if family.startswith("qwen") and family != "qwen2_audio":
        eyes = tf.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=256, max_pixels=1024)
        name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
        return without_video(getattr(tf, name + "Processor"))(eyes, words, chat_template=template)
    if family == "mllama":
        eyes = tf.MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=2)
        return tf.MllamaProcessor(eyes, words, chat_template=template)
    if family == "voxtral":
        words = tekken.write(Path(tempfile.mkdtemp()), seconds=2)
        return voxtral.Voxtral(tf.WhisperFeatureExtractor(feature_size=16, chunk_length=2), words)
    ears = tf.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    return tf.Qwen2AudioProcessor(ears, words, chat_template=template)


def saved(family: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint as a hub would hold it."""
    from understudy.compress.checkpoint import save

    processor = processor_of(family)
    return save(model_of(family, seed), processor.tokenizer, folder, processor=processor)


def picture(color: tuple[int, int, int], box: int = 20) -> str:
    """A square on grey, as a data URL."""
    image = Image.new("RGB", (32, 32), (90, 90, 90))
    image.paste(color, (4, 4, 4 + box, 4 + box))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tone(hertz: float, seconds: float = 0.5, rate: int = 8000) -> str:
    """A sine as WAV, base64."""
    import math

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        count = int(seconds * rate)
        values = [int(20000 * math.sin(2 * math.pi * hertz * i / rate)) for i in range(count)]
        sound.writeframes(struct.pack(f"<{count}h", *values))
    return base64.b64encode(buffer.getvalue()).decode()


def chats(kind: str = "image") -> list[Chat]:
    """Twelve chats about a picture or sound, some of two turns, and two without any."""
    colors = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 180, 30)}
    made: list[Chat] = []
    for number, (name, color) in enumerate([*colors.items()] * 4):
        shown: dict[str, Any] = {"type": "image_url", "image_url": {"url": picture(color, 8 + number)}}
        if kind == "audio":
            shown = {
                "type": "input_audio",
                "input_audio": {"data": tone(200.0 * (number + 1)), "format": "wav"},
            }
        asked = [shown, {"type": "text", "text": "what is the color"}]
        chat: Chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"it is {name}"}]
        if number % 4 == 3:
            chat += [{"role": "user", "content": [shown]}, {"role": "assistant", "content": "yes"}]
        made.append(chat)
    plain: Chat = [
        {"role": "user", "content": "is red the color"},
        {"role": "assistant", "content": "no it is blue"},
    ]
    return [*made, plain, [*plain, *plain]]


def reset_projector(model: Any, teacher: Any) -> None:
    """A narrow model's projector as plain slicing leaves it: the first dimensions of the teacher's."""
    from understudy.compress.decoder import family_of, layers_of

    host = family_of(model).host
    for path in filter(None, (*(host.inner or ()), host.crossing)):
        narrow, wide = model.get_submodule(path), teacher.get_submodule(path)
        with torch.no_grad():
            rows, columns = narrow.weight.shape
            narrow.weight.copy_(wide.weight[:rows, :columns])
            if narrow.bias is not None:
                narrow.bias.copy_(wide.bias[:rows])
    for mine, theirs in zip(layers_of(model), layers_of(teacher), strict=True):
        if mine.gated:
            for name in ("k", "v"):
                weight = getattr(mine, name).weight
                weight.data.copy_(getattr(theirs, name).weight[: len(weight), : weight.shape[1]])
