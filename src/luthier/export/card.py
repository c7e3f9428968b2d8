"""The model card: what a model is, how it was made, how good it is, how to use it."""

import math
from typing import Any

import yaml

from luthier.export.model_facts import DataFacts, ModelFacts
from luthier.export.usage_snippets import python_snippet, requirements

# The YAML block at the head of a model card, as the hub reads it. A field that is not known is left
# out, since nothing in a card is guessed.

TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}
"""Pipeline tags of the hub; an encoder-decoder model has none that says what it does."""


def card_metadata(story: ModelFacts) -> dict[str, Any]:
    """Return what the hub is told of a model: only what is known; raises nothing.

    `base_model` and `datasets` are hub names, so that bases and rows from elsewhere are left out.
    """
    from huggingface_hub import ModelCardData

    results = _make_model_index(story)
    base: dict[str, Any] = {}
    if story.base.hub:
        base = {"base_model": story.base.hub, "base_model_relation": base_model_relation(story)}
    data = list(dict.fromkeys(source.name for source in story.data if source.is_hub))
    card_data = ModelCardData(
        library_name="peft" if story.kind == "adapter" else "transformers",
        pipeline_tag=TASKS.get(story.task),
        license=story.licence,
        language=story.language or None,
        datasets=data or None,
        tags=_make_tags(story),
        eval_results=results or None,
        # huggingface_hub writes model-index only where both are given, and refuses results without
        # a name.
        model_name=story.title if results else None,
        **base,
    )
    fields: dict[str, Any] = card_data.to_dict()
    return fields


def base_model_relation(story: ModelFacts) -> str:
    """Return what the model is to its base, in the hub's words."""
    if story.kind == "adapter":
        return "adapter"
    return "quantized" if story.packed and story.method is None else "finetune"


def _make_tags(story: ModelFacts) -> list[str]:
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


def _make_model_index(story: ModelFacts) -> list[Any]:
    from huggingface_hub import EvalResult

    names = [source.name for source in story.data if source.is_hub] or ["held-out rows"]
    results = []
    for name, pair in story.results.items():
        # `code/exact_match` is exact_match on the evaluation set `code`.
        evaluation_set, _, metric = name.rpartition("/")
        value = pair.get("after")
        # A training that broke off or diverged has no result to state.
        if value is None or not math.isfinite(value):
            continue
        results.append(
            EvalResult(
                task_type=TASKS.get(story.task, "text2text-generation"),
                # The hub wants an identifier here, which has no spaces.
                dataset_type=names[0].replace(" ", "-"),
                dataset_name=f"{names[0]} ({evaluation_set})" if evaluation_set else names[0],
                metric_type="loss" if metric.endswith("loss") else metric,
                metric_name=metric.replace("_", " "),
                metric_value=round(value, 6),
            )
        )
    return results


# The text of the card: one function for each section, which is empty where nothing is known.

