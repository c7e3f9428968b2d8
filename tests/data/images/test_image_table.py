"""The images of encoded rows: kept once, given back byte for byte, and never those of before."""

import os
import pickle
from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.image_files import image_bytes
from helpers.letter_encoder import NAMELESS, save
from helpers.picture_encoder import PictureLetters
from luthier.config.schema import DatasetConfig
from luthier.data.batching.samplers import SampledDataset, SequentialSampler
from luthier.data.encoders.chat import ColumnKeepingEncoder
from luthier.data.examples import DatasetSources, open_examples
from luthier.data.prepare import prepare
from luthier.data.sources import source as source_module
from luthier.data.streaming import open_stream
from luthier.errors import UserError

RED, BLUE = image_bytes("PNG", 30, 20, "red"), image_bytes("JPEG", 40, 20, "blue")


class CountingEncoder(PictureLetters):
    """Counts how many rows it has encoded."""

    rows = 0

    def encode(self, examples):
        self.rows += len(examples)
        return super().encode(examples)


@pytest.fixture(autouse=True)
def files(tmp_path, write):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "red.png").write_bytes(RED)
    (tmp_path / "sub" / "blue.jpg").write_bytes(BLUE)
    write(
        "sub/rows.jsonl",
        [
            row("q", "a", "red.png", "blue.jpg"),
            row("r", "b", "blue.jpg", "red.png"),
            {"messages": [{"role": "user", "content": "t"}, {"role": "assistant", "content": "c"}]},
            row("s", "d", "red.png"),
        ],
    )


def row(question, reply, *images):
    parts = [{"type": "image", "image": image} for image in images]
    content = [*parts, {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": reply},
        ]
    }


def prepared(encoder=None, **settings):
    config = DatasetConfig.model_validate({"path": "sub/rows.jsonl", **settings})
    return prepare(config, lambda *_: encoder or PictureLetters(), NAMELESS, seed=0)


def given_back(rows):
    """Each row of an epoch as its text and its images, read as a loader's worker does."""
    dataset = pickle.loads(pickle.dumps(SampledDataset(SequentialSampler(rows))))
    documents = [dataset[(number,)][0] for number in rows.index.tolist()]
    return [("".join(map(chr, d.input_ids.tolist())), *d.images) for d in documents]


EXPECTED = [
    ("#######qa", RED, BLUE),
    ("#######rb", BLUE, RED),
    ("tc",),
    ("###sd", RED),
]


def test_files_of_their_own_are_referred_to():
    data = prepared()
    assert given_back(data.train) == EXPECTED
    assert data.train_counts.images == 5
    stored = data.sources["dataset"].images
    assert [stored.reference(number)["source"] for number in range(len(stored))] == [
        "red.png",
        "blue.jpg",
    ]
    assert stored.table.values("data", range(2)) == [b"", b""]
    (example,) = data.sources["dataset"].examples([3])
    ref = example["messages"][0]["content"][0]["image"]
    assert ref == {
        "sha256": sha256(RED).hexdigest(), "width": 30, "height": 20, "source": "red.png"
    }  # fmt: skip
    assert stored.read_reference(ref) == RED


def embedded(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"prompt": question, "completion": reply, "images": [
            {"bytes": data, "path": None} for data in images]}
        for question, reply, *images in (
            ("q", "a", RED, BLUE), ("r", "b", BLUE, RED), ("t", "c"), ("s", "d", RED))
    ]  # fmt: skip
    schema = pa.schema(
        {"prompt": pa.string(), "completion": pa.string(), "images": pa.list_(image)}
    )
    return pa.Table.from_pylist(rows, schema), rows


def in_parquet(tmp_path):
    pq.write_table(embedded(tmp_path)[0], tmp_path / "rows.parquet")
    return {"path": "rows.parquet"}


def in_saved_dataset(tmp_path):
    save(tmp_path / "saved", train=embedded(tmp_path)[1])
    return {"path": "saved"}


def in_function(tmp_path):
    (tmp_path / "pictures.py").write_text(
        "import io\n"
        "from PIL import Image\n"
        "def rows():\n"
        "    red = Image.open('sub/red.png')\n"
        "    yield {'prompt': 's', 'completion': 'd', 'image': red}\n"
        "    yield {'prompt': 's', 'completion': 'e', 'image': red.copy()}\n"
    )
    return {"path": "python:pictures.py:rows"}


@pytest.mark.parametrize("make", [in_parquet, in_saved_dataset])
def test_images_in_tables_are_kept_once(make, tmp_path):
    data = prepared(**make(tmp_path))
    assert given_back(data.train) == EXPECTED
    stored = data.sources["dataset"].images
    assert stored.table.values("data", range(len(stored))) == [RED, BLUE]


