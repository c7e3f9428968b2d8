"""Batches with images: equal to the processor's own, in the order of their documents."""

import struct
import zlib
from hashlib import sha256

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.vision_families import VISION_FAMILIES, picture, png, save_vision_processor
from luthier.config.schema import ModelConfig
from luthier.data.batching.collators import FlatteningCollator, PackingCollator, PaddingCollator
from luthier.data.batching.image_collators import ImageCollator
from luthier.data.batching.token_rows import Document
from luthier.data.images.decode import StoredBytes, measure_image
from luthier.errors import UserError
from luthier.model.vision_processor import find_vision_processor


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    loaded = {}

    def load_family(name):
        if name not in loaded:
            folder = save_vision_processor(tmp_path_factory.mktemp(name), name)
            loaded[name] = find_vision_processor(ModelConfig(path=str(folder)))
        return loaded[name]

    return load_family


def document(vision, *content):
    """A document of numbers, which are tokens, and pictures."""
    ids = []
    for item in content:
        size = {} if isinstance(item, int) else {"height": item.height, "width": item.width}
        ids += vision.encode_image(size) if size else [item]
    images = tuple(png(item) for item in content if not isinstance(item, int))
    array = np.array(ids, dtype=np.int32)
    return Document(array, array, images=images)


PICTURES = [picture(40, 60), picture(90, 30, 1), picture(28, 28, 2)]
IMAGES = [{"type": "image", "image": image} for image in PICTURES]
CONVERSATIONS = [
    [{"role": "user", "content": [IMAGES[0]]}],
    [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    [{"role": "user", "content": [IMAGES[1], {"type": "text", "text": "or"}, IMAGES[2]]}],
]


@pytest.mark.parametrize("name", sorted(VISION_FAMILIES))
def test_a_padded_batch_is_that_of_the_processors_own_call(load, name):
    vision = load(name)
    expected = vision.processor.apply_chat_template(
        CONVERSATIONS, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    images = [PICTURES[:1], [], PICTURES[1:]]
    rows = []
    for ids, mask, row_images in zip(
        expected["input_ids"], expected["attention_mask"], images, strict=True
    ):
        array = ids[mask.bool()].numpy().astype(np.int32)
        rows.append((Document(array, array, images=tuple(map(png, row_images))),))
    batch = ImageCollator(PaddingCollator(vision.tokenizer.pad_token_id), vision)(rows)
    assert set(batch) == {*expected, "labels", "tokens"}
    for key, value in expected.items():
        assert batch[key].dtype == value.dtype, key
        assert batch[key].equal(value), key


@pytest.mark.parametrize("layout", [PaddingCollator, PackingCollator, FlatteningCollator])
@pytest.mark.parametrize("name", ["idefics3", "gemma3"])
def test_a_batch_without_images_is_that_of_text(load, name, layout):
    vision = load(name)
    rows = [(document(vision, 5, 6, 7),), (document(vision, 8, 9),)]
    batch, expected = ImageCollator(layout(0), vision)(rows), layout(0)(rows)
    assert set(batch) == set(expected)
    assert all(torch.equal(torch.as_tensor(batch[k]), torch.as_tensor(expected[k])) for k in batch)


TEXT_POSITIONS = [[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 0, 1, 2, 3]]
TIMES = [[0, 1, 1, 3, 0, 1, 0], [0, 1, 2, 0, 1, 2, 3]]
HEIGHTS = [[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 0, 1, 2, 3]]
WIDTHS = [[0, 1, 1, 3, 0, 1, 0], [0, 1, 2, 0, 1, 2, 3]]
"""Of two tokens one below the other behind a token, then the token behind the larger side."""


def packed_rows(vision):
    tall = picture(28, 56)
    with_image = document(vision, 5, tall, 6)
    assert len(with_image.input_ids) == 4
    return [
        (with_image, document(vision, 7, 8)),
        (document(vision, 5, 6, 7), document(vision, 5, 6, 7, 8)),
    ]


def test_packed_positions_of_each_document_are_its_own(load):
    vision = load("qwen2_vl")
    batch = ImageCollator(PackingCollator(0), vision)(packed_rows(vision))
    expected = [TEXT_POSITIONS, TIMES, HEIGHTS, WIDTHS]
    assert batch["position_ids"].tolist() == expected
    assert batch["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0, 0], [0] * 7]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 2]]


def test_flat_positions_of_each_document_are_its_own(load):
    vision = load("qwen2_vl")
    batch = ImageCollator(FlatteningCollator(0), vision)(packed_rows(vision))
    both = [[line[0][:6] + line[1]] for line in (TEXT_POSITIONS, TIMES, HEIGHTS, WIDTHS)]
    assert batch["position_ids"].tolist() == both
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 6, 9, 13]


@pytest.mark.parametrize("name", sorted(VISION_FAMILIES))
def test_pictures_of_packed_rows_stand_in_the_order_of_their_documents(load, name):
    vision = load(name)
    rows = [
        (document(vision, 5, PICTURES[0]), document(vision, 6, 7)),
        (document(vision, PICTURES[1], 5, PICTURES[2], 6),),
    ]
    batch = ImageCollator(PackingCollator(0), vision)(rows)
    expected = vision.pixel_inputs([PICTURES[:1], [], PICTURES[1:]])
    assert expected
    for key, value in expected.items():
        assert batch[key].equal(value), key


def png_without_pixels():
    """A PNG that is whole but for its pixels: every checksum is right."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 40, 60, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("source", ["", "photos/7.png"])
def test_pixels_that_are_broken_are_said_in_words_by_workers_too(load, workers, source):
    data = StoredBytes(png_without_pixels())
    data.source = source
    assert measure_image(data) == (40, 60)
    ids = np.zeros(1, dtype=np.int32)
    rows = [(Document(ids, ids, images=(data,)),)]
    collator = ImageCollator(PaddingCollator(0), load("llava_clip"))
    name = source or f"of SHA-256 {sha256(data).hexdigest()}"
    with pytest.raises(UserError) as error:
        next(iter(DataLoader(rows, collate_fn=collator, num_workers=workers, timeout=60 * workers)))
    first, second = str(error.value).split("\n")
    assert first == (
        f"dataset: the image {name} cannot be decoded: it is broken: image file is truncated "
        "(0 bytes not processed)."
    )
    assert second.endswith("decodes every image and names the rows of those that are broken.")


def test_a_worker_of_the_loader_makes_the_same_batch(load, monkeypatch):
    """The tokenizer has had threads, as it has where the process that forks prepares data."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    vision = load("idefics3")
    vision.tokenizer(["some words"] * 1000)
    rows = [(document(vision, 5, image, 6),) for image in PICTURES]
    collator = ImageCollator(PaddingCollator(0), vision)
    (batch,) = DataLoader(rows, batch_size=3, collate_fn=collator, num_workers=1, timeout=60)
    assert all(value.equal(batch[key]) for key, value in collator(rows).items())