_PACKAGES = ("luthier", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes")


def write_model_card(
    story: ModelFacts, stop_ids: list[int], has_template: bool, repository: str = "."
) -> str:
    """Write the text of README.md; `repository` is a hub name, or `.` for the folder it lies in.

    Nothing in it is guessed, and no path of this machine stands in it.
    """
    head = yaml.safe_dump(card_metadata(story), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{head}---\n",
        f"# {story.title}\n\n{_first_sentence(story)}",
        _merge_section(story),
        _results_section(story),
        _usage_section(story, stop_ids, has_template, repository),
        _data_section(story),
        _training_section(story),
        _versions_section(story),
        _licence_section(story),
    ]
    return "\n\n".join(section.rstrip() for section in sections if section) + "\n"


def _first_sentence(story: ModelFacts) -> str:
    base = _link_name(story.base.name, story.base.hub)
    if story.base.package:
        base += f" (a GGUF file of the Python package {story.base.package})"
    if story.method is None and not story.adapter:
        if not story.packed:
            return f"Weights that were trained from {base}; how is not known here."
        return f"{base}{_describe_packing(story)}."
    how = ", ".join(
        filter(None, (story.method, _describe_adapter(story), _describe_training_weights(story)))
    )
    what = "An adapter for" if story.kind == "adapter" else "A fine-tuned"
    recipe = f" from the recipe `{story.recipe}`" if story.recipe else ""
    return f"{what} {base}, trained with luthier ({how}){recipe}{_describe_packing(story)}."


def _link_name(name: str, hub: str | None, repo_type: str = "") -> str:
    return f"[{name}](https://huggingface.co/{repo_type}{hub})" if hub else name


def _describe_adapter(story: ModelFacts) -> str:
    if not story.adapter:
        return "" if story.kind == "adapter" else "all weights"
    name = "DoRA" if story.adapter.get("use_dora") else str(story.adapter.get("peft_type", "LORA"))
    rank = story.adapter.get("r")
    return f"{'LoRA' if name == 'LORA' else name}{f' of rank {rank}' if rank else ''}"


def _describe_training_weights(story: ModelFacts) -> str:
    packing = story.quantization
    if packing.get("load_in_4bit"):
        return f"on {packing.get('bnb_4bit_quant_type', 'fp4')} weights"
    return "on int8 weights" if packing.get("load_in_8bit") else ""


def _describe_packing(story: ModelFacts) -> str:
    if not story.packed:
        return ""
    return f", with weights in {story.packed['bits']} bits ({story.packed['method']})"


def _merge_section(story: ModelFacts) -> str:
    if not story.merged:
        return ""
    facts = story.merged
    onto = {
        "trained": "the weights that it was trained on"
        + (", which are the 4- or 8-bit ones unpacked" if story.quantization else ""),
        "original": "the weights before quantization, which it was not trained on",
    }
    text = f"The adapter was merged in float32 into {onto[facts['onto']]}, then cast to "
    text += f"{facts['dtype']}."
    if facts.get("weights"):
        adapters = [f"{name} by {weight:g}" for name, weight in facts["weights"]]
        text = f"Several adapters were added up ({', '.join(adapters)}). {text}"
    if facts.get("difference") is not None:
        text += (
            f" On {facts['prompts']} prompts the largest difference between its logits and those "
            f"of the model with the adapter is {facts['difference']:.2g}."
        )
    return text


def _results_section(story: ModelFacts) -> str:
    if not story.results:
        return ""
    lines = ["## Results", "", "| held-out rows | before | after |", "|---|---:|---:|"]
    for name, pair in story.results.items():
        cells = " | ".join(_format_result(name, pair.get(when)) for when in ("before", "after"))
        lines.append(f"| {name.replace('_', ' ')} | {cells} |")
    held = sum(
        counts["rows"]
        for name, counts in story.counts.items()
        if isinstance(counts, dict) and "rows" in counts and name != "train"
    )
    if held:
        row_limit = story.settings.get("trainer.evaluation.rows")
        replies = f"; replies to {min(held, row_limit):,} of them" if row_limit else ""
        lines += ["", f"Measured before and after training on {held:,} held-out rows{replies}."]
    if story.has_plot:
        lines += ["", "![The loss over the steps](loss.png)"]
    return "\n".join(lines)


def _format_result(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name.endswith("exact_match") else f"{value:.4g}"


def _usage_section(
    story: ModelFacts, stop_ids: list[int], has_template: bool, repository: str
) -> str:
    code = python_snippet(story, stop_ids, has_template, repository)
    return (
        f"## How to use it\n\n```sh\n{requirements(story)}\n```\n\n```python\n{code}\n```\n\n"
        "EXPORT.md says how to serve it with vLLM, TGI and Ollama, with the exact chat template "
        "and stop tokens."
    )


def _data_section(story: ModelFacts) -> str:
    if not story.data:
        return ""
    lines = ["## Data", "", "| source | licence |", "|---|---|"]
    lines += [
        f"| {_link_source(source)} | {source.licence or 'not stated'} |" for source in story.data
    ]
    train = story.counts.get("train", {})
    if train.get("rows"):
        lines += ["", f"{train['rows']:,} rows, {train['tokens']:,} tokens, of which "
                  f"{train['trained_tokens']:,} trained."]  # fmt: skip
    if story.counts.get("sha256"):
        lines += ["", f"SHA-256 of all token rows and labels: `{story.counts['sha256']}`"]
    return "\n".join(lines)


def _link_source(data: DataFacts) -> str:
    name = _link_name(data.name, data.name if data.is_hub else None, "datasets/")
    return f"{name} ({data.part})" if data.part else name


def _training_section(story: ModelFacts) -> str:
    if not story.settings:
        return ""
    lines = ["## Training", "", "| setting | value |", "|---|---|"]
    for key, value in story.settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        # A bar or a line break would end the cell of the Markdown table.
        cell = text.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{key}` | {cell} |")
    if story.recipe:
        # The folder is one of the machine that trained: whoever trains it again has another.
        overrides = " ".join(
            override for override in story.overrides if not override.startswith("output_dir=")
        )
        lines += ["", f"    luthier train {overrides}"]
    if story.seconds is not None and story.hardware:
        lines += ["", f"Training took {_format_time(story.seconds)} on {story.hardware}."]
    return "\n".join(lines)


def _format_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _versions_section(story: ModelFacts) -> str:
    versions = [f"{name} {story.versions[name]}" for name in _PACKAGES if name in story.versions]
    python = story.versions.get("python")
    return f"## Versions\n\nPython {python}, {', '.join(versions)}." if python else ""


def _licence_section(story: ModelFacts) -> str:
    model = f"This model: {story.licence}." if story.licence else "None is stated for this model."
    base = (
        f"Its base, {story.base.name}: {story.base.licence}."
        if story.base.licence
        else f"The licence of its base, {story.base.name}, was not found; it holds all the same."
    )
    return f"## Licence\n\n{model} {base}"
