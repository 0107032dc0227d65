"""A request with an image to a tiny Qwen3.5, and transformers' answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from support.sglang.answers import TOKENS, reference
from support.sglang.http_server import word, words

__all__ = ["PROMPT", "answer_to_image", "write_image", "write_processor"]

_MARKS = {500: "<|image_pad|>", 501: "<|video_pad|>", 502: "<|vision_start|>", 503: "<|vision_end|>"}
"""The tokens that ``config.json`` of the tiny models names for images."""
PROMPT = f"{word(1)} {_MARKS[502]}{_MARKS[500]}{_MARKS[503]} {word(5)} {word(6)}"
"""A text around an image, whose marks SGLang finds without spaces only."""


def write_processor(checkpoint: Path) -> Any:
    """Writes the files of a processor of text and images, and returns it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = json.loads((checkpoint / "config.json").read_text())
    texts, vision = words(config["text_config"]["vocab_size"]), config["vision_config"]
    for token, mark in _MARKS.items():
        texts[token] = mark
    tokenizer = Tokenizer(models.WordLevel({text: token for token, text in enumerate(texts)}, unk_token=texts[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*_MARKS.values()])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=texts[2], unk_token=texts[0], pad_token=texts[0]
    )
    fast.image_token, fast.video_token, fast.vision_start_token, fast.vision_end_token = _MARKS.values()
    patches = {
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    images = transformers.Qwen2VLImageProcessor(**patches, size={"shortest_edge": 32**2, "longest_edge": 64**2})
    videos = transformers.Qwen3VLVideoProcessor(**patches)
    processor = transformers.Qwen3VLProcessor(images, fast, videos, chat_template="{{ messages }}")
    processor.save_pretrained(checkpoint)
    return processor


def write_image(path: Path) -> Any:
    """Writes an image of random colours as a PNG file, and returns it."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    image = Image.frombytes("RGB", (64, 64), bytes(torch.randint(256, (64 * 64 * 3,), generator=draw).tolist()))
    image.save(path)
    return image


def answer_to_image(dense: Path, processor: Any, image: Any) -> list[int]:
    """Transformers' tokens after :data:`PROMPT` with ``image`` in it, in float32."""
    inputs = processor(text=[PROMPT], images=[image], return_tensors="pt")
    out = reference(dense).generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens
