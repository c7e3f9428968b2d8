"""The YAML block at the head of a model card, as the hub reads it."""

import math
from typing import Any

from luthier.export.story import Story

TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}
"""Pipeline tags of the hub; an encoder-decoder model has none that says what it does."""


def metadata(story: Story) -> dict[str, Any]:
    """What the hub is told of a model: only what is known; raises nothing.

    `base_model` and `datasets` are hub names, so that bases and rows from elsewhere are left out.
    """
    from huggingface_hub import ModelCardData

    results = _model_index(story)
    base: dict[str, Any] = {}
    if story.base.hub:
        base = {"base_model": story.base.hub, "base_model_relation": relation(story)}
    data = list(dict.fromkeys(one.name for one in story.data if one.is_hub))
    known = ModelCardData(
        library_name="peft" if story.kind == "adapter" else "transformers",
        pipeline_tag=TASKS.get(story.task),
        license=story.licence,
        language=story.language or None,
        datasets=data or None,
        tags=_tags(story),
        eval_results=results or None,
        model_name=story.title if results else None,
        **base,
    )
    found: dict[str, Any] = known.to_dict()
    return found


def relation(story: Story) -> str:
    """What the model is to its base, in the hub's words."""
    if story.kind == "adapter":
        return "adapter"
    return "quantized" if story.packed and story.method is None else "finetune"


def _tags(story: Story) -> list[str]:
    tags = ["luthier"]
    if story.method:
        tags.append(story.method)
    if story.adapter:
        tags.append(str(story.adapter.get("peft_type", "lora")).lower())
    if story.task == "SEQ_2_SEQ_LM":
        tags.append("text2text-generation")
    if story.packed:
        tags += [f"{story.packed['bits']}-bit", story.packed["method"]]
    return tags


def _model_index(story: Story) -> list[Any]:
    from huggingface_hub import EvalResult

    names = [one.name for one in story.data if one.is_hub] or ["held-out rows"]
    found = []
    for name, pair in story.results.items():
        value, metric = pair.get("after"), name.rpartition("/")[2]
        if value is None or not math.isfinite(value):
            continue
        found.append(
            EvalResult(
                task_type=TASKS.get(story.task, "text2text-generation"),
                dataset_type=names[0].replace(" ", "-"),
                dataset_name=_set(name, names[0]),
                metric_type="loss" if metric.endswith("loss") else metric,
                metric_name=metric.replace("_", " "),
                metric_value=round(value, 6),
            )
        )
    return found


def _set(name: str, data: str) -> str:
    """The evaluation set of a result: `code/exact_match` is of the set `code`."""
    named = name.rpartition("/")[0]
    return f"{data} ({named})" if named else data
