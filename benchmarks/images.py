"""How fast rows with images are prepared, and how fast their batches are made.

    LUTHIER_ASSETS=folder OMP_NUM_THREADS=1 python benchmarks/images.py

Draws photograph-like JPEG files and prints, for the processor of Qwen2.5-VL (as many tokens as an
image has pixels for) and that of LLaVA-1.5 (576 tokens), in rows a second of one core:

- `prepare`: luthier reads, checks, encodes and writes the rows, with an empty cache: once a run;
- `again`: the same with a full cache, as a second run does it;
- `batches`: luthier's collator makes the pixels of rows that are prepared: in each epoch;
- `TRL`: `DataCollatorForVisionLanguageModeling` makes the same batches from the same files: it
  renders, tokenizes and makes pixels in each epoch.

The pixels of both are compared, and each ratio is of one run. Imports, tokenizers and processors
are there before a clock starts, and a few rows go through first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from luthier.config.schema import DatasetConfig, ModelConfig, SourceConfig
from luthier.data.batching.collators import PaddingCollator
from luthier.data.batching.image_collators import ImageCollator
from luthier.data.batching.samplers import to_document
from luthier.data.encoders.chat import ConversationEncoder
from luthier.data.prepare import PreparedData, prepare
from luthier.model.vision_processor import VisionProcessor, find_vision_processor

SIZES = ((640, 480), (480, 640), (800, 600), (1024, 768))
"""Widths and heights of the pictures."""
BATCH = 8
WARMING = 16
"""Rows that go through first, so that what is imported late is there."""
LLAVA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def draw_photo(size: tuple[int, int], chance: np.random.Generator) -> Image.Image:
    """A picture with soft forms and grain, whose JPEG is about as large as a photograph's."""
    forms = chance.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(forms).resize(size, Image.Resampling.BICUBIC), np.int16)
    grain = chance.normal(0, 6, soft.shape).astype(np.int16)
    return Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8))


def write_rows(folder: Path, name: str, count: int) -> str:
    """A file of rows of one image and two turns, and the images beside it."""
    chance = np.random.default_rng(0)
    words = "a the dog house red two in on and tree car blue near small".split()  # noqa: SIM905
    draw = random.Random(0)
    path = folder / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            image = f"{name}_{number:04}.jpg"
            draw_photo(SIZES[number % len(SIZES)], chance).save(folder / image, quality=90)
            question, first, second = (" ".join(draw.choices(words, k=20)) for _ in range(3))
            messages = [
                {"role": "user", "content": [{"type": "image", "image": image},
                                             {"type": "text", "text": question}]},
                {"role": "assistant", "content": first},
                {"role": "user", "content": "And what else?"},
                {"role": "assistant", "content": second},
            ]  # fmt: skip
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def load_qwen(folder: Path) -> VisionProcessor:
    """Qwen2.5-VL's processor with Qwen3's tokenizer, which has the same tokens for images."""
    trl_folder = Path(next(iter(find_spec("trl").submodule_search_locations)))
    template = (trl_folder / "chat_templates" / "qwen2_5_vl.jinja").read_text(encoding="utf-8")
    tokenizer = _tokenizer(template)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {"image": "image_pad", "video": "video_pad",
                            "vision_start": "vision_start", "vision_end": "vision_end"}.items()
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(**ids)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pixels = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    )
    settings = json.loads(pixels.to_json_string()) | {"processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return find_vision_processor(ModelConfig(path=str(folder)))


def load_llava(folder: Path) -> VisionProcessor:
    """LLaVA-1.5's processor of 336 x 336 pixels, with Qwen3's tokenizer."""
    tokenizer = _tokenizer(LLAVA_TEMPLATE)
    tokenizer.image_token = "<|image_pad|>"
    config = transformers.LlavaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>")
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    pixels = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE, image_token="<|image_pad|>",
    ).save_pretrained(folder)  # fmt: skip
    return find_vision_processor(ModelConfig(path=str(folder)))


