"""The tower of a model that reads images, in steps with and without them.

A process whose rows have no image does not reach the tower. Weights that train there have no
gradient then, and weights that are split over processes are gathered by all of them or by none.
"""

import inspect
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch.utils._pytree import tree_leaves

from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.model.model_class import find_text_modules, find_vision_modules, is_within
from luthier.model.vision_processor import VisionProcessor
from luthier.train import console


def check_trained_parts(model: Any, config: RunConfig, has_images: bool) -> None:
    """Freeze what patterns name of a tower, and say so, where no row has an image.

    Raises UserError where nothing else trains, and for a model that would not see its images.
    """
    if has_images:
        _check_takes_pixels(model)
        return
    frozen = _freeze_vision(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        key = "lora.target_modules" if config.lora.is_enabled else "model.train"
        raise UserError(f"{key}: no row has an image, so {', '.join(frozen)} would never train.")
    if frozen and PartialState().is_main_process:
        console.print_line(f"frozen    {', '.join(frozen)}: no row has an image")


def _check_takes_pixels(model: Any) -> None:
    """Raise UserError for a model that would train without its images.

    Losses take what comes out of the layers below the output layer, and in some classes (Llama 4,
    Mllama) these are the text decoder alone, which passes over pixels without a word.
    """
    base = _unwrap_base(model)
    if "pixel_values" not in inspect.signature(base.base_model.forward).parameters:
        raise UserError(
            f"model.path: {type(base).__name__} joins images and text outside of the layers whose "
            "output the losses take, so it would train without its images. Rows of text train."
        )


def trains_vision(model: Any) -> bool:
    """Return whether a weight trains that images alone reach."""
    parts = find_vision_modules(model)
    return any(
        weight.requires_grad and any(is_within(name, part) for part in parts)
        for name, weight in model.named_parameters()
    )


def _freeze_vision(model: Any) -> list[str]:
    """Freeze what only images reach; return the parts of which something would have trained."""
    trained = []
    for name in find_vision_modules(model):
        weights = [p for p in model.get_submodule(name).parameters() if p.requires_grad]
        trained += [name.removeprefix("base_model.model.")] if weights else []
        for weight in weights:
            weight.requires_grad_(False)
    return trained


def run_tower_in_each_batch(trainer: Any, images: VisionProcessor) -> None:
    """Have batches without an image run the tower on a blank one where they have to.

    Nothing of it is added to the embeddings but a zero with a gradient. That is needed where
    weights or gradients are split over processes, which FSDP2 and ZeRO-2 exchange layer by layer;
    for DDP that looks for no unused weights; and where only the tower trains. A reference model
    does the same.
    """
    model, accelerator = trainer.model, trainer.accelerator
    is_split = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    is_ddp = accelerator.num_processes > 1 and not trainer.args.ddp_find_unused_parameters
    text = find_text_modules(model)
    trains_text = any(p.requires_grad and n in text for n, p in model.named_parameters())
    if not (is_split or (trains_vision(model) and (is_ddp or not trains_text))):
        return
    size = images.choose_small_size()
    # White, since Idefics3 takes pictures of zeros for padding.
    blank = Image.new("RGB", (size["width"], size["height"]), "white")
    pixels = images.pixel_inputs([[blank]])
    inputs = {name: value.to(accelerator.device) for name, value in pixels.items()}
    _add_blank_images(model, inputs)
    reference = vars(trainer).get("ref_model")
    if is_split and reference is not None:
        _add_blank_images(accelerator.unwrap_model(reference), inputs)


def _add_blank_images(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Have a model run its tower on these pixels where a batch of a loss has no image."""
    backbone = _unwrap_base(model).base_model
    lacks_images = False

    def note_images(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal lacks_images
        # Losses pass `use_cache=False`; generation runs no tower for a token.
        lacks_images = kwargs.get("pixel_values") is None and kwargs.get("use_cache") is False

    def add_zero(_module: Any, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
        nonlocal lacks_images
        if not lacks_images:
            return embedded
        lacks_images = False
        features = tree_leaves(backbone.get_image_features(**inputs))
        zeros = [(each.float() * 0).sum() for each in features if isinstance(each, torch.Tensor)]
        return embedded + torch.stack(zeros).sum().to(embedded.dtype)

    # Behind the embeddings, as with an image: all processes gather weights in one order.
    backbone.register_forward_pre_hook(note_images, with_kwargs=True)
    backbone.get_input_embeddings().register_forward_hook(add_zero)


def _unwrap_base(model: Any) -> Any:
    """Return the model of transformers below an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
