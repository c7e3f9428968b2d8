"""Models in memory: an adapter on its base as it was trained, in float32; a merged folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.library_settings import QuantizationSettings
from luthier.errors import UserError
from luthier.export.adapter_delta import dequantized_as_trained
from luthier.export.model_layout import ModelLayout, embedding_rows_needed
from luthier.export.weight_files import SHARD_BYTES
from luthier.model import quantized
from luthier.model.artifact import Artifact
from luthier.model.device import Machine
from luthier.model.expert_adapters import load_adapter
from luthier.model.load import label_settings, load_model, read_model_config

if TYPE_CHECKING:
    from torch import Tensor

PLACE = Machine("cpu", "float32", "sdpa")
"""Merging and checking is arithmetic in float32, in main memory."""


def load_tuned(artifact: Artifact, adapters: list[tuple[Path, float]], packed: bool) -> Any:
    """Return the base in float32 with its adapters, each scaled by its weight, in evaluation mode.

    `packed`: with the weights packed as in training; in 8 bits they are packed and unpacked again.
    Raises UserError where it does not fit into memory or the adapter does not fit the base.
    """
    quantization = artifact.quantization if packed else QuantizationSettings()
    if quantization.bits == 4:
        # The weights stay packed; only the products are computed in float32, as after a merge.
        quantization = QuantizationSettings(quantization | {"bnb_4bit_compute_dtype": "float32"})
    model = base_of(artifact, quantization)
    if quantization.bits == 8:
        # 8-bit layers round their inputs, too, which no merged model does. Where a router follows,
        # that alone picks other experts (docs/export.md has the numbers) and would hide any mistake
        # of the merge.
        model = model.dequantize().float()
    grow_embeddings(model, adapters)
    try:
        # The names are only there to tell the adapters apart; they appear in nothing that is
        # written.
        wrapped = model
        for number, (folder, _) in enumerate(adapters):
            wrapped = load_adapter(wrapped, folder, f"a{number}")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{artifact.name}: the adapter does not go on its base: {error}") from error
    if len(adapters) > 1:
        # peft makes only the first adapter active, and PeftModel.set_adapter takes a single name.
        wrapped.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
    for number, (_, weight) in enumerate(adapters):
        if weight != 1.0:
            _scale_adapter(wrapped, f"a{number}", weight)
    return wrapped.eval()


def base_of(artifact: Artifact, quantization: QuantizationSettings) -> Any:
    """Return the base in float32, or packed; one that comes quantized is unpacked.

    Raises UserError where it cannot be unpacked or does not fit into memory.
    """
    label_kwargs = label_settings(artifact)
    base_quantization = quantized.read_quantization_config(artifact.base)
    if base_quantization is not None and not quantization.is_enabled:
        _refuse_packed_for_good(artifact, base_quantization)
        quantization = QuantizationSettings({"dequantize": True})
    try:
        return load_model(artifact.base, quantization, PLACE, task=artifact.task, **label_kwargs)
    # The check is the only step of a LoRA merge that needs the whole model, so the text says how to
    # go without.
    except MemoryError as error:
        raise UserError(too_large(artifact)) from error


def _refuse_packed_for_good(artifact: Artifact, quantization: dict[str, Any]) -> None:
    """Raise UserError where nothing unpacks the base."""
    method = quantized.quantization_method(quantization)
    form = quantized.QUANTIZATION_FORMATS.get(method)
    if form is None or form.dequantize_class is None:
        raise UserError(
            f"{artifact.name}: its base {artifact.base.path} comes quantized ({method}), and such "
            "weights cannot take an adapter in.\nName the model that it was made from: "
            "--base ORGANISATION/MODEL --onto original."
        )


def too_large(artifact: Artifact) -> str:
    """Return what to say where a model does not fit into memory."""
    return (
        f"{artifact.name}: the model in float32 does not fit into this machine's memory.\n"
        "Merging LoRA needs one tensor at a time; it is the check that loads the model: "
        "--no-verify leaves it out."
    )


def grow_embeddings(model: Any, adapters: list[tuple[Path, float]]) -> None:
    """Give the embeddings the rows that the adapters' new tokens need."""
    rows = max(embedding_rows_needed(folder) for folder, _ in adapters)
    if rows > model.get_input_embeddings().weight.shape[0]:
        # The adapter brings the values of the new rows: a mean over the old ones would be thrown
        # away.
        model.resize_token_embeddings(rows, mean_resizing=False)


def logits(
    model: Any, prompts: list[list[int]], inputs_with_images: "Sequence[Mapping[str, Tensor]]" = ()
) -> "list[Tensor]":
    """Compute the logits of each prompt; float32, shape (tokens, vocabulary) or (labels,).

    `inputs_with_images` are all that the model takes for further prompts, which have images.
    """
    import torch

    outputs = []
    with torch.inference_mode():
        for ids in prompts:
            # One prompt at a time: padding would change the logits in the last digits.
            inputs = {"input_ids": torch.tensor([ids])}
            if model.config.is_encoder_decoder:
                # Any tokens do for the decoder, as long as both models are given the same ones.
                inputs["decoder_input_ids"] = torch.tensor([ids[:8]])
            outputs.append(model(**inputs).logits[0].float())
        outputs += [model(**inputs).logits[0].float() for inputs in inputs_with_images]
    return outputs


