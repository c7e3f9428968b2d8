"""Packed documents with images: losses and gradients of single rows, and the proof."""

import copy

import numpy as np
import pytest
import torch

from helpers.sft_trainer import packing, trainer
from helpers.vision_families import make_vision_model, picture, png, save_vision_processor
from luthier.config.schema import ModelConfig
from luthier.data.batching.collators import PackingCollator, PaddingCollator
from luthier.data.batching.image_collators import ImageCollator
from luthier.data.batching.token_rows import Document, InMemoryTable, TokenRows
from luthier.errors import UserError
from luthier.model.vision_processor import find_vision_processor
from luthier.train.packing_check import check_isolation, expect_batch

MODELS = [
    ("idefics3", "sdpa"), ("idefics3", "varlen"), ("llava_clip", "sdpa"), ("llava_siglip", "eager"),
    ("llava_clip", "varlen"), ("gemma3", "sdpa"), ("gemma3", "eager"), ("gemma3", "varlen"),
    ("gemma4", "sdpa"), ("gemma4", "varlen"),
    ("qwen2_vl", "sdpa"), ("qwen2_vl", "varlen"), ("qwen2_5_vl", "sdpa"), ("qwen3_vl", "sdpa"),
    ("qwen3_vl", "varlen"), ("qwen3_5", "sdpa"),
]  # fmt: skip
HELPED = {
    "gemma3": "attention to images gets masks of single documents",
    "gemma4": "attention to images gets masks of single documents",
    "qwen3_5": "1 of 2 layers carry a state and run document by document",
}
NAMES = sorted({name for name, _ in MODELS})


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    loaded = {}

    def load_family(name):
        if name not in loaded:
            folder = save_vision_processor(tmp_path_factory.mktemp(name), name)
            loaded[name] = find_vision_processor(ModelConfig(path=str(folder)))
        return loaded[name]

    return load_family


def document(vision, *content, start=20):
    """A document of texts, by their number of tokens, and pictures; all texts train."""
    ids, labels = [], []
    for item in content:
        if isinstance(item, int):
            tokens = [start + 7 * len(ids) % 200 + number for number in range(item)]
            labels += tokens
        else:
            tokens = vision.encode_image({"height": item.height, "width": item.width})
            labels += [-100] * len(tokens)
        ids += tokens
    images = tuple(png(item) for item in content if not isinstance(item, int))
    return Document(np.array(ids, np.int32), np.array(labels, np.int32), images=images)


def packed_rows(vision):
    """Three packed rows: an image in several documents, at the edges, two in one, and none."""
    return [
        (
            document(vision, 3, picture(84, 56), 5),
            document(vision, picture(40, 60, 1), 6, start=30),
            document(vision, 4, picture(84, 56, 2)),
        ),
        (document(vision, 9, start=40), document(vision, 2, picture(28, 28, 3), 4)),
        (document(vision, 2, picture(30, 90, 4), 3, picture(84, 56, 5), 2), document(vision, 4)),
    ]


def loss_of(net, batch, documents=None):
    """The sum over trained tokens in plain arithmetic."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "tokens")}
    if documents is not None:
        expect_batch(documents, batch)
    logits = net(**inputs, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize(("name", "attention"), MODELS, ids=["-".join(m) for m in MODELS])
def test_packed_loss_and_gradients_are_those_of_single_rows(load, name, attention):
    vision, net = load(name), make_vision_model(name, attention)
    alone, rows = copy.deepcopy(net), packed_rows(vision)
    single = ImageCollator(PaddingCollator(0), vision)
    packed = ImageCollator(PackingCollator(0), vision)
    expected = sum(loss_of(alone, single([(each,)])) for row in rows for each in row)
    expected.backward()
    isolation = check_isolation(net, packed)
    loss = loss_of(net, packed(rows), isolation.documents)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (key, weight), other in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert (weight.grad is None) == (other.grad is None), key
        if weight.grad is not None:
            distance = (weight.grad - other.grad).norm()
            assert distance <= 1e-4 * other.grad.norm() + 1e-6, key


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "qwen3_vl", "qwen3_5"])
def test_the_trainer_packs_rows_with_images(load, tmp_path, name, capsys):
    vision, net = load(name), make_vision_model(name)
    alone = copy.deepcopy(net)
    documents = [each for row in packed_rows(vision) for each in row]
    single = ImageCollator(PaddingCollator(0), vision)
    expected = sum(loss_of(alone, single([(each,)])) for each in documents)
    columns = ([each.input_ids for each in documents], [each.labels for each in documents])
    rows = TokenRows(InMemoryTable(*columns), read_images=lambda number: documents[number].images)
    length = 3 + max(len(each.input_ids) for each in documents)
    made = trainer(net, tmp_path, rows, packing(length), vision, per_device_train_batch_size=2)
    loader = iter(made.get_train_dataloader())
    batches, count = made.get_batch_samples(loader, 100, torch.device("cpu"))
    assert len(batches) < len(documents) / 2
    loss = sum(made.compute_loss(net, batch, num_items_in_batch=count) for batch in batches)
    assert loss.item() == pytest.approx(expected.item() / count.item(), rel=1e-5)
    printed = capsys.readouterr().out
    lines = [f"packing   {HELPED[name]}"] if name in HELPED else []
    assert [line for line in printed.splitlines() if line.startswith("packing")] == lines


@pytest.mark.parametrize(("name", "is_refused"), [("gemma3", True), ("llava_clip", False)])
def test_flash_attention_is_refused_where_tokens_of_an_image_see_each_other(
    load, tmp_path, name, is_refused
):
    vision, net = load(name), make_vision_model(name)
    # Set here, since a model that is made with such a name looks for the package.
    net.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    rows = TokenRows(InMemoryTable([[3, 4]], [[3, 4]]), read_images=lambda number: ())
    if not is_refused:
        trainer(net, tmp_path, rows, images=vision)
        return
    with pytest.raises(UserError, match=r"model.attention=flash_attention_2: in Gemma3For.*sdpa"):
        trainer(net, tmp_path, rows, images=vision)


@pytest.mark.parametrize("name", NAMES)
def test_models_that_keep_documents_with_images_apart_pass(load, name):
    isolation = check_isolation(
        make_vision_model(name), ImageCollator(PackingCollator(0), load(name))
    )
    assert isolation.content == 0
    assert isolation.position < 1e-5
    assert str(isolation.documents) == HELPED.get(name, "None")


def test_positions_of_text_in_place_of_those_of_images_are_refused(load):
    class TextPositions(type(load("qwen2_vl"))):
        def position_ids(self, input_ids, pixels):
            return torch.arange(len(input_ids)).expand(3, -1)

    vision = copy.copy(load("qwen2_vl"))
    vision.__class__ = TextPositions
    with pytest.raises(UserError, match="cannot train packed rows") as refusal:
        check_isolation(make_vision_model("qwen2_vl"), ImageCollator(PackingCollator(0), vision))
    text = str(refusal.value)
    assert "trainer.args.packing: Qwen2VLForConditionalGeneration" in text
    assert "the logits of a document with images depend on its place" in text


def test_pictures_that_reach_the_document_before_are_refused(load):
    """As if the first picture of each row were seen by all of its documents."""
    vision, net = load("llava_clip"), make_vision_model("llava_clip")

    def call(**batch):
        if "position_ids" in batch and "pixel_values" in batch:
            pixels = batch["pixel_values"]
            batch["pixel_values"] = pixels + 0.1 * pixels.roll(1, 0)
        return net(**batch)

    with pytest.raises(UserError, match="other content in a document with images"):
        check_isolation(net, ImageCollator(PackingCollator(0), vision), call)
