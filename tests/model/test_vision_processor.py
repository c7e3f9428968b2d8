"""A model's own processor: ids, pixels and positions equal to those of its own calls."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import trl
from transformers import AutoProcessor

from helpers.model_families import save_family
from helpers.vision_families import (
    VISION_FAMILIES,
    make_vision_model,
    picture,
    save_vision_processor,
    vision_tokenizer,
)
from luthier.chat import ChatEncoder, ChatError
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.vision_processor import find_vision_processor

FAMILIES = sorted(VISION_FAMILIES)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load the processor of a family, saved once, as luthier does."""
    loaded = {}

    def load_family(name):
        if name not in loaded:
            folder = save_vision_processor(tmp_path_factory.mktemp(name), name)
            loaded[name] = find_vision_processor(ModelConfig(path=str(folder)))
        return loaded[name]

    return load_family


def own_processor(vision, name):
    """The processor as transformers loads it; without video where torchvision is missing."""
    if VISION_FAMILIES[name].needs_torchvision:
        return vision.processor
    return AutoProcessor.from_pretrained(vision.model.path)


def image(width, height, seed=0):
    return {"type": "image", "image": picture(width, height, seed)}


def text(value):
    return {"type": "text", "text": value}


def turn(role, *content):
    return {"role": role, "content": list(content)}


CONVERSATIONS = {
    "an image before the text": [turn("user", image(40, 60), text("What is it?"))],
    "several images and turns": [
        turn("user", text("This: "), image(90, 30), text(" or this: "), image(84, 56, 1)),
        turn("assistant", text("The first.")),
        turn("user", image(200, 120, 2), text("And now?")),
    ],
    "an image alone": [turn("user", image(33, 47))],
}


def as_rows_have_it(messages):
    """The messages with references in place of pictures."""
    return [{**m, "content": [*map(reference, m["content"])]} for m in messages]


def reference(part):
    if part["type"] == "text":
        return part
    size = {"width": part["image"].width, "height": part["image"].height}
    return {"type": "image", "image": size}


def pictures_of(messages):
    return [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]


def encode_prompt(vision, messages):
    """The ids of a prompt as luthier makes them, with the processor in the encoder."""
    encoder = ChatEncoder(vision.tokenizer, images=vision)
    return encoder.prompt(as_rows_have_it(messages))


@pytest.mark.parametrize("case", sorted(CONVERSATIONS))
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_inputs_of_a_prompt_are_those_of_the_processors_own_call(load, name, case):
    vision, messages = load(name), CONVERSATIONS[case]
    expected = own_processor(vision, name).apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = torch.tensor([encode_prompt(vision, messages)])
    pixels = vision.pixel_inputs([pictures_of(messages)])
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made |= pixels | vision.token_type_inputs(ids)
    assert sorted(made) == sorted(expected)
    for key, value in made.items():
        assert value.dtype == expected[key].dtype, key
        assert value.equal(expected[key]), key


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "zoom",
            "description": "Shows a part of the image.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer", "description": "Its left edge."}},
                "required": ["x"],
            },
        },
    }
]
CALL = turn("assistant") | {
    "tool_calls": [
        {"type": "function", "id": "c1", "function": {"name": "zoom", "arguments": {"x": 3}}}
    ]
}
RESULT = {"name": "zoom", "tool_call_id": "c1"}
TOOL_CHATS = {
    "tools": [turn("user", image(40, 60), text("Zoom?"))],
    "a call and its result": [
        turn("system", text("Be brief.")),
        turn("user", image(40, 60), text(" or "), image(90, 30, 1)), CALL,
        turn("tool", text("It is red.")) | RESULT,
    ],
    "an image as a result": [
        turn("user", text("Look.")), CALL, turn("tool", image(90, 30, 1), text("this")) | RESULT,
        turn("assistant", text("A cat.")), turn("user", image(40, 60), text("And this?")),
    ],
}  # fmt: skip


