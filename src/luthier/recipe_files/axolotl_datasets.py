"""The `datasets` of an axolotl config as sources of rows.

`type` there names how a row becomes text, with a prompt of axolotl's own in many cases; here the
row format is one thing (`dataset.type`), and the model's chat template writes the text.
"""

from collections.abc import Mapping
from typing import Any

from luthier.data.formats.messages import ROLE_OF_SPEAKER
from luthier.errors import UserError
from luthier.recipe_files.conversion import (
    MESSAGE_FORMS,
    Conversion,
    SourceDraft,
    set_eval_sources,
    set_sources,
)
from luthier.recipe_files.draft import recipe_name

_MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog")
"""Columns of messages that luthier finds without a mapping."""
_TRAIN_FLAGS = ("train", "training", "trainable", "loss", "loss_mask", "weight", "loss_weight")
_OTHER_PROMPT = (
    "axolotl writes the prompt in a format of its own, without the chat template; luthier puts the "
    "instruction into a user's message and the model's chat template writes the text, as a server "
    "will."
)

# Types whose rows are an instruction, perhaps with an input, and an output, by their columns.
_INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "alpaca": {},
    "alpaca_instruct": {},
    "alpaca_chat": {},
    "gpteacher": {},
    "alpaca_w_system": {},
    "alpaca_w_system.load_open_orca": {},
    "alpaca_w_system.load_open_orca_chatml": {},
    "alpaca_chat.load_qa": {},
    "alpaca_chat.load_concise": {},
    "alpaca_chat.load_no_prompt": {},
    "alpaca_chat.load_camel_ai": {"prompt": "message_1", "completion": "message_2"},
    "jeopardy": {"instruction": "category", "input": "question", "output": "answer"},
    "oasst": {"prompt": "INSTRUCTION", "completion": "RESPONSE"},
    "summarizetldr": {"prompt": "article", "completion": "summary"},
    "context_qa": {"instruction": "question", "input": "article", "output": "answer"},
    "context_qa.load_v2": {"instruction": "question", "input": "context", "output": "answer"},
    "metharme": {"prompt": "prompt", "completion": "generation"},
}
_PAIRS: Mapping[str, Mapping[str, str]] = {
    "icr": {"prompt": "input"},
    "intel": {"prompt": "question"},
    "prompt_pairs": {},
    "ultra": {},
    "argilla": {},
    "argilla_chat": {},
    "default": {},
    "nectar": {"prompt": "prompt"},
}


def read_datasets(conversion: Conversion) -> None:
    """Take `datasets`, `test_datasets` and `pretraining_dataset`, and the template and the turns
    that all of them share."""
    key = "pretraining_dataset" if conversion.has("pretraining_dataset") else "datasets"
    rows, other = conversion.take(key), "datasets"
    if key == "pretraining_dataset" and conversion.take(other):
        conversion.drop(other, "pretraining_dataset comes before it")
    entries = _entries(rows)
    if not entries:
        raise UserError(f"{conversion.file}: it names no `datasets`, so there is nothing to train.")
    _template(conversion, entries)
    set_sources(conversion, [_source(conversion, each, key) for each in entries], key)
    _turns(conversion, entries)
    if key == "pretraining_dataset":
        conversion.set_key("dataset.streaming", True, key, "rows are encoded while they train")
        conversion.leave_out("streaming", "pretraining_dataset streams in any case")
    elif conversion.take("streaming"):
        conversion.set_key("dataset.streaming", True, "streaming", "rows are encoded as they train")
    if conversion.take("dataset_exact_deduplication"):
        about = "equal rows are left out"
        conversion.set_key("dataset.deduplicate", "exact", "dataset_exact_deduplication", about)
    if tests := _entries(conversion.take("test_datasets")):
        sources = [_source(conversion, each, "test_datasets") for each in tests]
        set_eval_sources(conversion, sources, "test_datasets")


def _entries(rows: Any) -> list[dict[str, Any]]:
    """Return the datasets of a list of them, or of one; a path alone is a dataset, too."""
    rows = [rows] if isinstance(rows, dict | str) and rows else rows
    listed = rows if isinstance(rows, list) else []
    return [each if isinstance(each, dict) else {"path": each} for each in listed]


