"""The order of a merge: what can be refused, then the weights, then the check, then the rename."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.chat import ChatError
from luthier.config.library_settings import QuantizationSettings
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.export import merge_in_memory, merge_streaming, model_facts, write_card
from luthier.export.merge_in_memory import (
    PLACE,
    load_tuned,
    logits,
    record_choices,
    replay_choices,
)
from luthier.export.model_facts import public_name
from luthier.export.model_layout import ModelLayout, NeedsMemoryMerge, base_folder, layout_of
from luthier.export.usage_snippets import ChatFormat
from luthier.model.adapter_keys import open_adapter
from luthier.model.artifact import Artifact, build_chat_encoder
from luthier.model.load import load_model, read_model_config
from luthier.model.model_class import build_empty_model, read_folder_class
from luthier.model.model_files import LOADER_FILE
from luthier.model.model_images import ModelImages
from luthier.model.processor import copy_processor_files, find_processor_files
from luthier.redaction import redact
from luthier.storage.atomic import write_json
from luthier.storage.output_folder import (
    check_free_space,
    check_target,
    describe_written,
    output_folder,
)
from luthier.storage.typed_files import load_json_lines

if TYPE_CHECKING:
    from torch import Tensor

# The check: a merged model must have the logits of the model with its adapter, up to rounding.

QUESTIONS = (
    "Hello!",
    "What is the capital of France, and how many people live there?",
    "Write a function in Python that reverses a list.",
    "Berlin, 3. Oktober 1990: was geschah?",
)
"""What is asked besides the first held-out rows of the run."""
_ROWS = 4
BOUNDS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 2e-1}
"""The largest difference that rounding explains, in standard deviations of the logits."""


@dataclass(frozen=True)
class LogitDifference:
    """How far the logits of two models are apart."""

    largest: float
    """The largest absolute difference."""
    relative: float
    """The same in standard deviations of the logits."""
    agreeing: float
    """The share of places where both find the same token likeliest."""
    prompts: int
    rerouted: float = 0.0
    """The share of places where the merged model's routers would have chosen other experts."""


_REPLIES_ADVICE = "Put it back from a copy, or remove it: a merge only takes questions from it."


class LogitsDiffer(UserError):
    """A merged model that says something else than it should; it is left to be looked at."""


def prompts_of(artifact: Artifact, tokenizer: Any) -> list[list[int]]:
    """Prompts as the model was trained on: of the run's held-out rows, and plain questions."""
    replies: list[dict[str, Any]] = []
    if artifact.run is not None:
        replies = load_json_lines(artifact.run / "replies.jsonl", dict[str, Any], _REPLIES_ADVICE)
    prompt_texts = [row["prompt"] for row in replies[:_ROWS] if isinstance(row.get("prompt"), str)]
    # Rows that the run was measured on are closest to its use; the questions are there for runs
    # without any.
    texts = [*prompt_texts, *QUESTIONS]
    has_template = artifact.chat is not None or tokenizer.chat_template is not None
    if artifact.task != "CAUSAL_LM" or not has_template:
        return [tokenizer(text)["input_ids"] for text in texts]
    encoder = build_chat_encoder(artifact, tokenizer)
    return [encoder.prompt([{"role": "user", "content": text}]) for text in texts]


def picture_inputs_of(artifact: Artifact, tokenizer: Any) -> "list[dict[str, Tensor]]":
    """Return a model's inputs for a question about a picture; none for a model of text alone.

    An adapter may have matrices in the tower, which no prompt of text reaches.
    """
    import torch
    from PIL import Image

    if artifact.task != "CAUSAL_LM" or (artifact.chat is None and tokenizer.chat_template is None):
        return []
    encoder = build_chat_encoder(artifact, tokenizer)
    if not isinstance(encoder.images, ModelImages):
        return []
    size = {"width": 64, "height": 48}
    content = [{"type": "image", "image": size}, {"type": "text", "text": QUESTIONS[0]}]
    try:
        processor = encoder.images.processor
        ids = torch.tensor([encoder.prompt([{"role": "user", "content": content}])])
    except (UserError, ChatError):  # it has no processor here, or its template shows no images
        return []
    picture = Image.linear_gradient("L").resize((size["width"], size["height"])).convert("RGB")
    pixels = processor.pixel_inputs([[picture]])
    return [{"input_ids": ids, **pixels, **processor.token_type_inputs(ids)}]