TOOL_TEMPLATES = [
    ("gemma4", "gemma4"), ("gemma4", "gemma4_v5"),
    ("qwen3_vl", "qwen3_vl"), ("qwen3_5", "qwen3_5_think"),
]  # fmt: skip
"""Families with templates that show tools, by their names in TRL."""


@pytest.mark.parametrize("case", TOOL_CHATS)
@pytest.mark.parametrize(("name", "template"), TOOL_TEMPLATES)
def test_tools_and_images_of_a_prompt_are_those_of_the_processors_own_call(
    load, name, template, case
):
    vision, messages = load(name), TOOL_CHATS[case]
    rows = as_rows_have_it(messages)
    source = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text("utf-8")
    encoder = ChatEncoder(vision.tokenizer, source, images=vision)
    if template == "gemma4" and case == "an image as a result":
        with pytest.raises(ChatError, match=r"shows 0 of the 1 images.* of this role .tool."):
            encoder.prompt(rows, TOOLS)
        return
    expected = vision.processor.apply_chat_template(
        messages, source, tools=TOOLS, tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )  # fmt: skip
    assert encoder.prompt(rows, TOOLS) == expected["input_ids"][0].tolist()
    made = vision.pixel_inputs([pictures_of(messages)])
    assert made
    assert all(value.equal(expected[key]) for key, value in made.items())


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_calls_and_replies_train_beside_images(load, name):
    vision = load(name)
    messages = [*TOOL_CHATS["a call and its result"], turn("assistant", text("Red."))]
    rows = [{**message, "content": [*map(reference, message["content"])]} for message in messages]
    (sequence,) = ChatEncoder(vision.tokenizer, images=vision).encode(rows, TOOLS)
    trained = vision.tokenizer.decode([token for token in sequence.labels if token != -100])
    assert trained == (
        '<tool_call>\n{"name": "zoom", "arguments": {"x": 3}}\n</tool_call><|im_end|>Red.<|im_end|>'
    )
    assert [span.number for span in sequence.images] == [0, 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_of_a_batch_are_those_of_the_processors_own_call(load, name):
    vision = load(name)
    rows = [[turn("user", text("No picture."))], *CONVERSATIONS.values()]
    expected = own_processor(vision, name).apply_chat_template(
        rows, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    made = vision.pixel_inputs([pictures_of(row) for row in rows])
    made |= vision.token_type_inputs(expected["input_ids"])
    assert {"input_ids", "attention_mask", *made} == set(expected)
    for key, value in made.items():
        assert value.equal(expected[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_replies_train_and_tokens_of_images_do_not(load, name):
    vision = load(name)
    messages = [*CONVERSATIONS["several images and turns"], turn("assistant", text("A cat."))]
    encoder = ChatEncoder(vision.tokenizer, images=vision)
    sequences = encoder.encode(as_rows_have_it(messages))
    image_token = vision.tokenizer.convert_tokens_to_ids(VISION_FAMILIES[name].image_token)
    (sequence,) = sequences
    trained = [token for token in sequence.labels if token != -100]
    assert image_token in sequence.input_ids
    assert image_token not in trained
    assert "The first." in vision.tokenizer.decode(trained)
    assert "A cat." in vision.tokenizer.decode(trained)
    assert [span.number for span in sequence.images] == [0, 1, 2]
    for span, image in zip(sequence.images, pictures_of(messages), strict=True):
        size = {"height": image.height, "width": image.width}
        assert sequence.input_ids[span.start : span.stop] == vision.encode_image(size)


def test_a_batch_without_images_has_no_inputs_of_images(load):
    assert load("idefics3").pixel_inputs([[], []]) == {}


SOFT = "<image_soft_token>" * 4
FOUR = "<image>" * 4
AROUND = "<fake_token_around_image>"
TEXTS = [
    ("gemma3", (60, 40), f"\n\n<start_of_image>{SOFT}<end_of_image>\n\n"),
    ("llava_clip", (60, 40), FOUR),
    ("llava_siglip", (900, 20), FOUR),
    ("qwen2_vl", (60, 40), "<|image_pad|>" * 2),
    ("qwen2_vl", (56, 84), "<|image_pad|>" * 6),
    ("qwen3_vl", (60, 40), "<|image_pad|>" * 2),
    (
        "idefics3",
        (30, 60),
        f"{AROUND}<row_1_col_1>{FOUR}{AROUND}<row_1_col_2>{FOUR}\n"
        f"\n{AROUND}<global-img>{FOUR}{AROUND}",
    ),
]


@pytest.mark.parametrize(
    ("name", "size", "expected"), TEXTS, ids=[f"{n} {h}x{w}" for n, (h, w), _ in TEXTS]
)
def test_an_image_has_the_text_that_its_size_asks_for(load, name, size, expected):
    height, width = size
    assert load(name).expand({"height": height, "width": width}) == expected


SIZES = [(1, 1), (2, 3), (28, 28), (29, 27), (64, 63), (100, 10), (10, 100), (56, 57), (333, 444)]


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_by_arithmetic_are_those_of_pictures_that_are_processed(load, name):
    vision = load(name)
    processed = pickle.loads(pickle.dumps(vision))
    processed._sizes = False
    for height, width in SIZES:
        size = {"height": height, "width": width}
        assert vision.expand(size) == processed.expand(size), size
    assert vision._sizes, "no arithmetic stood the test"


def test_a_size_that_the_processor_refuses_is_said(load):
    with pytest.raises(ChatError, match=r"an image of 2000 x 4 pixels.*refuses.*aspect ratio"):
        load("qwen2_vl").expand({"height": 4, "width": 2000})


def test_a_line_that_would_be_resized_to_a_bomb_is_said(load):
    """The shortest edge becomes 28 pixels, and the longest one grows as much."""
    words = r"an image of 120000 x 1 pixels.*it would be resized to 3360000 x 28 pixels, more than"
    with pytest.raises(ChatError, match=words):
        load("llava_clip").expand({"height": 1, "width": 120_000})
    assert load("llava_clip").expand({"height": 1, "width": 100_000}) == FOUR


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_positions_of_a_document_are_those_of_the_model(load, name):
    vision, messages = load(name), CONVERSATIONS["several images and turns"]
    ids = torch.tensor(encode_prompt(vision, messages))
    pixels = vision.pixel_inputs([pictures_of(messages)])
    grids = {"image_grid_thw": pixels["image_grid_thw"]}
    expected, _ = make_vision_model(name).model.get_rope_index(
        ids[None], **vision.token_type_inputs(ids[None]), **grids
    )
    positions = vision.position_ids(ids, grids)
    assert positions.equal(expected[:, 0])
    assert positions.unique().numel() < len(ids)


def test_a_model_that_counts_in_one_direction_has_no_positions_of_its_own(load):
    assert load("gemma3").position_ids(torch.tensor([1, 2]), {}) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_are_json_and_differ_between_processors(load, name):
    settings = load(name).settings()
    assert settings["processor_class"] == VISION_FAMILIES[name].processor
    assert "tokenizer" not in settings


def test_a_model_of_text_has_no_vision_processor(tmp_path):
    assert find_vision_processor(ModelConfig(path=str(save_family(tmp_path, "llama")))) is None


def test_missing_files_of_the_processor_are_said(load, tmp_path):
    shutil.copytree(load("llava_clip").model.path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(UserError, match=r"model.path=.*processor"):
        find_vision_processor(ModelConfig(path=str(tmp_path)))


def test_a_processor_that_writes_no_text_for_an_image_is_refused(tmp_path):
    transformers.Idefics2Config(architectures=["Idefics2ForConditionalGeneration"]).save_pretrained(
        tmp_path
    )
    transformers.Idefics2Processor(
        transformers.Idefics2ImageProcessorPil(), vision_tokenizer("idefics3")
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"with Idefics2Processor: it has no text for an image"):
        find_vision_processor(ModelConfig(path=str(tmp_path)))
