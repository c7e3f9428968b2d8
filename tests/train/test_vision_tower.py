"""The tower of a model that reads images, in batches with and without them."""

from types import SimpleNamespace

import pytest
import torch

from helpers.adapter_models import IDS, config_of, prepared, trained
from helpers.model_families import save_family
from helpers.vision_families import save_vision_family
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.vision_processor import find_vision_processor
from luthier.train.trainers.vision_tower import (
    check_trained_parts,
    run_tower_in_each_batch,
    trains_vision,
)


@pytest.mark.parametrize(
    ("family", "is_refused"), [("llama4", True), ("gemma3", False), ("qwen3_vl", False)]
)
def test_a_model_that_would_not_see_its_images_is_refused(family, is_refused, tmp_path):
    save_family(tmp_path, family)
    config = config_of(tmp_path)
    model, _ = prepared(config)
    if is_refused:
        with pytest.raises(UserError, match="would train without its images"):
            check_trained_parts(model, config, has_images=True)
    else:
        check_trained_parts(model, config, has_images=True)
    check_trained_parts(model, config, has_images=False)


def test_a_tower_that_patterns_open_stays_frozen_where_no_row_has_an_image(tmp_path, capsys):
    config = config_of(save_family(tmp_path, "gemma3"), model={"train": [r"layers\.0\."]})
    model, _ = prepared(config)
    assert trains_vision(model)
    check_trained_parts(model, config, has_images=False)
    assert not trains_vision(model)
    assert trained(model)
    assert capsys.readouterr().out == "frozen    model.vision_tower: no row has an image\n"


OPENED = {
    "weights": ({"model": {"train": ["vision_tower"]}}, "model.train: "),
    "an adapter": (
        {"lora": {"r": 2, "target_modules": r".*vision_tower.*q_proj"}}, "lora.target_modules: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("groups", "key"), OPENED.values(), ids=OPENED)
def test_a_tower_alone_does_not_train_without_images(groups, key, tmp_path):
    config = config_of(save_family(tmp_path, "gemma3"), **groups)
    model, _ = prepared(config)
    with pytest.raises(UserError, match=rf"{key}no row has an image, so model\.vision_tower would"):
        check_trained_parts(model, config, has_images=False)


@pytest.mark.parametrize("family", ["gemma3", "idefics3", "qwen3_vl"])
def test_a_batch_without_images_gives_a_tower_that_alone_trains_a_gradient_of_zero(
    family, tmp_path
):
    folder = save_vision_family(tmp_path, family)
    pattern = {"gemma3": "vision_tower", "idefics3": "vision_model", "qwen3_vl": "visual"}[family]
    model, _ = prepared(config_of(folder, model={"train": [pattern]}))
    before = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    trainer = SimpleNamespace(
        model=model, accelerator=accelerator, is_fsdp_enabled=False, is_deepspeed_enabled=False
    )
    run_tower_in_each_batch(trainer, find_vision_processor(ModelConfig(path=str(folder))))
    after = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    assert torch.equal(after, before)
    after.sum().backward()
    gradients = [weight.grad for weight in trained(model).values() if weight.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)
    # Generation takes no part in it.
    assert not model.base_model(input_ids=IDS).last_hidden_state.requires_grad
