"""Images of rows: found in every spelling, put in their places, counted against their parts."""

import pytest

from luthier.config.schema import SourceConfig
from luthier.data.formats import detect_format
from luthier.data.formats.image_parts import UnreadImage
from luthier.data.rows import Row, RowError
from luthier.errors import UserError


def read(row, **config):
    """The example of a row, with each image as the value that its row has."""
    rows = [Row(row, "rows.jsonl:1")]
    example = detect_format(SourceConfig(**config), rows, "rows.jsonl").read(rows[0])
    return {name: shown(value) for name, value in example.items()}


def shown(value):
    if isinstance(value, UnreadImage):
        return value.value
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list) else value


def text(content):
    return {"type": "text", "text": content}


def image(value):
    return {"type": "image", "image": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


REPLY = {"role": "assistant", "content": "Red."}
HOLE = {"type": "image"}
PARTS = {
    "a path": ({"type": "image", "image": "a.png"}, "a.png"),
    "a path under path": ({"type": "image", "path": "a.png"}, "a.png"),
    "an address": ({"type": "image", "url": "https://x.org/a.png"}, "https://x.org/a.png"),
    "base64 text": ({"type": "image", "base64": "iVBO"}, {"bytes": "iVBO"}),
    "what datasets stores": (
        {"type": "image", "image": {"bytes": b"png", "path": None}, "text": None},
        {"bytes": b"png", "path": None},
    ),
    "OpenAI's chat": (
        {"type": "image_url", "image_url": {"url": "https://x.org/a.png", "detail": "low"}},
        {"url": "https://x.org/a.png", "detail": "low"},
    ),
    "OpenAI's responses": (
        {"type": "input_image", "image_url": "data:image/png;base64,iVBO"},
        "data:image/png;base64,iVBO",
    ),
    "LLaMA-Factory's": ({"type": "image_url", "value": "a.png"}, "a.png"),
    "Anthropic's": (
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iV"}},
        {"bytes": "iV"},
    ),
}


@pytest.mark.parametrize(("part", "value"), PARTS.values(), ids=PARTS.keys())
def test_a_part_of_an_image_is_read_in_every_spelling(part, value):
    example = read({"messages": [user(part, text("Colour?")), REPLY]})
    assert example == {"messages": [user(image(value), text("Colour?")), REPLY], "images": 1}


Q = text("Colour?")
PLACED = {
    "columns fill parts in their order": (
        {"messages": [user(HOLE, Q), REPLY, user(text("And"), HOLE), REPLY], "images": ["a", "b"]},
        {},
        [user(image("a"), Q), REPLY, user(text("And"), image("b")), REPLY],
    ),
    "one image without a list": (
        {"messages": [user(HOLE, Q), REPLY], "image": "a"},
        {},
        [user(image("a"), Q), REPLY],
    ),
    "parts with and without a source": (
        {"messages": [user(HOLE, image("b"), Q), REPLY], "images": ["a"]},
        {},
        [user(image("a"), image("b"), Q), REPLY],
    ),
    "without parts they stand before the first text of a user": (
        {
            "messages": [{"role": "system", "content": "Be short."}, {"role": "user",
             "content": "Colour?"}, REPLY],
            "images": ["a", "b"],
        },
        {},
        [{"role": "system", "content": "Be short."}, user(image("a"), image("b"), Q), REPLY],
    ),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Colour?"}, {"from": "gpt",
             "value": "Red."}],
            "image": "a",
        },
        {},
        [user(image("a"), Q), REPLY],
    ),
    "LLaVA's files, whose line break behind the image is the template's": (
        {
            "conversations": [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt",
             "value": "Red."}],
            "image": "a",
        },
        {"image_placeholder": "<image>"},
        [user(image("a"), Q), REPLY],
    ),
    "a placeholder behind the text": (
        {"prompt": "Colour?\n<image>", "completion": "Red.", "images": ["a"]},
        {"image_placeholder": "<image>"},
        [user(Q, image("a")), REPLY],
    ),
    "placeholders within the text keep the white space around them": (
        {"prompt": "1: <image>\n2: <image>\nSame?", "completion": "Red.", "images": ["a", "b"]},
        {"image_placeholder": "<image>"},
        [user(text("1: "), image("a"), text("\n2: "), image("b"), text("\nSame?")), REPLY],
    ),
    "placeholders without any text": (
        {"prompt": "<image>\n<image>", "completion": "Red.", "images": ["a", "b"]},
        {"image_placeholder": "<image>"},
        [user(image("a"), image("b")), REPLY],
    ),
    "a reply that speaks of the placeholder": (
        {"prompt": "<image>Tag?", "completion": "<image>", "images": ["a"]},
        {"image_placeholder": "<image>"},
        [user(image("a"), text("Tag?")), {"role": "assistant", "content": "<image>"}],
    ),
    "Alpaca": (
        {"instruction": "Colour?", "output": "Red.", "image": "a"},
        {},
        [user(image("a"), Q), REPLY],
    ),
    "a prompt and its completion, the column by another name": (
        {"prompt": "Colour?", "completion": "Red.", "file_name": "a"},
        {"columns": {"images": "file_name"}},
        [user(image("a"), Q), REPLY],
    ),
    "a list in a cell of CSV": (
        {"prompt": "Colour?", "completion": "Red.", "images": '["a", "b"]'},
        {},
        [user(image("a"), image("b"), Q), REPLY],
    ),
    "an empty text": (
        {"prompt": "", "completion": "Red.", "image": "a"},
        {},
        [user(image("a")), REPLY],
    ),
    "a typed placeholder in a row without images is text": (
        {"messages": [{"role": "user", "content": "What is <image>?"}, REPLY]},
        {},
        None,
    ),
    "no image in this row": ({"prompt": "Hi", "completion": "Yo", "image": None}, {}, None),
}  # fmt: skip


