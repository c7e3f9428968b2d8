"""`luthier evaluate`: base against tuned on held-out rows, on any dataset, on benchmarks."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.arguments import CommandLine, Flag, ParsedArguments
from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.cli.model_arguments import ModelArguments
    from luthier.config.schema import RunConfig
    from luthier.evaluate.compare import Comparison
    from luthier.evaluate.models import MeasuredModel
    from luthier.evaluate.rows import EvaluationRows, EvaluationSet
    from luthier.metrics import Metric

GRAMMAR = CommandLine(
    "evaluate",
    "luthier evaluate MODEL [metrics=[...]] [dataset.KEY=VALUE ...] [key=value ...] [flags]\n\n"
    "Measures a run, a checkpoint, an adapter or a model beside its base: perplexity over the\n"
    "trained tokens and the metrics of its replies, each with its 95 % interval, and the\n"
    "difference on the same rows (paired bootstrap); rows won and lost are shown. Without\n"
    "dataset.* the rows are those that the run held out, and the metrics are the run's own.\n"
    "Classifiers, taggers and reward models are measured by what they decide of each row.\n\n"
    "Settings: metrics=[exact_match, json_f1]; dataset.path=FILE and the other settings of a\n"
    "dataset; any field of GenerationConfig; model.device, .dtype, .attention and .device_map;\n"
    "quantization=none, nf4 or int8.",
    (
        Flag("--against", "MODEL", "compare with this model in place of the base"),
        Flag("--alone", None, "measure the model by itself"),
        Flag("--benchmarks", "TASKS", "tasks of lm-evaluation-harness, such as gsm8k,ifeval"),
        Flag("--tasks", "FOLDER", "where tasks of your own are, for --benchmarks"),
        Flag("--limit", "N", "only the first N rows of each set, or of each task"),
        Flag("--batch", "N", "prompts answered at once; else as many as the memory holds"),
        Flag("--base", "MODEL", "the base of an adapter, where it is no longer where it was"),
        Flag("-o", "FILE", "write all numbers, and rows won and lost, as JSON"),
        Flag("--json", None, "print that JSON in place of tables"),
    ),
    "  luthier evaluate runs/quickstart/default\n"
    "  luthier evaluate runs/quickstart/default dataset.path=mine.jsonl metrics=[token_f1]\n"
    "  luthier evaluate runs/qlora_llama/default --benchmarks ifeval --limit 100 -o ifeval.json\n",
)
LEVEL = 0.95


def run(words: list[str]) -> int:
    """Evaluate; returns 0."""
    if GRAMMAR.asks_help(words):
        return 0
    given = GRAMMAR.parse(words)
    from luthier.cli.model_arguments import parse_model_arguments

    own = [word for word in given.overrides[1:] if word.startswith("metrics=")]
    typed = parse_model_arguments(
        "evaluate", [w for w in given.overrides if w not in own], ("MODEL",)
    )
    metrics = _metrics_typed(own)
    out = _writable(given.texts.get("-o"))
    if "--benchmarks" in given.texts:
        from luthier.evaluate.benchmarks import check_installed

        check_installed()
    from luthier.evaluate.models import find_models
    from luthier.model.adapters import HEAD_TASKS

    texts = given.texts
    alone = "--alone" in given.switches
    model, other = find_models(
        typed.places[0], texts.get("--base"), texts.get("--against"), alone, typed.llm()
    )
    if model.artifact.task in HEAD_TASKS:
        _check_decider(typed, given, metrics)
    from luthier.environment import quiet_libraries

    quiet_libraries()
    found = _evaluated(model, other, typed, given, metrics)
    if out is not None:
        from luthier.storage.atomic import write_json

        write_json(out, found)
        print(f"written {out}", file=sys.stderr)
    if "--json" in given.switches:
        print(json.dumps(found, ensure_ascii=False))
    return 0


def _metrics_typed(words: list[str]) -> "list[Metric] | None":
    """The metrics of `metrics=[...]`; None where nothing is typed."""
    if not words:
        return None
    import yaml

    from luthier.metrics import parse_metrics

    try:
        return parse_metrics(yaml.safe_load(words[-1].partition("=")[2]) or [], "metrics")
    except yaml.YAMLError as error:
        raise UserError(f"{words[-1]}: the value cannot be read: {error}") from error


def _writable(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"-o {name}: cannot be written: name a file in a folder that is there.")
    return path


def _check_decider(
    typed: "ModelArguments", given: ParsedArguments, metrics: "list[Metric] | None"
) -> None:
    """UserError for words that only a model that writes can follow."""
    said = [*typed.generation, *(["metrics"] if metrics is not None else [])]
    said += [flag for flag in ("--benchmarks", "--batch") if flag in given.texts | given.numbers]
    if said:
        raise UserError(
            f"{said[0]} is for models that write. A classifier, a tagger or a reward model is "
            "measured by what it decides of each row; docs/evaluate.md has the numbers."
        )


def _evaluated(
    model: "MeasuredModel",
    other: "MeasuredModel | None",
    typed: "ModelArguments",
    given: ParsedArguments,
    metrics: "list[Metric] | None",
) -> dict[str, Any]:
    """Measure the one, then the other, and put the numbers together."""
    from rich.console import Console

    from luthier.evaluate.models import WritingModel, check_comparable

    console = Console(quiet="--json" in given.switches, highlight=False)
    settings = dict(typed.generation)
    with model:
        config = model.artifact.config
        sets = [] if _only_benchmarks(typed, given) else _sets(model, typed, given, metrics, config)
        asked = _settings(model, settings, given)
        tuned = [model.measure(each, asked) for each in sets]
        benchmarks = {"tuned": _benchmarks(model, given)}
        bases = []
        if isinstance(model, WritingModel) and other is model:
            with model.as_base():
                bases = [model.measure(each, asked) for each in sets]
                benchmarks["base"] = _benchmarks(model, given)
        alphabet = model.alphabet
    if other is not None and other is not model:
        with other:
            # In its own words, should it have others: a run is asked as it was trained.
            theirs = _sets(other, typed, given, metrics, model.artifact.config) if sets else []
            bases = [other.measure(each, asked) for each in theirs]
            benchmarks["base"] = _benchmarks(other, given)
            check_comparable(other, alphabet, sets, theirs)
    from luthier.evaluate.compare import compare_outcomes, print_comparison

    results, against = [], "other" if "--against" in given.texts else "base"
    for number, each in enumerate(sets):
        base = bases[number] if bases else None
        results.append(compare_outcomes(each.items, base, tuned[number], each.better, LEVEL))
        print_comparison(results[-1], console, against)
    found = _plain(model, other, results, asked)
    if given.texts.get("--benchmarks"):
        from luthier.evaluate.benchmarks import compare_benchmarks, print_benchmarks

        found["benchmarks"] = compare_benchmarks(benchmarks, LEVEL)
        print_benchmarks(found["benchmarks"], console)
    return found


def _only_benchmarks(typed: "ModelArguments", given: ParsedArguments) -> bool:
    return "--benchmarks" in given.texts and not typed.dataset


def _settings(
    model: "MeasuredModel", given: dict[str, Any], flags: ParsedArguments
) -> dict[str, Any]:
    """How replies are generated: as the run did, unless something else is said."""
    config = model.artifact.config
    if config is not None:
        given.setdefault("max_new_tokens", config.trainer.evaluation.max_new_tokens)
    return given | ({"batch_size": flags.numbers["--batch"]} if "--batch" in flags.numbers else {})


def _sets(
    model: "MeasuredModel",
    typed: "ModelArguments",
    given: ParsedArguments,
    metrics: "list[Metric] | None",
    config: "RunConfig | None",
) -> "list[EvaluationSet]":
    """The rows to measure on, each set with its metrics; `config`: that of the run they are of."""
    found = []
    for items in _items(model, typed, given, config):
        if not items.rows:
            left = ", ".join(f"{count:,} {why}" for why, count in items.left_out.items())
            raise UserError(
                f"{items.name}: there is no row to measure on" + (f" ({left})." if left else ".")
            )
        found.append(model.set_of(items, metrics, config))
    return found


def _items(
    model: "MeasuredModel",
    typed: "ModelArguments",
    given: ParsedArguments,
    config: "RunConfig | None",
) -> "Iterator[EvaluationRows]":
    from luthier.cli.model_arguments import make_dataset_config
    from luthier.evaluate.rows import read_dataset_rows, read_run_rows
    from luthier.model.tokenizer import load_tokenizer

    limit = given.numbers.get("--limit")
    if typed.dataset:
        return read_dataset_rows(make_dataset_config(typed.dataset), model.maker(config), limit)
    if config is None:
        raise UserError(
            f"{model.artifact.name} is no run, so no rows were held out. Name rows to measure on: "
            "dataset.path=FILE."
        )
    return read_run_rows(config, model.maker(config), limit, lambda: load_tokenizer(config.model))


def _benchmarks(model: "MeasuredModel", given: ParsedArguments) -> dict[str, Any]:
    tasks = given.texts.get("--benchmarks")
    if tasks is None:
        return {}
    from luthier.evaluate.benchmarks import run_benchmarks
    from luthier.evaluate.models import WritingModel

    assert isinstance(model, WritingModel)  # others were refused
    limit, batch = given.numbers.get("--limit"), given.numbers.get("--batch")
    return run_benchmarks(model, tasks.split(","), given.texts.get("--tasks"), limit, batch)


def _plain(
    model: "MeasuredModel",
    other: "MeasuredModel | None",
    results: "list[Comparison]",
    settings: dict[str, Any],
) -> dict[str, Any]:
    from luthier.record.machine_info import package_versions

    against = None if other is None else other.artifact.name
    return {
        "model": model.artifact.name,
        "against": model.artifact.base.path if other is model else against,
        "level": LEVEL,
        "settings": settings,
        "sets": [each.plain() for each in results],
        "versions": package_versions(),
    }
