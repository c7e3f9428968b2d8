"""Tiny random vision-language models with their own processors, saved as their checkpoints are.

An image of a few dozen pixels is a few tokens. Each family shows another rule: tiles with markers
(Idefics3), a fixed count (LLaVA), a token of its own in the template and blocks that see each other
(Gemma 3), a count by the size and positions in three directions (Qwen).
"""

import functools
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from PIL import Image
from tokenizers import processors

from helpers.chatml import byte_tokenizer
from helpers.model_families import MROPE, PIXEL_TOWER, QWEN_TOWER, SIZES, SWITCHED, draw_weights
from luthier.model.model_class import choose_attention
from luthier.model.varlen_attention import register_varlen_attention

TILES = tuple(f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4))
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LONG = {"max_position_embeddings": 1024}
"""A conversation of bytes with some images is longer than the other families' models read."""


@dataclass(frozen=True)
class VisionFamily:
    """A family has the class of its model, its tokens and its processor's classes."""

    architecture: str
    """The class that checkpoints of the family name."""
    config: str
    """The class of its configuration."""
    processor: str
    """The class of its processor."""
    image_processor: str
    """The class of its image processor, without torchvision."""
    template: str
    """The chat template, by its name in TRL."""
    before: tuple[str, ...]
    """The tokens with the ids 0, 1 and 2: for padding, for a beginning, for an end."""
    after: tuple[str, ...]
    """The other control tokens, whose ids begin with 259."""
    image_token: str
    """The token that stands for a piece of an image in the ids."""
    adds_bos: bool = False
    """Whether the tokenizer writes the second token in front of a text."""
    image_settings: dict = field(default_factory=dict)
    processor_settings: dict = field(default_factory=dict)
    tokenizer_settings: dict = field(default_factory=dict)
    text: dict = field(default_factory=dict)
    tower: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    """Settings of the configuration; a token's name stands for its id."""
    needs_torchvision: bool = False
    """Whether the processor's class asks for a video processor, which needs torchvision."""