def _source(conversion: Conversion, entry: Mapping[str, Any], key: str) -> SourceDraft:
    left = {name: value for name, value in entry.items() if value is not None}
    for name in ("message_property_mappings", "roles"):
        conversion.check_value("a mapping", f"{key}: {name}", left.get(name) or {})
    for name in ("chat_template", "chat_template_jinja", "field_messages"):
        conversion.check_value("a single value", f"{key}: {name}", left.get(name))
    settings = dict(_location(conversion, left, key))
    settings |= _rows(conversion, left, key)
    ignored = {"trust_remote_code", "preprocess_shards", "conversation", "temperature"}
    if lost := sorted(set(left) - ignored):
        conversion.differ(key, f"{', '.join(lost)}: not carried over.")
    paths = settings.get("path")
    path = paths[0] if isinstance(paths, list) else str(paths)
    return SourceDraft(recipe_name(path), settings, {"path": "where the rows are"})


def _location(conversion: Conversion, left: dict[str, Any], key: str) -> dict[str, Any]:
    """Return where the rows are: files, or a dataset of the hub."""
    path, files = left.pop("path", None), left.pop("data_files", None)
    kind = left.pop("ds_type", None)
    if path is None and files is None:
        raise UserError(f"{conversion.file}: {key}: a dataset has no path.")
    settings: dict[str, Any] = {"path": path}
    if files is not None and (path is None or path in ("json", "csv", "parquet", "text", "arrow")):
        settings["path"] = files
        kind = kind or path
    elif files is not None:
        settings["options"] = {"data_files": files}
    if path == "synthetic":
        raise UserError(f"{conversion.file}: {key}: synthetic rows are made by axolotl alone.")
    if kind and kind != "json" and files is None:
        settings["format"] = str(kind)
    for name in ("name", "revision"):
        if value := left.pop(name, None):
            settings[name] = value
    split = left.pop("split", None)
    if split and split != "train":
        settings["split"] = split
    return settings


def _rows(conversion: Conversion, left: dict[str, Any], key: str) -> dict[str, Any]:
    """Return how the rows are read."""
    type_ = left.pop("type", None)
    if key == "pretraining_dataset" or str(type_).startswith("completion"):
        column = left.pop("field", None) or left.pop("text_column", None)
        if left.get("skip"):
            conversion.differ(key, "skip: luthier begins at the first row.")
            left.pop("skip")
        mapped = {"columns": {"text": column}} if column and column != "text" else {}
        return {"type": "text"} | mapped
    if isinstance(type_, dict):
        return _described(conversion, type_, key)
    if type_ is None:
        raise UserError(
            f"{conversion.file}: {key}: a dataset without a type holds tokens already "
            "(input_ids, labels). luthier encodes the rows itself: name the rows that they were "
            "made of."
        )
    name = str(type_)
    method = conversion.draft.options["trainer"]
    if method in ("dpo", "cpo", "orpo", "reward", "kto"):
        return _preference(conversion, name, left, key)
    if method == "grpo":
        conversion.differ(
            key,
            f"type: {name} is a function of axolotl's form; luthier takes the prompt's column, or "
            "a function of yours as dataset.map.",
        )
        return {"type": "prompt"}
    family = name.split(":")[0]
    if family.split(".")[0] in ("chat_template", "sharegpt", "llama2_chat"):
        return _messages(conversion, left, key)
    if family in _INSTRUCTIONS:
        conversion.differ(key, f"type: {name}: {_OTHER_PROMPT}")
        columns = dict(_INSTRUCTIONS[family])
        kind = "alpaca" if "instruction" in columns else "prompt_completion"
        return {"type": kind, "columns": columns} if columns else {}
    raise UserError(
        f"{conversion.file}: {key}: type: {name}: luthier has no such row format. Formats: "
        "`luthier docs formats`; rows of another form become one of these with a function "
        "(dataset.map)."
    )