def test_pictures_of_a_function_are_the_same_each_time(tmp_path):
    settings, encoder = in_function(tmp_path), CountingEncoder()
    first = prepared(encoder, **settings)
    second = prepared(encoder, **settings)
    assert first.content_hash == second.content_hash
    assert encoder.rows == 2
    (text, image), (_, copy) = given_back(first.train)
    assert text == "###sd"
    assert image == copy


def test_the_hash_of_the_rows_is_that_of_the_images_and_not_of_their_names(tmp_path):
    before = prepared().content_hash
    (tmp_path / "sub" / "same.png").write_bytes(RED)
    text = (tmp_path / "sub" / "rows.jsonl").read_text()
    (tmp_path / "sub" / "other.jsonl").write_text(text.replace("red.png", "same.png"))
    assert prepared(path="sub/other.jsonl").content_hash == before
    # As wide, so that the tokens are the same.
    (tmp_path / "sub" / "same.png").write_bytes(image_bytes("PNG", 30, 20, "green"))
    assert prepared(path="sub/other.jsonl").content_hash != before


def test_rows_with_equal_images_are_duplicates_whatever_the_files_are_called(tmp_path, write):
    (tmp_path / "sub" / "same.png").write_bytes(RED)
    rows = [row("q", "a", name) for name in ("red.png", "same.png", "blue.jpg")]
    write("sub/rows.jsonl", rows)
    for mode in ("exact", "normalised"):
        data = prepared(deduplicate=mode)
        assert [images for _, *images in given_back(data.train)] == [[RED], [BLUE]]


def test_a_changed_image_is_encoded_anew_and_a_touched_one_is_not(tmp_path):
    encoder, file = CountingEncoder(), tmp_path / "sub" / "red.png"
    first = prepared(encoder)
    os.utime(file, ns=(1, 1))
    assert prepared(encoder).content_hash == first.content_hash
    assert encoder.rows == 4
    wide = image_bytes("PNG", 50, 20)
    file.write_bytes(wide)
    second = prepared(encoder)
    assert given_back(second.train)[3] == ("#####sd", wide)
    assert encoder.rows == 8
    # The table of before still says which bytes it means.
    with pytest.raises(UserError, match=r"the image red.png changed after it was encoded"):
        first.train.read_images(3)
    # Both are found again.
    file.write_bytes(RED)
    assert given_back(prepared(encoder).train) == EXPECTED
    assert encoder.rows == 8
    file.unlink()
    with pytest.raises(UserError, match=r"removed after it was encoded: there is no file"):
        first.train.read_images(3)
    with pytest.raises(UserError) as error:
        prepared(encoder)
    assert "sub/rows.jsonl:1: messages[0], part 0: there is no file red.png" in str(error.value)
    dropped = prepared(encoder, on_bad_row="drop")
    assert given_back(dropped.train) == [("tc",)]
    assert dropped.train_counts.dropped == {"could not be read": 3}


def test_a_copied_folder_is_found_in_the_cache(tmp_path):
    encoder = CountingEncoder()
    prepared(encoder)
    (tmp_path / "sub").rename(tmp_path / "elsewhere")
    data = prepared(encoder, path="elsewhere/rows.jsonl")
    assert given_back(data.train) == EXPECTED
    assert encoder.rows == 4


def test_held_out_rows_have_their_images():
    data = prepared(eval={"count": 1})
    shown = given_back(data.train) + given_back(data.eval[""])
    assert sorted(shown) == sorted(EXPECTED)


def test_kept_columns_have_no_bytes(tmp_path):
    encoder = ColumnKeepingEncoder(PictureLetters())
    data = prepared(encoder, **in_parquet(tmp_path), filter="len(images) == 1")
    (columns,) = data.sources["dataset"].columns([0])
    assert columns == {
        "prompt": "s", "completion": "d", "images": [{"bytes": f"{len(RED)} bytes"}]
    }  # fmt: skip
    dataset = SampledDataset(SequentialSampler(data.train), with_columns=True)
    ((document,),) = [dataset[(0,)]]
    assert document.columns == columns
    assert document.images == (RED,)


def test_a_stream_refuses_rows_with_images():
    config = DatasetConfig(path="sub/rows.jsonl", streaming=True)
    with pytest.raises(UserError, match=r"sub/rows.jsonl:1: dataset.streaming=true stores nothing"):
        open_stream(DatasetSources(config), lambda *_: PictureLetters())


def test_few_large_rows_are_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_PEEKED_BYTES", 2 * len(BLUE))
    settings = in_parquet(tmp_path)
    opened = open_examples(DatasetConfig.model_validate(settings), "dataset")
    assert len(opened.source.peek()) < 4
    assert given_back(prepared(**settings).train) == EXPECTED


def test_processes_that_encode_give_the_same_rows():
    one, two = (prepared(cache=f"cache{workers}", workers=workers) for workers in (1, 2))
    assert two.content_hash == one.content_hash
    assert given_back(two.train) == EXPECTED
