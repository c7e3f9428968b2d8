"""The order of a merge: what can be refused, then the weights, then the check, then the rename."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.export import carried, story, streaming, verify, whole, writing
from luthier.export.layout import Layout, NotPlain, base_folder, layout_of
from luthier.export.loaded import tuned
from luthier.export.names import public
from luthier.export.serving import Spoken
from luthier.export.verify import Difference
from luthier.model.artifact import Artefact
from luthier.storage.atomic import filled, refuse_full_disk, refuse_target, write_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is to be merged, and how."""

    artefacts: list[Artefact]
    """The adapters; the first one's tokenizer, template and card are the result's."""
    weights: list[float]
    target: Path
    dtype: str | None = None
    """The number format that comes out; None for the base's."""
    onto: str = "trained"
    """`trained`: the weights as the run packed them; `original`: as they were before."""
    verify: bool = True
    quantize: str | None = None

    @property
    def first(self) -> Artefact:
        """The one that the result is named after."""
        return self.artefacts[0]

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """Their folders and weights."""
        folders = [one.adapter for one in self.artefacts if one.adapter is not None]
        return list(zip(folders, self.weights, strict=True))

    @property
    def packs(self) -> bool:
        """Whether the base's weights are packed and unpacked first."""
        given = self.first.quantization
        return self.onto == "trained" and bool(
            given.get("load_in_4bit") or given.get("load_in_8bit")
        )


def refuse_merge(order: Order, overwrite: bool) -> None:
    """Raise UserError for adapters of different bases, and for a target that holds something."""
    first = order.first
    for one in order.artefacts:
        if one.adapter is None:
            raise UserError(
                f"{one.word} is a whole model and no adapter: there is nothing to merge.\n"
                "To pack its weights for serving: --quantize nf4."
            )
        if one.base.path != first.base.path:
            raise UserError(
                f"{one.word}: this adapter is for another base, {one.base.path}, than "
                f"{first.word}, which is for {first.base.path}. Only adapters of one base add up."
            )
        if order.onto == "trained" and one.quantization != first.quantization:
            raise UserError(
                f"{one.word} and {first.word} were trained on weights that were packed in "
                "different ways. --onto original adds both to the weights before that."
            )
    refuse_target(order.target, overwrite)


def merge(order: Order, say: Say) -> None:
    """Merge and write the target, which appears by a rename when all is right.

    Raises UserError; a model that fails the check is left beside the target.
    """
    with filled(order.target, keep=verify.NotTheSame) as aside:
        _make(order, aside, say)
    say(f"written   {order.target}")


def _make(order: Order, aside: Path, say: Say) -> None:
    """Everything that the target holds, checked."""
    spoken = writing.spoken_of(order.first)
    dtype = _weights(order, aside, say)
    _carry(order, aside, spoken)
    difference = _checked(order, aside, dtype, say) if order.verify else None
    told = _story(order, dtype, difference)
    if order.quantize is not None:
        from luthier.export import quantizing

        packed = quantizing.pack(aside, order.quantize, order.first, say)
        told = replace(told, packed=packed)
    plot = None if order.first.run is None else order.first.run / writing.PLOT
    writing.write(aside, told, spoken, plot)


def _weights(order: Order, aside: Path, say: Say) -> str:
    """Write weights and config.json; returns their number format."""
    first = order.first
    layout: Layout | None = None
    folder = base_folder(first)
    try:
        layout = layout_of(first, folder)
        quantization = first.quantization if order.packs else {}
        merge = streaming.plan(folder, layout, order.adapters, quantization, order.dtype)
    except NotPlain as why:
        say(f"whole     the model is merged in memory, in float32: {why}")
        used = layout if order.packs else None
        return whole.merge(first, order.adapters, used, order.dtype, aside)
    refuse_full_disk(merge.size, aside)
    done = 0
    for number, entry in enumerate(merge.write(aside), 1):
        done += entry.size
        if number == len(merge.planned) or number % 50 == 0:
            say(f"merged    {number} of {len(merge.planned)} weights, {done / 1e9:.2f} GB")
    tied = bool(layout.tied) and not merge.untied
    carried.model_config(layout.config, layout.architecture, merge.dtype, merge.rows, tied)
    layout.config.save_pretrained(aside)
    return merge.dtype


def _carry(order: Order, aside: Path, spoken: Spoken) -> None:
    first = order.first
    source = first.adapter
    if source is not None and not (source / "tokenizer_config.json").is_file():
        source = Path(first.base.tokenizer) if first.base.tokenizer else base_folder(first)
    if source is not None:
        carried.carry_speech(source, aside)
    if first.chat is not None:
        write_json(aside / "chat.json", first.chat)
    if spoken.template is not None:
        # What was trained, also where the run's config replaced the tokenizer's own.
        (aside / "chat_template.jinja").write_text(spoken.template, encoding="utf-8")
    carried.carry_generation(base_folder(first), first.adapter, aside, spoken)


def _checked(order: Order, aside: Path, dtype: str, say: Say) -> Difference:
    from luthier.model.tokenizer import load_tokenizer

    first = order.first
    prompts = verify.prompts_of(first, load_tokenizer(first.base))
    wanted = partial(tuned, first, order.adapters, order.packs)
    found = verify.compare(wanted, aside, first.task, prompts)
    say(
        f"checked   {found.prompts} prompts: logits differ by up to {found.largest:.3g} "
        f"({found.relative:.2g} standard deviations); the likeliest token is the same at "
        f"{found.agreeing:.1%} of the places"
    )
    bound = verify.BOUNDS[dtype]
    if order.packs and first.quantization.get("load_in_8bit"):
        bound = max(bound, verify.ROUNDED_INPUTS)
    verify.refuse_unlike_logits(found, bound, aside)
    return found


def _called(artefact: Artefact) -> str:
    """An adapter's name in the card: its run's folder, or what was typed."""
    return artefact.run.name if artefact.run is not None else public(artefact.word)


def _story(order: Order, dtype: str, difference: Difference | None) -> story.Story:
    """What the card tells of the merged model."""
    merged: dict[str, Any] = {"dtype": dtype, "onto": order.onto}
    if difference is not None:
        merged |= {"difference": difference.largest, "prompts": difference.prompts}
    if len(order.artefacts) > 1:
        merged["weights"] = [
            [_called(one), w] for one, w in zip(order.artefacts, order.weights, strict=True)
        ]
    found = story.told(order.first)
    return replace(found, kind="model", merged=merged, rows=None)