def compare_models(
    load_expected: "Callable[[], Any]",
    folder: Path,
    task: str,
    prompts: list[list[int]],
    trust_remote_code: bool = False,
    base: ModelConfig | None = None,
    inputs_with_images: "Sequence[Mapping[str, Tensor]]" = (),
) -> LogitDifference:
    """Return how far a merged folder's logits are from those of what `load_expected` loads.

    One model is in memory at a time, and the merged one's routers choose the other's experts.
    `trust_remote_code` is that of the base, `base` one that a function of the user's own loads, and
    `inputs_with_images` are as `logits` takes them.
    """
    model = load_expected()
    with record_choices() as choices:
        before = logits(model, prompts, inputs_with_images)
    # Two models in float32 at once would double what the check needs.
    del model
    gc.collect()
    if base is not None and base.loader is not None:
        merged = base.model_copy(update={"path": str(folder), "revision": None})
        model = load_model(merged, {}, PLACE, task=task).eval()
    else:
        model = load_folder(folder, task, trust_remote_code=trust_remote_code)
    with replay_choices(choices):
        after = logits(model, prompts, inputs_with_images)
    rerouted = choices.others / choices.places if choices.places else 0.0
    return replace(compare_logits(before, after), rerouted=rerouted)


def load_folder(folder: Path, task: str, trust_remote_code: bool = False) -> Any:
    """Return a saved model in float32, in main memory."""
    model = read_folder_class(folder, task, trust_remote_code).from_pretrained(
        folder,
        dtype=PLACE.dtype,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    return model.eval()


def compare_logits(before: "list[Tensor]", after: "list[Tensor]") -> LogitDifference:
    """Return the difference of two lists of logits."""
    pairs = list(zip(before, after, strict=True))
    largest = max(float((b - a).abs().max()) for b, a in pairs)
    spread = max(float(b.std()) for b in before)
    same = sum(int((b.argmax(-1) == a.argmax(-1)).sum()) for b, a in pairs)
    positions = sum(b.argmax(-1).numel() for b in before)
    return LogitDifference(
        largest, largest / spread if spread else largest, same / positions, len(before)
    )


def refuse_unlike_logits(difference: LogitDifference, bound: float, aside: Path) -> None:
    """Raise LogitsDiffer where a difference is more than rounding explains."""
    if difference.relative <= bound:
        return
    raise LogitsDiffer(
        f"The merged model does not say what the model with its adapter says: on "
        f"{difference.prompts} prompts its logits differ by up to {difference.largest:.3g} "
        f"({difference.relative:.3g} standard deviations; rounding explains {bound:g}).\n"
        f"Nothing was written; it lies in {aside} to be looked at. If this "
        "is what you want, --no-verify leaves the check out."
    )


NO_PACKING = (
    "--quantize: transformers packs weights while its own classes load them, and this model is "
    "loaded by a function (model.loader). Merge it without."
)
"""Why a model that a function loads is not packed."""


# The merge itself. `Say` prints a line of progress.

Say = Callable[[str], None]


@dataclass(frozen=True)
class MergeOrder:
    """What is to be merged, and how."""

    artifacts: list[Artifact]
    """The adapters; the first one's tokenizer, template and card are the result's."""
    weights: list[float]
    target: Path
    dtype: str | None = None
    """The number format that comes out; None for the base's."""
    onto: str = "trained"
    """`trained`: the weights as the run packed them; `original`: as they were before."""
    verify: bool = True
    quantize: str | None = None
    renamed: tuple[Path, ...] = ()
    """The adapters' folders under the names of the base's class; empty for their own."""

    @property
    def first(self) -> Artifact:
        """Return the one that the result is named after."""
        return self.artifacts[0]

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """Their folders and weights."""
        folders = [artifact.adapter for artifact in self.artifacts if artifact.adapter is not None]
        return list(zip(self.renamed or folders, self.weights, strict=True))

    @property
    def packs(self) -> bool:
        """Return whether the base's weights are packed and unpacked first."""
        return self.onto == "trained" and self.first.quantization.bits is not None


def refuse_merge(order: MergeOrder, overwrite: bool) -> None:
    """Raise UserError for adapters of different bases, and for a target that holds something."""
    first = order.first
    for artifact in order.artifacts:
        if artifact.adapter is None:
            raise UserError(
                f"{artifact.name} is a whole model and no adapter: there is nothing to merge.\n"
                "To pack its weights for serving: --quantize nf4."
            )
        # The paths are compared, not the weights, which would mean to read both bases to the end.
        if artifact.base.path != first.base.path:
            raise UserError(
                f"{artifact.name}: this adapter is for another base, {artifact.base.path}, than "
                f"{first.name}, which is for {first.base.path}. Only adapters of one base add up."
            )
        if order.onto == "trained" and artifact.quantization != first.quantization:
            raise UserError(
                f"{artifact.name} and {first.name} were trained on weights that were packed in "
                "different ways. --onto original adds both to the weights before that."
            )
    if first.base.loader is not None and order.quantize is not None:
        raise UserError(NO_PACKING)
    check_target(order.target, overwrite, *list_inputs(order.artifacts))


def list_inputs(artifacts: list[Artifact]) -> tuple[list[Path], list[Path]]:
    """Return the folders (and files) that models are read from, and those of their runs."""
    bases = [Path(artifact.base.path).expanduser() for artifact in artifacts]
    adapters = [artifact.adapter for artifact in artifacts if artifact.adapter is not None]
    runs = [artifact.run for artifact in artifacts if artifact.run is not None]
    # A base by its name on the hub is no path.
    return [*(base for base in bases if base.exists()), *adapters], runs


def merge_adapters(order: MergeOrder, say: Say) -> None:
    """Merge and write the target, which appears by a rename when all is right.

    Raises UserError; a model that fails the check is left beside the target.
    """
    with (
        output_folder(order.target, keep=LogitsDiffer) as aside,
        _rename_adapters(order) as renamed_order,
    ):
        _build_target(renamed_order, aside, say)
    say(describe_written(order.target))


@contextmanager
def _rename_adapters(order: MergeOrder) -> Iterator[MergeOrder]:
    """Give the order with its adapters under the names of the class that their base loads by."""
    config = read_model_config(order.first.base)
    if config.get_text_config() is config:
        # A model without parts has no other class whose names an adapter could bear.
        yield order
        return
    empty = build_empty_model(config, order.first.task)
    with ExitStack() as stack:
        folders = [stack.enter_context(open_adapter(folder, empty)) for folder, _ in order.adapters]
        yield replace(order, renamed=tuple(folders))


def _build_target(order: MergeOrder, aside: Path, say: Say) -> None:
    """Everything that the target holds, checked."""
    chat_format = write_card.chat_format_of(order.first)
    dtype = _write_weights(order, aside, say)
    _copy_companions(order, aside, chat_format)
    # The check comes before packing: afterwards the difference of the packing would hide the
    # merge's.
    difference = _check_logits(order, aside, dtype, say) if order.verify else None
    merged_facts = _collect_merged_facts(order, dtype, difference)
    if order.quantize is not None:
        from luthier.export.quantize import quantize_merged

        packed = quantize_merged(aside, order.quantize, order.first, say)
        merged_facts = replace(merged_facts, packed=packed)
    plot = None if order.first.run is None else order.first.run / write_card.PLOT
    write_card.write_descriptions(aside, merged_facts, chat_format, plot)


def _write_weights(order: MergeOrder, aside: Path, say: Say) -> str:
    """Write weights and config.json; returns their number format."""
    first = order.first
    layout: ModelLayout | None = None
    folder = base_folder(first)
    try:
        layout = layout_of(first, folder)
        quantization = first.quantization if order.packs else QuantizationSettings()
        merge = merge_streaming.plan_merge(
            folder, layout, order.adapters, quantization, order.dtype
        )
    # Tensor by tensor is tried first because it needs memory for one tensor only; what it cannot
    # do, peft does with the whole model.
    except NeedsMemoryMerge as why:
        say(f"whole     the model is merged in memory, in float32: {why}")
        # The layout is None where it was the base itself that could not be laid out.
        used = layout if order.packs else None
        return merge_in_memory.merge_in_memory(first, order.adapters, used, order.dtype, aside)
    check_free_space(merge.size, aside)
    done = 0
    for number, entry in enumerate(merge.write(aside), 1):
        done += entry.size
        # A large model has hundreds of weights; a line for each would bury the rest.
        if number == len(merge.planned) or number % 50 == 0:
            say(f"merged    {number} of {len(merge.planned)} weights, {done / 1e9:.2f} GB")
    tied = bool(layout.tied) and not merge.untied
    write_card.model_config(layout.config, layout.architecture, merge.dtype, merge.rows, tied)
    layout.config.save_pretrained(aside)
    return merge.dtype


def _copy_companions(order: MergeOrder, aside: Path, chat_format: ChatFormat) -> None:
    first = order.first
    source = first.adapter
    # Adapters saved by others often come without a tokenizer: the base's then is the right one.
    if source is not None and not (source / "tokenizer_config.json").is_file():
        source = Path(first.base.tokenizer) if first.base.tokenizer else base_folder(first)
    if source is not None:
        write_card.copy_tokenizer_files(source, aside)
    # An adapter of another trainer, or of an older luthier, comes without its base's processor.
    copy_processor_files(find_processor_files(first.base), aside)
    if first.base.loader is not None:
        write_json(aside / LOADER_FILE, {"loader": redact(first.base.loader)})
    if first.chat is not None:
        write_json(aside / "chat.json", first.chat)
    if chat_format.template is not None:
        # What was trained, also where the run's config replaced the tokenizer's own.
        (aside / "chat_template.jinja").write_text(chat_format.template, encoding="utf-8")
    write_card.copy_generation_config(base_folder(first), first.adapter, aside, chat_format)


def _check_logits(order: MergeOrder, aside: Path, dtype: str, say: Say) -> LogitDifference:
    from luthier.model.tokenizer import load_tokenizer

    first = order.first
    tokenizer = load_tokenizer(first.base)
    prompts, pictures = prompts_of(first, tokenizer), picture_inputs_of(first, tokenizer)
    load_expected = partial(load_tuned, first, order.adapters, order.packs)
    difference = compare_models(
        load_expected,
        aside,
        first.task,
        prompts,
        first.base.trust_remote_code,
        first.base,
        pictures,
    )
    say(
        f"checked   {difference.prompts} prompts: logits differ by up to {difference.largest:.3g} "
        f"({difference.relative:.2g} standard deviations); the likeliest token is the same at "
        f"{difference.agreeing:.1%} of positions"
    )
    if difference.rerouted:
        say(
            "          both ran the experts that the model with its adapter chooses; rounded, the "
            f"merged one chooses others at {difference.rerouted:.2%} of positions"
        )
    refuse_unlike_logits(difference, BOUNDS[dtype], aside)
    return difference


def _collect_merged_facts(
    order: MergeOrder, dtype: str, difference: LogitDifference | None
) -> model_facts.ModelFacts:
    """Return what the card tells of the merged model."""
    merged: dict[str, Any] = {"dtype": dtype, "onto": order.onto}
    if difference is not None:
        merged |= {"difference": difference.largest, "prompts": difference.prompts}
    if len(order.artifacts) > 1:
        merged["weights"] = [
            [public_name(artifact.name) if artifact.run is None else artifact.run.name, weight]
            for artifact, weight in zip(order.artifacts, order.weights, strict=True)
        ]
    facts = model_facts.load_or_collect_facts(order.first)
    return replace(facts, kind="model", merged=merged, rows=None)
