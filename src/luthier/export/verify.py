"""Does a merged model say what the model with its adapter says? Their logits, side by side."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.export.loaded import PLACE, logits
from luthier.model.artifact import Artefact, encoder_of
from luthier.model.load import CLASSES
from luthier.record.plots import read_metrics

if TYPE_CHECKING:
    from torch import Tensor

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
ROUNDED_INPUTS = 2e-1
"""The same where the run's layers round their inputs too: 8-bit ones of bitsandbytes do."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart."""

    largest: float
    """The largest absolute difference."""
    relative: float
    """The same in standard deviations of the logits."""
    agreeing: float
    """The share of places where both find the same token likeliest."""
    prompts: int


class NotTheSame(UserError):
    """A merged model that says something else than it should; it is left to be looked at."""


def prompts_of(artefact: Artefact, tokenizer: Any) -> list[list[int]]:
    """Prompts as the model was trained on: of the run's held-out rows, and plain questions."""
    replies = [] if artefact.run is None else read_metrics(artefact.run / "replies.jsonl")
    asked = [row["prompt"] for row in replies[:_ROWS] if isinstance(row.get("prompt"), str)]
    texts = [*asked, *QUESTIONS]
    has_template = artefact.chat is not None or tokenizer.chat_template is not None
    if artefact.task != "CAUSAL_LM" or not has_template:
        return [tokenizer(text)["input_ids"] for text in texts]
    encoder = encoder_of(artefact, tokenizer)
    return [encoder.prompt([{"role": "user", "content": text}]) for text in texts]


def compare(
    wanted: "Callable[[], Any]", folder: Path, task: str, prompts: list[list[int]]
) -> Difference:
    """The difference of a merged folder's logits from those of the model that `wanted` loads.

    One model is in memory at a time.
    """
    model = wanted()
    before = logits(model, prompts)
    del model
    gc.collect()
    return between(before, logits(load_folder(folder, task), prompts))


def load_folder(folder: Path, task: str, **own: Any) -> Any:
    """A saved model in float32, in main memory."""
    import transformers

    kind: Any = getattr(transformers, CLASSES[task])
    return kind.from_pretrained(folder, dtype=PLACE.dtype, local_files_only=True, **own).eval()


def between(before: "list[Tensor]", after: "list[Tensor]") -> Difference:
    """The difference of two lists of logits."""
    pairs = list(zip(before, after, strict=True))
    largest = max(float((b - a).abs().max()) for b, a in pairs)
    spread = max(float(b.std()) for b in before)
    same = sum(int((b.argmax(-1) == a.argmax(-1)).sum()) for b, a in pairs)
    places = sum(b.argmax(-1).numel() for b in before)
    return Difference(largest, largest / spread if spread else largest, same / places, len(before))


def refuse_unlike_logits(difference: Difference, bound: float, aside: Path) -> None:
    """Raise NotTheSame where a difference is more than rounding explains."""
    if difference.relative <= bound:
        return
    raise NotTheSame(
        f"The merged model does not say what the model with its adapter says: on "
        f"{difference.prompts} prompts its logits differ by up to {difference.largest:.3g} "
        f"({difference.relative:.3g} standard deviations; rounding explains {bound:g}).\n"
        f"Nothing was written; it lies in {aside} to be looked at. If this "
        "is what you want, --no-verify leaves the check out."
    )
