"""EXPORT.md: how other servers give the tokens that a model was trained on."""

import json
import shlex
from dataclasses import dataclass

from luthier.export import ollama
from luthier.export.story import Story

_HEADING = "Use chat_template.jinja of this folder as it is; it is also in the tokenizer's files."


@dataclass(frozen=True)
class Spoken:
    """What a server must know to talk to a model as it was trained."""

    stop_ids: list[int]
    stops: list[str]
    """The stop tokens as text, in the order of their ids."""
    template: str | None
    """The chat template; None for a model that reads no conversations."""
    go: str | None = None
    """The same for Ollama, where one was proved equal."""
    bos: str | None = None
    asks_date: bool = False


def notes(story: Story, spoken: Spoken, place: str = ".") -> str:
    """The text of EXPORT.md for a model in `place` (a hub name, or `.` for this folder)."""
    if story.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return (
            f"# Serving {story.title}\n\nThis model writes no replies: vLLM serves it as a pooling "
            "model, TGI and Ollama do not. README.md has the Python for it.\n"
        )
    parts = [
        f"# Serving {story.title}",
        "What a server must do to give the tokens that the model was trained on.",
        _tokens(story, spoken),
        _merge_first(story),
        _vllm(story, spoken, place),
        _tgi(story, place),
        _ollama(story, spoken),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _tokens(story: Story, spoken: Spoken) -> str:
    lines = ["## Template and stop tokens", "", "Stop tokens:", ""]
    pairs = zip(spoken.stops, spoken.stop_ids, strict=True)
    lines += [f"- `{text}`, id {number}" for text, number in pairs]
    if spoken.template is None:
        return "\n".join([*lines, "", "There is no chat template: prompts are plain text."])
    lines += ["", _HEADING, "", "~~~jinja", spoken.template, "~~~"]
    if story.variables:
        given = json.dumps(story.variables, ensure_ascii=False)
        lines += ["", f"It was trained with these variables of the template: `{given}`. Servers "
                  "take them as `chat_template_kwargs` of a request."]  # fmt: skip
    if spoken.asks_date:
        lines += ["", f"The template writes the date. Training gave it {story.date}; a server "
                  "gives today's."]  # fmt: skip
    if story.system:
        shown = json.dumps(story.system, ensure_ascii=False)
        lines += ["", f"Rows without a system prompt were trained with this one: {shown}"]
    return "\n".join(lines)


def _merge_first(story: Story) -> str:
    if story.kind != "adapter":
        return ""
    reasons = []
    if story.adapter.get("peft_type") != "LORA":
        reasons.append(f"it is of the type {story.adapter.get('peft_type')}")
    if story.adapter.get("use_dora"):
        reasons.append("it is a DoRA")
    if story.adapter.get("modules_to_save") or story.adapter.get("trainable_token_indices"):
        reasons.append("it holds whole layers or rows of the embeddings")
    if story.quantization:
        reasons.append("it was trained on quantized weights, which servers do not have")
    if not reasons:
        return ""
    return (
        "## Merge it first\n\nServers put plain LoRA on the base's own weights. This adapter needs "
        f"a merge for the logits that it was trained to: {'; '.join(reasons)}.\n\n"
        "    luthier merge RUN --out merged"
    )


def _vllm(story: Story, spoken: Spoken, place: str) -> str:
    ends = json.dumps({"eos_token_id": spoken.stop_ids})
    template = " --chat-template chat_template.jinja" if spoken.template else ""
    if story.kind != "adapter":
        return (
            f"## vLLM\n\n    vllm serve {place}\n\n"
            "It takes the template from the tokenizer and the stop tokens from "
            "generation_config.json."
        )
    base = story.base.hub or "path/to/" + story.base.name
    rank = story.adapter.get("r")
    most = f" --max-lora-rank {_allowed(rank)}" if isinstance(rank, int) else ""
    return (
        "## vLLM\n\nMerged:\n\n    vllm serve merged\n\n"
        "Without a merge (see above for when that is right):\n\n"
        f"    vllm serve {base} --enable-lora{most} \\\n"
        f"        --lora-modules {shlex.quote(story.title)}={place} \\\n"
        f"       {template} --override-generation-config {shlex.quote(ends)}"
    )


def _allowed(rank: int) -> int:
    """The next rank that vLLM takes."""
    return next((one for one in (8, 16, 32, 64, 128, 256, 320, 512) if one >= rank), rank)


def _tgi(story: Story, place: str) -> str:
    folder = "merged" if story.kind == "adapter" else place
    return (
        f"## TGI\n\n    text-generation-launcher --model-id {folder}\n\n"
        "It takes the template from the tokenizer and the stop tokens from "
        "generation_config.json."
    )


def _ollama(story: Story, spoken: Spoken) -> str:
    folder = "./merged" if story.kind == "adapter" else "."
    if spoken.template is None:
        go: str | None = "{{ .Prompt }}"
        words = "Prompts go to the model as they are."
    elif spoken.go is not None:
        go = spoken.go
        words = (
            "TEMPLATE writes what the chat template writes, for alternating messages with or "
            f"without a system prompt: held equal on {len(ollama.probes())} conversations, empty "
            "texts, white space at the edges and markup among them. Tools are not part of it."
        )
        if spoken.asks_date:
            words += f" The date in it is {story.date}, as in training."
        if spoken.bos:
            words += f" The first token, `{spoken.bos}`, is Ollama's to put."
    else:
        go = None
        words = (
            "This chat template cannot be put exactly into the Go templates of Ollama (such a one "
            "cannot strip white space or rewrite earlier turns), so that no TEMPLATE is given "
            "here. Without one, Ollama looks for the template that it knows for this kind of "
            "model; compare its prompts with the template above before you rely on it."
        )
    text = ollama.modelfile(go, folder, spoken.stops)
    return (
        f"## Ollama\n\n{words}\n\nModelfile:\n\n~~~\n{text}~~~\n\n    ollama create {story.title}"
    )