def _messages(conversion: Conversion, left: dict[str, Any], key: str) -> dict[str, Any]:
    """Return how conversations are read."""
    mapping = dict(left.pop("message_property_mappings", None) or {})
    if role := left.pop("message_field_role", None):
        mapping["role"] = role
    if content := left.pop("message_field_content", None):
        mapping["content"] = content
    names = (mapping.get("role", "role"), mapping.get("content", "content"))
    column = left.pop("field_messages", "messages")
    if names not in MESSAGE_FORMS:
        raise UserError(
            f"{conversion.file}: {key}: message_property_mappings: {mapping}: luthier reads "
            "messages with role and content, or from and value. A function that renames these "
            "keys can be dataset.map (`luthier docs code`)."
        )
    kind, ours = MESSAGE_FORMS[names]
    settings: dict[str, Any] = {} if column in _MESSAGE_COLUMNS else {"type": kind}
    if column not in _MESSAGE_COLUMNS:
        settings["columns"] = {ours: column}
    if (tools := left.pop("field_tools", "tools")) not in ("tools", "functions"):
        settings.setdefault("columns", {})["tools"] = tools
        settings.setdefault("type", kind)
    _roles(conversion, left.pop("roles", None) or {}, key)
    trained = left.pop("roles_to_train", None)
    roles = {ROLE_OF_SPEAKER.get(str(role).lower(), str(role)) for role in trained or ()}
    if roles - {"assistant"}:
        settings["train_on"] = sorted(roles)
    flag = left.pop("message_field_training", None)
    if flag and flag not in _TRAIN_FLAGS:
        text = f"message_field_training: {flag}: luthier reads {', '.join(_TRAIN_FLAGS[:3])}."
        conversion.differ(key, text)
    _turn_details(conversion, left, key)
    return settings


def _roles(conversion: Conversion, roles: Mapping[str, Any], key: str) -> None:
    """Say which names of roles luthier does not know by itself."""
    other = [
        f"{name} ({target})"
        for target, names in roles.items()
        for name in ([names] if isinstance(names, str) else names)
        if ROLE_OF_SPEAKER.get(str(name).lower()) not in (target, None) or (
            str(name).lower() not in ROLE_OF_SPEAKER and name != target
        )
    ]  # fmt: skip
    if other:
        conversion.differ(key, f"roles: luthier does not know {', '.join(other)}: use dataset.map.")


def _turn_details(conversion: Conversion, left: dict[str, Any], key: str) -> None:
    for name in ("train_on_eos", "train_on_eot"):
        value = left.pop(name, None)
        if value not in (None, "turn"):
            text = f"{name}: {value}: here the end of each trained turn trains, and no other."
            conversion.differ(key, text)
    if left.pop("message_field_training_detail", None):
        text = "message_field_training_detail: a message trains whole or not at all here."
        conversion.differ(key, text)
    thinking = left.pop("field_thinking", None)
    if thinking and thinking not in ("reasoning_content", "reasoning", "thinking"):
        conversion.differ(key, f"field_thinking: {thinking}: luthier reads reasoning_content.")
    left.pop("template_thinking_key", None)
    left.pop("split_thinking", None)
    if left.pop("drop_system_message", None):
        conversion.differ(key, "drop_system_message: remove it with a function (dataset.map).")
    for name in ("chat_template", "chat_template_jinja", "field_human", "field_model"):
        left.pop(name, None)


