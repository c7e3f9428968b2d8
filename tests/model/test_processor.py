"""`model.processor` changes an image processor's settings, for the run and for what it saves."""

import json

import pytest
from transformers import AutoProcessor

from helpers.model_families import save_family
from helpers.vision_families import VISION_FAMILIES, picture, save_vision_processor
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.model_images import find_model_images
from luthier.model.processor import (
    copy_processor_files,
    find_processor_changes,
    find_processor_files,
)
from luthier.model.vision_processor import find_vision_processor

SIZE = {"height": 200, "width": 200}
CHANGES = {
    # Four rows of four tokens for 28 x 28 pixels each, three of three for 32 x 32.
    "the most pixels, by Qwen's older name": ("qwen2_vl", {"max_pixels": 112 * 112}, 16),
    "both sizes": ("qwen3_vl", {"size": {"longest_edge": 96 * 96, "shortest_edge": 32 * 32}}, 9),
    "one of two sizes, which keeps the other": ("qwen3_vl", {"size": {"longest_edge": 96 * 96}}, 9),
    # Four for the image as a whole, a mark on either side, and one that says that it is whole.
    "no tiles": ("idefics3", {"do_image_splitting": False}, 7),
}


@pytest.mark.parametrize(("name", "changes", "count"), CHANGES.values(), ids=CHANGES)
def test_an_image_takes_other_tokens_and_the_saved_files_have_the_setting(
    name, changes, count, tmp_path
):
    base = save_vision_processor(tmp_path / "base", name)
    before = find_vision_processor(ModelConfig(path=str(base)))
    model = ModelConfig(path=str(base), processor=changes)
    changed = find_vision_processor(model)
    assert len(changed.encode_image(SIZE)) == count != len(before.encode_image(SIZE))
    pixels = [
        each.pixel_inputs([[picture(200, 200)]])["pixel_values"] for each in (before, changed)
    ]
    assert pixels[0].shape != pixels[1].shape
    assert find_model_images(model).hash_files() != (
        find_model_images(ModelConfig(path=str(base))).hash_files()
    )
    saved = save_vision_processor(tmp_path / "saved", name)
    for file in find_processor_files(model):
        (saved / file.name).unlink()
    copy_processor_files(find_processor_files(model), saved)
    again = find_vision_processor(ModelConfig(path=str(saved)))
    assert again.settings() == changed.settings()
    if not VISION_FAMILIES[name].needs_torchvision:
        loaded = AutoProcessor.from_pretrained(saved)
        assert loaded.image_processor.to_dict() == changed.processor.image_processor.to_dict()
    # An adapter's folder without its run says by its files what its base is to be given.
    found = find_processor_changes(ModelConfig(path=str(base)), saved)
    assert found
    told = find_vision_processor(ModelConfig(path=str(base), processor=found))
    assert told.settings() == changed.settings()


def test_an_old_size_in_the_files_does_not_win_over_a_new_one(tmp_path):
    folder = save_vision_processor(tmp_path, "qwen2_vl")
    (file,) = [
        f for f in find_processor_files(ModelConfig(path=str(folder))) if b"size" in f.content
    ]
    values = json.loads(file.content)
    settings = values.get("image_processor", values)
    settings.pop("size", None)
    settings |= {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 64}
    (folder / file.name).write_text(json.dumps(values))
    model = ModelConfig(path=str(folder), processor={"size": {"longest_edge": 28 * 28 * 4}})
    assert len(find_vision_processor(model).encode_image(SIZE)) <= 4
    copy = tmp_path / "copy"
    save_vision_processor(copy, "qwen2_vl")
    (copy / file.name).unlink()
    copy_processor_files(find_processor_files(model), copy)
    assert len(find_vision_processor(ModelConfig(path=str(copy))).encode_image(SIZE)) <= 4


WRONG = {
    "a name that is none": (
        {"max_pixel": 7},
        r"model\.processor\.max_pixel: is not a setting of transformers\.Qwen2VL\w*\. "
        r"Did you mean model\.processor\.max_pixels\?",
    ),
    "a value that is none": ({"size": "large"}, r"model\.processor: transformers\.Qwen2VL.* take"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_setting_is_refused(changes, words, tmp_path):
    folder = save_vision_processor(tmp_path, "qwen2_vl")
    with pytest.raises(UserError, match=words):
        find_vision_processor(ModelConfig(path=str(folder), processor=changes))


def test_a_model_of_text_takes_no_settings_of_a_processor(tmp_path):
    model = ModelConfig(path=str(save_family(tmp_path, "llama")), processor={"max_pixels": 7})
    with pytest.raises(UserError, match=r"model\.processor is for images, and the model .* none"):
        find_model_images(model)
