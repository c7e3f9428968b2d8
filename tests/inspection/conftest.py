"""The real command, run on rows that a test writes."""

import json
import struct
import zlib
from functools import cache

import pytest

from helpers.vision_families import picture, save_vision_processor
from luthier.config.schema import ModelConfig
from luthier.inspection import dataset
from luthier.model.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


@cache
def loaded(config):
    """The tokenizer that a model config says; half of a command's time goes into loading it."""
    return load_tokenizer(ModelConfig.model_validate_json(config))


@pytest.fixture(autouse=True)
def tokenizers_are_loaded_once(monkeypatch):
    monkeypatch.setattr(dataset, "load_tokenizer", lambda config: loaded(config.model_dump_json()))


@pytest.fixture
def write(tmp_path):
    """Write rows of messages to a file, one object a line."""

    def write(rows, name="rows.jsonl"):
        lines = [json.dumps(row if isinstance(row, dict) else {"messages": row}) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


@pytest.fixture
def on_rows(luthier, write):
    """Run a command on a file of these rows with the real tokenizer of smollm2_135m."""

    def on_rows(command, rows, *words):
        write(rows)
        settings = ["model=smollm2_135m", "dataset=jsonl", "dataset.path=rows.jsonl"]
        whole = ["dataset.eval.share=null", "trainer.args.eval_strategy=no"]
        return luthier(command, *settings, *whole, *words)

    return on_rows


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory):
    """Files of a tiny LLaVA without its weights: each image is four tokens."""
    return save_vision_processor(tmp_path_factory.mktemp("llava"), "llava_clip")


@pytest.fixture
def on_images(luthier, write, vision_folder, tmp_path):
    """Run a command on rows that name `wide.png` (60 x 28) and `tall.png` (28 x 300)."""

    def on_images(command, rows, *words):
        for number, (name, size) in enumerate({"wide": (60, 28), "tall": (28, 300)}.items()):
            if not (tmp_path / f"{name}.png").exists():
                picture(*size, number).save(tmp_path / f"{name}.png")
        write(rows)
        settings = ["model=hub", f"model.path={vision_folder}", "dataset=jsonl"]
        settings += ["dataset.path=rows.jsonl", "dataset.eval.share=null"]
        return luthier(command, *settings, "trainer.args.eval_strategy=no", *words)

    return on_images


@pytest.fixture
def broken_pixels(tmp_path):
    """Write a PNG whose header and checksums are right and whose pixels cannot be decoded."""

    def write_broken(name):
        def chunk(kind, data):
            body = kind + data
            return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

        header = struct.pack(">IIBBBBB", 60, 28, 8, 2, 0, 0, 0)
        chunks = chunk(b"IHDR", header), chunk(b"IDAT", b"no pixels"), chunk(b"IEND", b"")
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))

    return write_broken