def _described(conversion: Conversion, type_: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return how rows are read whose columns and prompt the config itself describes."""
    names = {
        "field_instruction": "instruction", "field_input": "input", "field_output": "output",
        "field_prompt": "prompt", "field_completion": "completion", "field_label": "label",
        "field_chosen": "chosen", "field_rejected": "rejected", "field_system": "system",
    }  # fmt: skip
    columns = {ours: type_[name] for name, ours in names.items() if type_.get(name)}
    formats = [n for n in type_ if n.endswith("format") and type_[n]]
    if formats:
        conversion.differ(key, f"{', '.join(formats)}: {_OTHER_PROMPT}")
    settings: dict[str, Any] = {}
    method = conversion.draft.options["trainer"]
    if "chosen" in columns or method in ("dpo", "cpo", "orpo", "reward"):
        settings["type"] = "preference"
    elif method == "kto":
        settings["type"] = "unpaired"
    elif "input" in columns or "output" not in columns:
        settings["type"] = "alpaca"
        columns.setdefault("instruction", "instruction")
        columns.setdefault("output", "output")
    else:
        settings["type"] = "prompt_completion"
        columns["prompt"] = columns.pop("instruction", "instruction")
        columns["completion"] = columns.pop("output")
    mapped = {ours: name for ours, name in columns.items() if ours != name}
    if system := type_.get("system_prompt"):
        settings["system"] = system
    return settings | ({"columns": mapped} if mapped else {})


def _preference(
    conversion: Conversion, name: str, left: dict[str, Any], key: str
) -> dict[str, Any]:
    """Return how pairs, or replies with a verdict, are read."""
    family, _, variant = name.partition(".")
    kind = "unpaired" if conversion.draft.options["trainer"] == "kto" else "preference"
    columns: dict[str, str] = {}
    for field, ours in (("field_chosen", "chosen"), ("field_rejected", "rejected")):
        if (value := left.pop(field, ours)) != ours:
            columns[ours] = value
    column = left.pop("field_messages", None)
    if column and column not in ("messages", "prompt", *_MESSAGE_COLUMNS):
        columns["prompt"] = column
    if family in ("chatml", "llama3", "zephyr"):
        conversion.differ(
            key,
            f"type: {name}: axolotl writes the {family} format itself; here the model's own chat "
            "template writes the text.",
        )
        columns |= _PAIRS.get(variant, {})
    elif family not in ("chat_template", "passthrough", "user_defined", "bradley_terry"):
        raise UserError(
            f"{conversion.file}: {key}: type: {name}: luthier does not know these rows. It reads "
            "pairs of chosen and rejected replies (`luthier docs formats`)."
        )
    _turn_details(conversion, left, key)
    mapping = left.pop("message_property_mappings", None) or {}
    _roles(conversion, left.pop("roles", None) or {}, key)
    is_plain = not set(mapping.items()) - {("role", "role"), ("content", "content")}
    if not is_plain and (mapping.get("role"), mapping.get("content")) != ("from", "value"):
        conversion.differ(key, f"message_property_mappings: {mapping}: use dataset.map.")
    return {"type": kind} | ({"columns": columns} if columns else {})


def _template(conversion: Conversion, entries: list[dict[str, Any]]) -> None:
    """Take the chat template: a text or a file is carried over, a name of axolotl's is not."""
    named = [(conversion.take("chat_template"), "chat_template")]
    named += [(each.get("chat_template"), "datasets") for each in entries]
    jinja = [(conversion.take("chat_template_jinja"), "chat_template_jinja")]
    jinja += [(each.get("chat_template_jinja"), "datasets") for each in entries]
    texts = {text: key for text, key in jinja if text}
    if texts:
        text, key = next(iter(texts.items()))
        conversion.set_key("chat.template", text, key, "a template in place of the tokenizer's own")
        if len(texts) > 1:
            conversion.differ(key, "luthier uses one template for all rows: the first is taken.")
        return
    for name, key in named:
        if name in (None, "", "jinja") or str(name).startswith("tokenizer_default"):
            if name and key == "chat_template":
                conversion.leave_out_taken(key, "the tokenizer's own template is used")
            continue
        conversion.differ(
            key,
            f"chat_template: {name} is axolotl's copy; the tokenizer's own template is used. A "
            "base model without one needs chat.template=FILE.",
        )
    if variables := conversion.take("chat_template_kwargs"):
        for name, value in variables.items():
            conversion.set_key(f"chat.variables.{name}", value, "chat_template_kwargs")


def _turns(conversion: Conversion, entries: list[dict[str, Any]]) -> None:
    """Take `train_on_inputs`: the user's turns train, too."""
    if not conversion.take("train_on_inputs"):
        return
    if conversion.draft.options["trainer"] == "sft":
        about = "every turn trains, and not the replies alone"
        roles = ["system", "user", "assistant"]
        conversion.set_key("chat.train_on", roles, "train_on_inputs", about)
    else:
        conversion.leave_out_taken("train_on_inputs", "it is read in supervised fine-tuning alone")