# Routers choose: where two experts score alike, the last bit of a number decides which of them is
# run, and everything after it is another. So that two models can be compared by their numbers, the
# second one is given the first one's choices. Its routers' weights still count: the chosen experts
# are weighed by its own scores.


@dataclass
class RouterChoices:
    """What was chosen by `torch.topk` in the forwards of a model, in their order."""

    chosen: "list[Tensor]" = field(default_factory=list)
    """The indices of each call, shape (..., k)."""
    others: int = 0
    """Places at which the second model would have chosen otherwise."""
    places: int = 0


@contextmanager
def record_choices() -> Iterator[RouterChoices]:
    """Note what routers choose within the block."""
    choices = RouterChoices()

    def record(result: Any, _: "Tensor") -> Any:
        choices.chosen.append(result.indices)
        return result

    with _watch_topk(record):
        yield choices


@contextmanager
def replay_choices(choices: RouterChoices) -> Iterator[None]:
    """Let routers choose as another model did, in the same forwards, within the block."""
    import torch

    recorded = iter(choices.chosen)

    def replay(result: Any, scores: "Tensor") -> Any:
        indices = next(recorded, None)
        # Another number of calls, or of places, is another model: its own numbers then tell.
        if indices is None or indices.shape != result.indices.shape:
            return result
        differs = indices.sort(-1).values != result.indices.sort(-1).values
        choices.others += int(differs.any(-1).sum())
        choices.places += differs[..., 0].numel()
        # All routers of transformers (5.23) choose along the last axis.
        return torch.return_types.topk([scores.gather(-1, indices), indices])

    with _watch_topk(replay):
        yield


@contextmanager
def _watch_topk(handle: "Callable[[Any, Tensor], Any]") -> Iterator[None]:
    """Have the result of every `torch.topk` go through `handle`, which is given the scores, too."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            is_topk = func in (torch.topk, torch.Tensor.topk)
            return handle(result, args[0] if args else kwargs["input"]) if is_topk else result

    with Watch():
        yield


def _scale_adapter(model: Any, name: str, weight: float) -> None:
    """Multiply what an adapter adds by its weight."""
    from peft.tuners.lora.layer import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.scaling:
            layer.scaling[name] *= weight


# Adapters into a base by peft itself, for what cannot be merged tensor by tensor. The whole model
# is in memory, in float32.


def merge_in_memory(
    artifact: Artifact,
    adapters: list[tuple[Path, float]],
    layout: ModelLayout | None,
    dtype: str | None,
    folder: Path,
) -> str:
    """Merge and save the model with its configuration into `folder`; returns its number format.

    `layout` names the layers that were packed in training; None where none is to be packed.
    `dtype` None keeps the base's. Raises UserError where the method has no merge.
    """
    import torch

    model = base_of(artifact, QuantizationSettings())
    # The model's own says in what it was loaded.
    saved_dtype = getattr(read_model_config(artifact.base), "dtype", None)
    model_dtype = str(saved_dtype or "float32").removeprefix("torch.")
    if layout is not None:
        _round_as_trained(model, layout, artifact.quantization)
    grow_embeddings(model, adapters)
    merged = _merge_with_peft(model, artifact, adapters)
    chosen = dtype or (model_dtype if artifact.base.dtype == "auto" else artifact.base.dtype)
    # The cast comes last, so that the sum is rounded once and not at every step.
    merged.to(getattr(torch, chosen))
    merged.config.dtype = chosen
    merged.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    return chosen


def _round_as_trained(model: Any, layout: ModelLayout, quantization: QuantizationSettings) -> None:
    """Round the weights that were packed in training as they were."""
    for name in layout.packed:
        weight = model.get_parameter(name)
        is_turned = name.removesuffix(".weight") in layout.transposed
        weight.data = dequantized_as_trained(weight.data, quantization, is_turned)


def _merge_with_peft(model: Any, artifact: Artifact, adapters: list[tuple[Path, float]]) -> Any:
    wrapped = model
    try:
        for number, (folder, _) in enumerate(adapters):
            wrapped = load_adapter(wrapped, folder, f"a{number}")
        if len(adapters) > 1 or adapters[0][1] != 1.0:
            raise UserError(
                f"{artifact.name}: only LoRA of linear layers and embeddings is added up or "
                "weighted; merge this adapter alone, with weight 1."
            )
        return wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise UserError(
            f"{artifact.name}: peft cannot merge this adapter into its base: {error}\n"
            "It is served as an adapter: luthier push RUN."
        ) from error