@pytest.mark.parametrize(("row", "config", "messages"), PLACED.values(), ids=PLACED.keys())
def test_images_stand_where_the_row_says(row, config, messages):
    example = read(row, **config)
    if messages is None:
        assert "images" not in example
        assert all(isinstance(message["content"], str) for message in example["messages"])
        return
    plain = [{key: m[key] for key in ("role", "content")} for m in example["messages"]]
    assert plain == messages
    assert example["images"] == sum(str(messages).count(word) for word in ("'image':",))


def test_the_images_of_a_pair_are_those_of_its_prompt():
    pair = {"chosen": "Red.", "rejected": "Blue."}
    expected = {
        "prompt": [user(image("a"), Q)],
        "chosen": [REPLY],
        "rejected": [{"role": "assistant", "content": "Blue."}],
        "images": 1,
    }
    assert read({"prompt": "Colour?", "image": "a", **pair}) == expected
    assert read({"prompt": [user(HOLE, Q)], "images": ["a"], **pair}) == expected
    whole = {
        name: [user(HOLE, Q), {"role": "assistant", "content": reply}]
        for name, reply in pair.items()
    }
    assert read({**whole, "images": ["a"]}) == expected
    rated = read({"prompt": "Colour?", "completion": "Red.", "label": True, "image": "a"})
    assert rated == {
        "prompt": expected["prompt"], "completion": [REPLY], "label": True, "images": 1
    }  # fmt: skip


