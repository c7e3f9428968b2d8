"""The model card: what a model is, how it was made, how good it is, how to use it."""

import math
from typing import Any

import yaml

from luthier.export.model_facts import DataFacts, ModelFacts
from luthier.export.usage_snippets import python_snippet, requirements
from luthier.terminal import format_duration

# The YAML block at the head of a model card, as the hub reads it. A field that is not known is left
# out, since nothing in a card is guessed.

TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}
"""Pipeline tags of the hub; an encoder-decoder model has none that says what it does."""


def card_metadata(facts: ModelFacts) -> dict[str, Any]:
    """Return what the hub is told of a model: only what is known; raises nothing.

    `base_model` and `datasets` are hub names, so that bases and rows from elsewhere are left out.
    """
    from huggingface_hub import ModelCardData

    results = _make_model_index(facts)
    base: dict[str, Any] = {}
    if facts.base.hub:
        base = {"base_model": facts.base.hub, "base_model_relation": base_model_relation(facts)}
    data = list(dict.fromkeys(source.name for source in facts.data if source.is_hub))
    card_data = ModelCardData(
        library_name="peft" if facts.kind == "adapter" else "transformers",
        pipeline_tag=TASKS.get(facts.task),
        license=facts.licence,
        language=facts.language or None,
        datasets=data or None,
        tags=_make_tags(facts),
        eval_results=results or None,
        # huggingface_hub writes model-index only where both are given, and refuses results without
        # a name.
        model_name=facts.title if results else None,
        **base,
    )
    fields: dict[str, Any] = card_data.to_dict()
    return fields


def base_model_relation(facts: ModelFacts) -> str:
    """Return what the model is to its base, in the hub's words."""
    if facts.kind == "adapter":
        return "adapter"
    return "quantized" if facts.packed and facts.method is None else "finetune"


def _make_tags(facts: ModelFacts) -> list[str]:
    tags = ["luthier"]
    if facts.method:
        tags.append(facts.method)
    if facts.adapter:
        tags.append(str(facts.adapter.get("peft_type", "lora")).lower())
    if facts.task == "SEQ_2_SEQ_LM":
        tags.append("text2text-generation")
    if facts.packed:
        tags += [f"{facts.packed['bits']}-bit", facts.packed["method"]]
    return tags


def _make_model_index(facts: ModelFacts) -> list[Any]:
    from huggingface_hub import EvalResult

    names = [source.name for source in facts.data if source.is_hub] or ["held-out rows"]
    results = []
    for name, pair in facts.results.items():
        # `code/exact_match` is exact_match on the evaluation set `code`.
        evaluation_set, _, metric = name.rpartition("/")
        value = pair.get("after")
        # A training that broke off or diverged has no result to state.
        if value is None or not math.isfinite(value):
            continue
        results.append(
            EvalResult(
                task_type=TASKS.get(facts.task, "text2text-generation"),
                # The hub wants an identifier here, which has no spaces.
                dataset_type=names[0].replace(" ", "-"),
                dataset_name=f"{names[0]} ({evaluation_set})" if evaluation_set else names[0],
                metric_type="loss" if metric.endswith("loss") else metric,
                metric_name=metric,
                metric_value=round(value, 6),
            )
        )
    return results


# The text of the card: one function for each section, which is empty where nothing is known.