CLIP_SIZES = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
MROPE_SECTIONS = {"rope_parameters": MROPE | {"mrope_section": [4, 2, 2]}}
QWEN_SETTINGS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
QWEN_SIZES = {"patch_size": 14, "merge_size": 2,
              "size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 84}}  # fmt: skip
QWEN3_SIZES = {"patch_size": 16, "merge_size": 2,
               "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 96}}  # fmt: skip

VISION_FAMILIES = {
    "idefics3": VisionFamily(
        "Idefics3ForConditionalGeneration", "Idefics3Config",
        "Idefics3Processor", "Idefics3ImageProcessorPil", "idefics3",
        before=("<pad>", "<|begin_of_text|>", "<end_of_utterance>"),
        after=("<fake_token_around_image>", "<image>", "<global-img>", *TILES),
        image_token="<image>", adds_bos=True,
        image_settings={"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
        processor_settings={"image_seq_len": 4},
        text={"model_type": "llama"}, tower=PIXEL_TOWER,
        settings={"image_token_id": "<image>", "scale_factor": 1},
    ),
    "llava_clip": VisionFamily(
        "LlavaForConditionalGeneration", "LlavaConfig",
        "LlavaProcessor", "CLIPImageProcessorPil", "llava_next",
        before=("<pad>", "<s>", "</s>"), after=("<image>",), image_token="<image>", adds_bos=True,
        image_settings=CLIP_SIZES,
        processor_settings={"patch_size": 14, "vision_feature_select_strategy": "default",
                            "num_additional_image_tokens": 1},
        text={"model_type": "llama"},
        tower=PIXEL_TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
        settings={"image_token_index": "<image>", "image_seq_length": 4},
    ),
    "llava_siglip": VisionFamily(
        "LlavaForConditionalGeneration", "LlavaConfig",
        "LlavaProcessor", "SiglipImageProcessorPil", "llava_next",
        before=("<pad>", "<s>", "</s>"), after=("<image>",), image_token="<image>", adds_bos=True,
        image_settings={"size": {"height": 28, "width": 28}},
        processor_settings={"patch_size": 14, "vision_feature_select_strategy": "full",
                            "num_additional_image_tokens": 0},
        text={"model_type": "llama"},
        tower=PIXEL_TOWER | {"model_type": "siglip_vision_model", "num_hidden_layers": 2,
                             "vision_use_head": False},
        settings={"image_token_index": "<image>", "image_seq_length": 4,
                  "vision_feature_select_strategy": "full"},
    ),
    "gemma3": VisionFamily(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        "Gemma3Processor", "Gemma3ImageProcessorPil", "gemma3",
        before=("<pad>", "<bos>", "<end_of_turn>"),
        after=("<start_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        image_token="<image_soft_token>", adds_bos=True,
        image_settings={"size": {"height": 28, "width": 28}},
        processor_settings={"image_seq_length": 4},
        tokenizer_settings={"extra_special_tokens": {
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>"}},
        text={"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 32,
              "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
        tower=PIXEL_TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        settings={"image_token_index": "<image_soft_token>", "boi_token_index": "<start_of_image>",
                  "eoi_token_index": "<end_of_image>", "mm_tokens_per_image": 4},
    ),
    "gemma4": VisionFamily(
        "Gemma4ForConditionalGeneration", "Gemma4Config",
        "Gemma4Processor", "Gemma4ImageProcessorPil", "gemma4",
        before=("<pad>", "<bos>", "<turn|>"),
        after=("<|turn>", "<|image|>", "<|image>", "<image|>", "<|video|>", "<|audio|>",
               "<|audio>", "<audio|>"),
        image_token="<|image|>", adds_bos=True,
        image_settings={"max_soft_tokens": 70},
        tokenizer_settings={"extra_special_tokens": {
            "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
            "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}},
        text={"head_dim": 16, "global_head_dim": 32, "tie_word_embeddings": True,
              "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 32,
              "layer_types": ["sliding_attention", "full_attention"] * 2,
              "vocab_size_per_layer_input": 269, "hidden_size_per_layer_input": 16,
              "use_bidirectional_attention": "vision"},
        tower={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
               "num_attention_heads": 2, "num_key_value_heads": 2, "position_embedding_size": 256},
        settings={"image_token_id": "<|image|>", "video_token_id": "<|video|>",
                  "boi_token_id": "<|image>", "eoi_token_id": "<image|>",
                  "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>",
                  "audio_token_id": "<|audio|>", "audio_config": None},
        needs_torchvision=True,
    ),
    "qwen2_vl": VisionFamily(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        "Qwen2VLProcessor", "Qwen2VLImageProcessorPil", "qwen2_5_vl",
        before=CHATML_TOKENS, after=QWEN_TOKENS, image_token="<|image_pad|>",
        image_settings=QWEN_SIZES, text=MROPE_SECTIONS,
        tower={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
               "patch_size": 14},
        settings=QWEN_SETTINGS, needs_torchvision=True,
    ),
    "qwen2_5_vl": VisionFamily(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        "Qwen2_5_VLProcessor", "Qwen2VLImageProcessorPil", "qwen2_5_vl",
        before=CHATML_TOKENS, after=QWEN_TOKENS, image_token="<|image_pad|>",
        image_settings=QWEN_SIZES, text=MROPE_SECTIONS,
        tower={**QWEN_TOWER, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [0]},
        settings=QWEN_SETTINGS, needs_torchvision=True,
    ),
    "qwen3_5": VisionFamily(
        "Qwen3_5ForConditionalGeneration", "Qwen3_5Config",
        "Qwen3VLProcessor", "Qwen2VLImageProcessorPil", "qwen3_vl",
        before=CHATML_TOKENS, after=QWEN_TOKENS, image_token="<|image_pad|>",
        image_settings=QWEN3_SIZES,
        text=SWITCHED | {"rope_parameters": MROPE | {"partial_rotary_factor": 0.25,
                                                     "mrope_section": [2, 1, 1],
                                                     "mrope_interleaved": True}},
        tower=QWEN_TOWER, settings=QWEN_SETTINGS, needs_torchvision=True,
    ),
    "qwen3_vl": VisionFamily(
        "Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
        "Qwen3VLProcessor", "Qwen2VLImageProcessorPil", "qwen3_vl",
        before=CHATML_TOKENS, after=QWEN_TOKENS, image_token="<|image_pad|>",
        image_settings=QWEN3_SIZES,
        text={"head_dim": 16, "rope_parameters": MROPE | {"mrope_section": [4, 2, 2],
                                                          "mrope_interleaved": True}},
        tower=QWEN_TOWER | {"deepstack_visual_indexes": [0]},
        settings=QWEN_SETTINGS, needs_torchvision=True,
    ),
}  # fmt: skip
"""The families by a short name."""


@functools.cache
def vision_tokenizer(name):
    """The tokenizer of a family: bytes with the family's control tokens and its chat template."""
    family = VISION_FAMILIES[name]
    template = Path(trl.__file__).parent / "chat_templates" / f"{family.template}.jinja"
    pad, bos, eos = family.before
    tokenizer = byte_tokenizer(
        family.before, family.after, pad_token=pad, bos_token=bos, eos_token=eos,
        chat_template=template.read_text(encoding="utf-8"), **family.tokenizer_settings,
    )  # fmt: skip
    if family.adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, 1)]
        )
    return tokenizer


def make_vision_processor(name):
    """The family's own processor; None where its class cannot be made without torchvision."""
    family = VISION_FAMILIES[name]
    if family.needs_torchvision:
        return None
    tokenizer = vision_tokenizer(name)
    make = getattr(transformers, family.processor)
    return make(
        image_processor=_image_processor(family), tokenizer=tokenizer,
        chat_template=tokenizer.chat_template, **family.processor_settings,
    )  # fmt: skip


def make_vision_model(name, attention="sdpa"):
    """A random model of the family in float32, of the class that its checkpoints name."""
    register_varlen_attention()
    torch.manual_seed(0)
    model_class = getattr(transformers, VISION_FAMILIES[name].architecture)
    config = vision_config(name)
    chosen = choose_attention(config, model_class, attention)
    model = model_class._from_config(config, attn_implementation=chosen)
    draw_weights(model)
    return model.eval()


def vision_config(name):
    """The configuration of a tiny model of the family."""
    family = VISION_FAMILIES[name]
    tokenizer = vision_tokenizer(name)
    settings = {
        key: tokenizer.convert_tokens_to_ids(value) if f"{value}".startswith("<") else value
        for key, value in family.settings.items()
    }
    text = SIZES | LONG | {"vocab_size": len(tokenizer) + 5} | family.text
    make = getattr(transformers, family.config)
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    return make(text_config=text, vision_config=family.tower, **tied | settings)


def save_vision_family(folder, name):
    """A checkpoint of the family in a folder: weights, configuration, tokenizer, processor."""
    make_vision_model(name).save_pretrained(folder)
    return save_vision_processor(folder, name)


def save_vision_processor(folder, name):
    """A checkpoint of the family without its weights: what data preparation reads."""
    folder = Path(folder)
    family, config = VISION_FAMILIES[name], vision_config(name)
    config.architectures = [family.architecture]
    config.save_pretrained(folder)
    processor = make_vision_processor(name)
    if processor is not None:
        processor.save_pretrained(folder)
        return folder
    vision_tokenizer(name).save_pretrained(folder)
    # The files on the hub, which transformers with torchvision wrote.
    image_processor = json.loads(_image_processor(family).to_json_string())
    settings = image_processor | {"processor_class": family.processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def picture(width, height, seed=0):
    """A picture of pixels drawn by chance."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image):
    """The bytes of a picture's PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _image_processor(family):
    return getattr(transformers, family.image_processor)(**family.image_settings)