WRONG = {
    "more parts than images": (
        {"messages": [user(HOLE, HOLE, Q), REPLY], "images": ["a"]},
        {},
        "2 parts are images without a source, and the column 'images' has 1",
    ),
    "more images than parts": (
        {"messages": [user(HOLE, Q), REPLY], "images": ["a", "b"]},
        {},
        "1 part is an image without a source, and the column 'images' has 2",
    ),
    "a part without a source and no column": (
        {"messages": [user(HOLE, Q), REPLY]},
        {},
        "1 part is an image without a source, and it has no column of images",
    ),
    "a column beside parts that have their images": (
        {"messages": [user(image("a"), Q), REPLY], "images": ["b"]},
        {},
        "'images' has 1 image, and the parts of images in the messages have sources of their own",
    ),
    "a null among the images": (
        {"prompt": "Colour?", "completion": "Red.", "images": ["a", None]},
        {},
        "images[1] is null; expected an image",
    ),
    "typed placeholders that no setting explains": (
        {"prompt": "<image>\nColour?", "completion": "Red.", "images": ["a"]},
        {},
        "its texts hold <image> once, and it has 1 image, which would be placed before the "
        "text. If each marks an image, set 'dataset.image_placeholder=\"<image>\"'",
    ),
    "typed placeholders among parts of text": (
        {"messages": [user(text("<image>\n"), Q), REPLY], "images": ["a"]},
        {},
        "its texts hold <image> once, and it has 1 image, which would be placed before the text",
    ),
    "more placeholders than images": (
        {"prompt": "<image><image>Same?", "completion": "Red.", "images": ["a"]},
        {"image_placeholder": "<image>"},
        "2 parts are images without a source, and the column 'images' has 1",
    ),
    "two sources in a part": (
        {"messages": [user({"type": "image", "image": "a", "url": "b"}), REPLY]},
        {},
        "messages[0]: an image part has image and url; keep one of them",
    ),
    "a caption in the part of an image": (
        {"messages": [user({**image("a"), "text": "A door."}, Q), REPLY]},
        {},
        "messages[0]: an image part has a text ('A door.'), which no model would see",
    ),
    "a size for one image": (
        {"messages": [user({**image("a"), "max_pixels": 50176}, Q), REPLY]},
        {},
        "messages[0]: an image part has max_pixels, and the model's processor resizes all images",
    ),
    "an image in a part of text": (
        {"messages": [user({**Q, "image": "a"}), REPLY]},
        {},
        "messages[0]: a text part has an image (image); make it a part of its own",
    ),
    "images of a message, as Ollama has them": (
        {"messages": [{"role": "user", "content": "Colour?", "images": ["a"]}, REPLY]},
        {},
        "messages[0]: the message has 'images' beside its content, which no chat template shows; "
        "make each image a part",
    ),
    "an image of a turn": (
        {"conversations": [{"from": "human", "value": "Colour?", "image": "a"},
                           {"from": "gpt", "value": "Red."}]},
        {},
        "conversations[0]: the message has 'image' beside its content",
    ),
    "sound of a message": (
        {"messages": [{"role": "user", "content": "Who?", "audio": {"id": "a"}}, REPLY]},
        {},
        "the message has 'audio' beside its content, which no chat template shows; images are "
        "trained on, videos and sound are not",
    ),
    "a column of videos": (
        {"messages": [user(Q), REPLY], "videos": ["a.mp4"]},
        {},
        "the row has 'videos'; images are trained on, videos and sound are not. To leave it out, "
        "set 'dataset.remove_columns=[videos]'",
    ),
    "sound beside a prompt": (
        {"prompt": "Who?", "completion": "Bach.", "audio": {"bytes": b"RIFF", "path": None}},
        {},
        "the row has 'audio'; images are trained on, videos and sound are not",
    ),
    "two columns of images": (
        {"messages": [user(Q), REPLY], "images": ["a"], "image": "b"},
        {},
        "the row has 'image' beside 'images', and one column of images is read. To leave it out, "
        "set 'dataset.remove_columns=[image]'",
    ),
    "parts in another order than the images": (
        {"messages": [user({"type": "image", "index": 1}, {"type": "image", "index": 0}), REPLY],
         "images": ["a", "b"]},
        {},
        "the image part number 0 says index 1",
    ),
    "a video": (
        {"messages": [user({"type": "video", "video": "a.mp4"}), REPLY]},
        {},
        "a content part is 'video'; images are trained on, videos and sound are not",
    ),
    "sound": (
        {"messages": [user({"type": "input_audio", "input_audio": {"data": "x"}}), REPLY]},
        {},
        "a content part is 'input_audio'; images are trained on, videos and sound are not",
    ),
    "no user": (
        {"messages": [{"role": "assistant", "content": "Hi"}], "image": "a"},
        {},
        "it has images and no message of a user that they could be placed in",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "config", "words"), WRONG.values(), ids=WRONG.keys())
def test_images_that_cannot_be_placed_are_said(row, config, words):
    with pytest.raises(RowError) as error:
        read(row, **config)
    assert words in str(error.value)


def test_a_placeholder_is_for_conversations():
    with pytest.raises(UserError, match=r"dataset.image_placeholder is for conversations"):
        read({"text": "Hi"}, image_placeholder="<image>")


def test_columns_of_images_are_left_out_on_purpose():
    row = {"prompt": "Hi", "completion": "Yo", "image": "a.png"}
    assert "images" not in read(row, remove_columns=["image"])
    row |= {"images": ["b.png"], "videos": ["c.mp4"]}
    assert read(row, remove_columns=["image", "videos"])["images"] == 1
    # A mapping says which one is meant, and what a name stands for.
    row = {"audio": "Who?", "completion": "Bach.", "image": "a.png", "pictures": ["b", "c"]}
    made = read(row, columns={"prompt": "audio", "images": "pictures"})
    assert made["messages"][0]["content"] == [image("b"), image("c"), text("Who?")]


def test_what_arrow_fills_with_nulls_is_no_image():
    nothing = {"bytes": None, "path": None}
    parts = [
        {**image("a"), "text": None, "max_pixels": None},
        {**Q, "image": nothing, "image_url": None},
    ]
    row = {
        "messages": [{**user(*parts), "images": [], "audio": nothing}, REPLY],
        "videos": [], "audio": None,
    }  # fmt: skip
    made = read(row)
    assert (made["images"], made["messages"][0]["content"][0]) == (1, image("a"))