_PACKAGES = ("luthier", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes")


def write_model_card(
    facts: ModelFacts, stop_ids: list[int], has_template: bool, repository: str = "."
) -> str:
    """Write the text of README.md; `repository` is a hub name, or `.` for the folder it lies in.

    Nothing in it is guessed, and no path of this machine stands in it.
    """
    head = yaml.safe_dump(card_metadata(facts), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{head}---\n",
        f"# {facts.title}\n\n{_first_sentence(facts)}",
        _merge_section(facts),
        _results_section(facts),
        _usage_section(facts, stop_ids, has_template, repository),
        _data_section(facts),
        _training_section(facts),
        _versions_section(facts),
        _licence_section(facts),
    ]
    return "\n\n".join(section.rstrip() for section in sections if section) + "\n"


def _first_sentence(facts: ModelFacts) -> str:
    base = _link_name(facts.base.name, facts.base.hub)
    if facts.base.package:
        base += f" (a GGUF file of the Python package {facts.base.package})"
    if facts.method is None and not facts.adapter:
        if not facts.packed:
            return f"Weights that were trained from {base}; how is not known here."
        return f"{base}{_describe_packing(facts)}."
    how = ", ".join(
        filter(None, (facts.method, _describe_adapter(facts), _describe_training_weights(facts)))
    )
    what = "An adapter for" if facts.kind == "adapter" else "A fine-tuned"
    recipe = f" from the recipe `{facts.recipe}`" if facts.recipe else ""
    return f"{what} {base}, trained with luthier ({how}){recipe}{_describe_packing(facts)}."


def _link_name(name: str, hub: str | None, repo_type: str = "") -> str:
    return f"[{name}](https://huggingface.co/{repo_type}{hub})" if hub else name


def _describe_adapter(facts: ModelFacts) -> str:
    if not facts.adapter:
        return "" if facts.kind == "adapter" else "all weights"
    name = "DoRA" if facts.adapter.get("use_dora") else str(facts.adapter.get("peft_type", "LORA"))
    rank = facts.adapter.get("r")
    return f"{'LoRA' if name == 'LORA' else name}{f' of rank {rank}' if rank else ''}"


def _describe_training_weights(facts: ModelFacts) -> str:
    packing = facts.quantization
    if packing.get("load_in_4bit"):
        return f"on {packing.get('bnb_4bit_quant_type', 'fp4')} weights"
    return "on int8 weights" if packing.get("load_in_8bit") else ""


def _describe_packing(facts: ModelFacts) -> str:
    if not facts.packed:
        return ""
    return f", with weights in {facts.packed['bits']} bits ({facts.packed['method']})"


def _merge_section(facts: ModelFacts) -> str:
    if not facts.merged:
        return ""
    merge_facts = facts.merged
    onto = {
        "trained": "the weights that it was trained on"
        + (", which are the 4- or 8-bit ones unpacked" if facts.quantization else ""),
        "original": "the weights before quantization, which it was not trained on",
    }
    text = f"The adapter was merged in float32 into {onto[merge_facts['onto']]}, then cast to "
    text += f"{merge_facts['dtype']}."
    if merge_facts.get("weights"):
        adapters = [f"{name} by {weight:g}" for name, weight in merge_facts["weights"]]
        text = f"Several adapters were added up ({', '.join(adapters)}). {text}"
    if merge_facts.get("difference") is not None:
        text += (
            f" On {merge_facts['prompts']} prompts the largest difference between its logits and "
            f"those of the model with the adapter is {merge_facts['difference']:.2g}."
        )
    return text


def _results_section(facts: ModelFacts) -> str:
    if not facts.results:
        return ""
    lines = ["## Results", "", "| held-out rows | before | after |", "|---|---:|---:|"]
    for name, pair in facts.results.items():
        cells = " | ".join(_format_result(name, pair.get(when)) for when in ("before", "after"))
        lines.append(f"| {name} | {cells} |")
    held = sum(
        counts["rows"]
        for name, counts in facts.counts.items()
        if isinstance(counts, dict) and "rows" in counts and name != "train"
    )
    if held:
        row_limit = facts.settings.get("trainer.evaluation.rows")
        replies = f"; replies to {min(held, row_limit):,} of them" if row_limit else ""
        lines += ["", f"Measured before and after training on {held:,} held-out rows{replies}."]
    if facts.has_plot:
        lines += ["", "![The loss over the steps](loss.png)"]
    return "\n".join(lines)


def _format_result(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name.endswith("exact_match") else f"{value:.4g}"


def _usage_section(
    facts: ModelFacts, stop_ids: list[int], has_template: bool, repository: str
) -> str:
    code = python_snippet(facts, stop_ids, has_template, repository)
    return (
        f"## How to use it\n\n```sh\n{requirements(facts)}\n```\n\n```python\n{code}\n```\n\n"
        "EXPORT.md says how to serve it with vLLM, TGI, llama.cpp and Ollama, with the exact chat "
        "template and stop tokens."
    )


def _data_section(facts: ModelFacts) -> str:
    if not facts.data:
        return ""
    lines = ["## Data", "", "| source | licence |", "|---|---|"]
    lines += [
        f"| {_link_source(source)} | {source.licence or 'not stated'} |" for source in facts.data
    ]
    train = facts.counts.get("train", {})
    if train.get("rows"):
        lines += ["", f"{train['rows']:,} rows, {train['tokens']:,} tokens, of which "
                  f"{train['trained_tokens']:,} trained."]  # fmt: skip
    if facts.counts.get("sha256"):
        lines += ["", f"SHA-256 of all token rows and labels: `{facts.counts['sha256']}`"]
    return "\n".join(lines)


def _link_source(data: DataFacts) -> str:
    name = _link_name(data.name, data.name if data.is_hub else None, "datasets/")
    return f"{name} ({data.part})" if data.part else name


def _training_section(facts: ModelFacts) -> str:
    if not facts.settings:
        return ""
    lines = ["## Training", "", "| setting | value |", "|---|---|"]
    for key, value in facts.settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        # A bar or a line break would end the cell of the Markdown table.
        cell = text.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{key}` | {cell} |")
    if facts.recipe:
        # The folder is one of the machine that trained: whoever trains it again has another.
        overrides = " ".join(
            override for override in facts.overrides if not override.startswith("output_dir=")
        )
        lines += ["", f"    luthier train {overrides}"]
    if facts.seconds is not None and facts.hardware:
        lines += ["", f"Training took {format_duration(facts.seconds)} on {facts.hardware}."]
    return "\n".join(lines)


def _versions_section(facts: ModelFacts) -> str:
    versions = [f"{name} {facts.versions[name]}" for name in _PACKAGES if name in facts.versions]
    python = facts.versions.get("python")
    return f"## Versions\n\nPython {python}, {', '.join(versions)}." if python else ""


def _licence_section(facts: ModelFacts) -> str:
    model = f"This model: {facts.licence}." if facts.licence else "None is stated for this model."
    base = (
        f"Its base, {facts.base.name}: {facts.base.licence}."
        if facts.base.licence
        else f"The licence of its base, {facts.base.name}, was not found; it holds all the same."
    )
    return f"## Licence\n\n{model} {base}"
