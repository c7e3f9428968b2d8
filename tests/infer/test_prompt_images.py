"""Prompts with images are answered as plain transformers answers the processor's own inputs."""

import base64
import json

import pytest
import torch
import transformers
from PIL import Image

from helpers.chatml import jsonl
from helpers.vision_families import VISION_FAMILIES, picture, png, save_vision_family
from luthier.cli.model_arguments import make_dataset_config
from luthier.errors import UserError
from luthier.infer import LLM
from luthier.infer.prompt_images import list_prompt_images, open_prompts
from luthier.infer.questions import read_prompt_rows

FAMILIES = ("idefics3", "llava_clip", "llava_siglip", "gemma3", "qwen2_vl", "qwen3_vl")
SIZES = {"wide": (60, 28), "tall": (28, 57), "small": (30, 30)}
NEW_TOKENS = 6


def text(value):
    return {"type": "text", "text": value}


def image(value):
    return {"type": "image", "image": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def bot(value):
    return {"role": "assistant", "content": [text(value)]}


class Family:
    """A tiny model in a folder with pictures, in luthier and in plain transformers."""

    def __init__(self, folder, name):
        self.folder, self.facts = folder, VISION_FAMILIES[name]
        save_vision_family(folder / "model", name)
        self.pictures = {each: picture(*size, n) for n, (each, size) in enumerate(SIZES.items())}
        for each, made in self.pictures.items():
            made.save(folder / f"{each}.png")
        self.llm = LLM(str(folder / "model"), device="cpu", dtype="float32")

    def path(self, name):
        return str(self.folder / f"{name}.png")

    def prompts(self):
        """Conversations with images at several places, and one of text alone."""
        return [
            [user(image(self.path("wide")), text("What is it?"))],
            [user(text("Hello"))],
            [
                user(text("This "), image(self.path("tall")), text(" or "),
                     image(self.path("small")), text("?")),
                bot("The first."),
                user(text("And "), image(self.path("wide"))),
            ],
        ]  # fmt: skip

    def expected(self, prompts):
        """What plain transformers writes behind each of them, greedily and one by one."""
        model = getattr(transformers, self.facts.architecture)
        model = model.from_pretrained(self.folder / "model").eval()
        processor = self.llm.encoder.images.processor.processor
        replies = []
        for prompt in prompts:
            opened = [
                {**message, "content": [
                    image(Image.open(part["image"])) if part["type"] == "image" else part
                    for part in message["content"]
                ]}
                for message in prompt
            ]  # fmt: skip
            inputs = processor.apply_chat_template(
                opened, tokenize=True, add_generation_prompt=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            with torch.no_grad():
                out = model.generate(
                    **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
                    eos_token_id=self.llm.stop_token_ids,
                )  # fmt: skip
            width = inputs["input_ids"].shape[1]
            replies.append((width, out[0, width:].tolist()))
        return replies


def ids(replies, stops):
    """The tokens of replies with the lengths of their prompts, without stop tokens."""
    return [(reply.prompt_tokens, reply.ids) for reply in replies]


@pytest.mark.parametrize("name", FAMILIES)
def test_replies_are_those_of_plain_transformers(tmp_path, name):
    family = Family(tmp_path, name)
    prompts = family.prompts()
    with family.llm as llm:
        expected = [
            (length, [token for token in reply if token not in llm.stop_token_ids])
            for length, reply in family.expected(prompts)
        ]
        assert any(reply for _, reply in expected)
        for size in (1, 3):
            replies = llm.replies(prompts, batch_size=size, max_new_tokens=NEW_TOKENS)
            assert ids(replies, llm.stop_token_ids) == expected, size
        # One after the other: what a model keeps of positions is of no other prompt.
        for prompt, reply in zip(prompts, replies, strict=True):
            ended = []
            assert (
                "".join(llm.stream(prompt, on_end=ended.append, max_new_tokens=NEW_TOKENS))
                == reply.text
            )
            assert ended == [reply]
        doubled = llm.replies(prompts, max_new_tokens=NEW_TOKENS, num_beams=1,
                              num_return_sequences=2, do_sample=True, top_k=1)  # fmt: skip
        assert [reply.ids for reply in doubled] == [r.ids for r in replies for _ in range(2)]
        _check_forms(family, llm, replies[0])


def _check_forms(family, llm, expected):
    """An image may come as a path, bytes, a picture, base64 or OpenAI's part."""
    file, data = family.path("wide"), png(family.pictures["wide"])
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    for part in (
        image(data), image(family.pictures["wide"]), image(family.folder / "wide.png"),
        {"type": "image", "path": file},
        {"type": "image_url", "image_url": {"url": address}},
    ):  # fmt: skip
        (reply,) = llm.replies([[user(part, text("What is it?"))]], max_new_tokens=NEW_TOKENS)
        assert reply == expected
    with pytest.raises(UserError, match=r"num_beams: a prompt has several images"):
        llm.replies(family.prompts(), num_beams=2)
    (beams,) = llm.replies([family.prompts()[0]], num_beams=2, max_new_tokens=NEW_TOKENS)
    assert beams.prompt_tokens == expected.prompt_tokens


BROKEN = {
    "no file": (image("gone.png"), r"row 7: messages\[0\]: there is no file gone.png"),
    "no image": ({"type": "image"}, r"row 7: messages\[0\]: an image part has no image: write"),
    "no picture": (image(b"text"), r"row 7: messages\[0\]: it is not a picture"),
    "a number": (image(7), r"row 7: messages\[0\]: this is a number"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_image_that_cannot_be_read_names_its_prompt(case):
    part, words = BROKEN[case]
    with pytest.raises(UserError, match=words):
        open_prompts([[user(part)]], ["row 7"])


def test_an_image_that_no_model_would_see_is_said():
    beside = {"role": "user", "content": "What?", "images": ["a.png"]}
    with pytest.raises(
        UserError, match=r"prompt 1: messages\[0\]: the message has 'images' beside"
    ):
        open_prompts([[beside]])
    with pytest.raises(UserError, match=r"messages\[1\]: a text part has an image \(image\)"):
        open_prompts([{"messages": [user(text("Hi")), user({**text("What?"), "image": "a.png"})]}])


def test_a_file_that_changes_is_not_read_as_another(tmp_path):
    file = tmp_path / "a.png"
    picture(20, 20).save(file)
    (prompt,) = open_prompts([[user(image(str(file)))]])
    (opened,) = list_prompt_images(prompt)
    assert opened.open().size == (20, 20)
    assert json.loads(json.dumps(prompt))[0]["content"][0]["image"]["source"] == str(file)
    picture(20, 20, seed=1).save(file)
    with pytest.raises(UserError, match=r"a\.png changed since"):
        opened.open()
    file.unlink()
    with pytest.raises(UserError, match="gone since"):
        opened.open()


def test_rows_of_a_file_have_their_pictures_and_are_known_by_them(tmp_path):
    picture(20, 20).save(tmp_path / "a.png")
    rows = jsonl(
        tmp_path / "rows.jsonl",
        [{"messages": [user(image("a.png"), text("What is it?")), bot("A lute.")]}],
    )
    columns = jsonl(tmp_path / "columns.jsonl", [{"prompt": "Hi", "image": "a.png"}])
    config = make_dataset_config({"path": str(rows)})
    asked = read_prompt_rows(config)
    (prompt,) = [row.prompt for row in asked.rows]
    (opened,) = list_prompt_images(prompt)
    assert opened.open().size == (20, 20)
    assert asked.rows[0].expected == "A lute."
    (row,) = read_prompt_rows(make_dataset_config({"path": str(columns)})).rows
    prompt = row.prompt
    assert [each["source"] for each in list_prompt_images(prompt)] == ["a.png"]
    picture(20, 20, seed=1).save(tmp_path / "a.png")
    changed = read_prompt_rows(config).identity()
    assert changed.pop("pictures") != asked.identity()["pictures"]
    plain = jsonl(tmp_path / "plain.jsonl", [{"prompt": "Hi"}])
    assert "pictures" not in read_prompt_rows(make_dataset_config({"path": str(plain)})).identity()
