"""Make the model and the pictures of recipe=tiny_vision: shapes, and what is asked of them.

The model is LLaVA as its checkpoints are: a CLIP tower, a projector, a Llama decoder and LLaVA's
processor, with 0.2 M random weights. A picture shows one to four shapes of one colour; its colour
and its count are asked for. No held-out picture has a count of a shape in a colour that a training
picture has. The same seed gives the same pictures, rows and weights:

    python recipes/data/tiny_vision.py
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

COLOURS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (37, 99, 235), "yellow": (240, 196, 25),
}  # fmt: skip
PICTURES, HELD_OUT = 720, 48
"""How many pictures are drawn to train on, and how many are held out."""
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
SHAPES = ("square", "circle", "triangle")
QUESTIONS = {
    "colour": ("What colour is it?", "Which colour do you see?", "Name the colour."),
    "count": ("How many are there?", "Count the shapes.", "What number of shapes is it?"),
}
SIZE = 32
"""Height and width of a picture, in pixels."""
PATCH = 8
"""Height and width of what the tower makes one vector of, in pixels."""
PAD, BEGIN, END, IMAGE = "<pad>", "<|im_start|>", "<|im_end|>", "<image>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Scene = tuple[str, int, str]
"""A colour, a count and a shape."""


def draw_picture(scene: Scene, chance: random.Random) -> Image.Image:
    """Return a picture of a scene: its shapes lie in different quarters."""
    colour, count, shape = scene
    ground = tuple(chance.randint(225, 255) for _ in range(3))
    picture = Image.new("RGB", (SIZE, SIZE), ground)
    pen = ImageDraw.Draw(picture)
    half = SIZE // 2
    quarters = [*product((0, half), repeat=2)]
    for left, top in chance.sample(quarters, count):
        size = chance.randint(8, 12)
        x, y = left + chance.randint(1, half - size - 1), top + chance.randint(1, half - size - 1)
        box = (x, y, x + size, y + size)
        ink = tuple(max(0, min(255, value + chance.randint(-15, 15))) for value in COLOURS[colour])
        if shape == "square":
            pen.rectangle(box, fill=ink)
        elif shape == "circle":
            pen.ellipse(box, fill=ink)
        else:
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=ink)
    return picture


def split_scenes(chance: random.Random) -> tuple[list[Scene], list[Scene]]:
    """Return the scenes of training, and those that are held out: a quarter of all."""
    scenes = [*product(COLOURS, COUNTS, SHAPES)]
    chance.shuffle(scenes)
    held_out = len(scenes) // 4
    return scenes[held_out:], scenes[:held_out]


def write_rows(
    folder: Path, side: str, scenes: list[Scene], pictures: int, chance: random.Random
) -> None:
    """Draw pictures of these scenes in turn, and write two rows for each of them."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    with (folder / f"{side}.jsonl").open("w", encoding="utf-8") as file:
        for number in range(pictures):
            scene = scenes[number % len(scenes)]
            name = f"pictures/{side}_{number:03}.png"
            draw_picture(scene, chance).save(folder / name)
            for row in make_rows(name, scene, chance):
                file.write(json.dumps(row) + "\n")


def make_rows(picture: str, scene: Scene, chance: random.Random) -> Iterator[dict]:
    """Yield a row for the colour and a row for the count of a picture."""
    answers = {"colour": scene[0], "count": COUNTS[scene[1]]}
    for topic, answer in answers.items():
        question = {"type": "text", "text": chance.choice(QUESTIONS[topic])}
        user = [{"type": "image", "image": picture}, question]
        yield {
            "messages": [
                {"role": "user", "content": user},
                {"role": "assistant", "content": answer},
            ]
        }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that knows the words of the questions and answers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END, IMAGE]
    trainer = trainers.BpeTrainer(
        special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    texts = [*COLOURS, *COUNTS.values(), *(text for each in QUESTIONS.values() for text in each)]
    backend.train_from_iterator([*texts, "user\n", "assistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, chat_template=TEMPLATE,
        extra_special_tokens={"image_token": IMAGE},
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return LLaVA's processor: an image is one token for each patch."""
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return LlavaProcessor(
        pixels, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, init: float = 0.1
) -> LlavaForConditionalGeneration:
    """Return a LLaVA of two layers on either side, with random weights."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.1,
    }  # fmt: skip
    tower = {"model_type": "clip_vision_model", "image_size": SIZE, "patch_size": PATCH}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in
           {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}.items()}  # fmt: skip
    config = LlavaConfig(
        vision_config=tower | sizes, text_config=text | sizes | ids,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def main() -> None:
    """Write the pictures with their rows, and the model with its processor."""
    parser = argparse.ArgumentParser(description="Make what recipe=tiny_vision trains.")
    parser.add_argument("--out", type=Path, default=Path("tiny_vision"), help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other ones")
    args = parser.parse_args()
    disable_progress_bar()
    chance = random.Random(args.seed)
    train, held_out = split_scenes(chance)
    for side, scenes, count in (("train", train, PICTURES), ("heldout", held_out, HELD_OUT)):
        write_rows(args.out, side, scenes, count, chance)
    tokenizer = make_tokenizer()
    make_model(tokenizer, args.seed).save_pretrained(args.out / "model")
    make_processor(tokenizer).save_pretrained(args.out / "model")
    pictures = f"{PICTURES} pictures to train on and {HELD_OUT} held out"
    print(f"wrote {args.out}: the model, its processor, {pictures}, with two rows each")


if __name__ == "__main__":
    main()