def _tokenizer(template: str) -> Any:
    folder = Path(os.environ["LUTHIER_ASSETS"], "tokenizers", "qwen3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


FAMILIES = {"qwen2_5_vl": load_qwen, "llava": load_llava}


def prepare_rows(path: str, cache: str, vision: VisionProcessor) -> PreparedData:
    """What luthier makes of a file."""

    def encoder(kind: str, source: SourceConfig, key: str) -> ConversationEncoder:
        settings = {"date": "2025-01-02", "max_length": 4096}
        return ConversationEncoder(vision.tokenizer, settings, vision)

    config = DatasetConfig(path=path, cache=cache)
    return prepare(config, encoder, vision.tokenizer, 0)


def make_batches(prepared: PreparedData, vision: VisionProcessor) -> Iterator[dict[str, Any]]:
    """luthier's batches of the rows, in their order."""
    collator = ImageCollator(PaddingCollator(vision.tokenizer.pad_token_id), vision)
    rows = prepared.train
    documents = (
        to_document(rows.table.row(number))._replace(images=rows.read_images(number))
        for number in range(len(rows))
    )
    while batch := [(document,) for document in islice(documents, BATCH)]:
        yield collator(batch)


def make_trl_batches(path: str, vision: VisionProcessor) -> Iterator[dict[str, Any]]:
    """TRL's batches of the same rows."""
    collator = DataCollatorForVisionLanguageModeling(vision.processor)
    folder = Path(path).parent
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for start in range(0, len(rows), BATCH):
        examples = []
        for row in rows[start : start + BATCH]:
            first, *others = row["messages"]
            image, text = first["content"]
            opened = [Image.open(folder / image["image"])]
            # TRL 1.16 puts images into a later turn whose content is a text.
            others = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in others]
            shown = [first | {"content": [{"type": "image"}, text]}, *others]
            examples.append({"messages": shown, "images": opened})
        yield collator(examples)


def rate(count: int, work: Any) -> float:
    """Rows a second of one core for some work, which is called."""
    # Of the processor's time: others may use the machine, too.
    start = time.process_time()
    work()
    return count / (time.process_time() - start)


def check_equal(path: str, prepared: PreparedData, vision: VisionProcessor) -> None:
    """Stop where the first batches of both differ."""
    ours, theirs = next(make_batches(prepared, vision)), next(make_trl_batches(path, vision))
    for name in ("input_ids", "pixel_values"):
        if not torch.equal(ours[name], theirs[name]):
            raise SystemExit(f"{name} of the first batch differ")


def measure(name: str, path: str, few: str, count: int) -> None:
    """Measure one family and print its rates."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        vision = FAMILIES[name](Path(folder))
        warmed = prepare_rows(few, cache, vision)
        check_equal(few, warmed, vision)
        rates = {
            "prepare": rate(count, lambda: prepare_rows(path, cache, vision)),
            "again": rate(count, lambda: prepare_rows(path, cache, vision)),
        }
        prepared = prepare_rows(path, cache, vision)
        rates["batches"] = rate(count, lambda: [*map(len, make_batches(prepared, vision))])
        rates["TRL"] = rate(count, lambda: [*map(len, make_trl_batches(path, vision))])
        tokens = prepared.train_counts.tokens / count
    print(f"{name}: {count} rows of {tokens:,.0f} tokens, rows a second of one core:")
    for each, value in rates.items():
        ratio = "" if each == "TRL" else f", {value / rates['TRL']:.2f} times TRL's"
        print(f"  {each:<8} {value:>9,.1f}{ratio}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=240, help="rows of one image each")
    parser.add_argument("--family", choices=[*FAMILIES], help="one of both alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        few = write_rows(Path(folder), "few", WARMING)
        path = write_rows(Path(folder), "rows", options.rows)
        for name in [options.family] if options.family else FAMILIES:
            measure(name, path, few, options.rows)


if __name__ == "__main__":
    main()
