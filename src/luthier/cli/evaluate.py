"""`luthier evaluate`: base against tuned on held-out rows, on any dataset, on benchmarks."""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from luthier.cli.arguments import BASE, TRUST, CommandLine, Flag, ParsedArguments
from luthier.errors import UserError
from luthier.storage.atomic import write_json
from luthier.storage.write_errors import explain_write_errors
from luthier.terminal import make_console, print_json

if TYPE_CHECKING:
    from luthier.cli.model_arguments import ModelArguments
    from luthier.config.schema import RunConfig
    from luthier.evaluate.compare import Comparison
    from luthier.evaluate.models import MeasuredModel
    from luthier.evaluate.rows import EvaluationRows, EvaluationSet
    from luthier.metrics import Metric

COMMAND_LINE = CommandLine(
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
        BASE,
        TRUST,
        Flag("-o", "FILE", "write all numbers, and rows won and lost, as JSON"),
        Flag("--json", None, "print that JSON in place of tables"),
    ),
    "  luthier evaluate runs/quickstart/default\n"
    "  luthier evaluate runs/quickstart/default dataset.path=mine.jsonl metrics=[token_f1]\n"
    "  luthier evaluate runs/qlora_llama/default --benchmarks ifeval --limit 100 -o ifeval.json\n",
)
LEVEL = 0.95


def run(arguments: list[str]) -> int:
    """Evaluate; returns 0."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    from luthier.cli.model_arguments import parse_model_arguments

    # `metrics=` is taken out first: to the other settings it would be a field of GenerationConfig.
    metric_settings = [word for word in parsed.overrides[1:] if word.startswith("metrics=")]
    typed = parse_model_arguments(
        "evaluate", [w for w in parsed.overrides if w not in metric_settings], ("MODEL",)
    )
    metrics = _metrics_typed(metric_settings)
    if "--alone" in parsed.switches:
        parsed.refuse_flags(["--against"], "--alone compares with nothing. Leave one of them out.")
    if "--benchmarks" not in parsed.texts:
        parsed.refuse_flags(["--tasks"], "these are tasks for --benchmarks. Name them there, too.")
    # The file is checked before the models run: hours of work must not end in a wrong path.
    out = _writable(parsed.texts.get("-o"))
    if "--benchmarks" in parsed.texts:
        from luthier.evaluate.benchmarks import check_installed

        check_installed()
    from luthier.evaluate.models import find_models
    from luthier.model.adapters import HEAD_TASKS

    texts = parsed.texts
    alone = "--alone" in parsed.switches
    # Rows and metrics that are typed are taken in place of the run's.
    replaced = [
        *(["dataset"] if typed.dataset else []),
        *(["trainer.evaluation"] if metrics is not None else []),
    ]
    trust = typed.trust(parsed.switches, replaced)
    model, other = find_models(
        typed.places[0], texts.get("--base"), texts.get("--against"), alone, typed.llm(), trust
    )
    # Known from the files alone, so a wrong flag is reported before any weights are loaded.
    if model.artifact.task in HEAD_TASKS:
        _check_decider(typed, parsed, metrics)
    from luthier.environment import quiet_libraries

    quiet_libraries()
    report = _evaluated(model, other, typed, parsed, metrics)
    if out is not None:
        with explain_write_errors(out, "-o"):
            write_json(out, report)
        print(f"written {out}", file=sys.stderr)
    if "--json" in parsed.switches:
        print_json(report)
    return 0


def _metrics_typed(metric_settings: list[str]) -> "list[Metric] | None":
    """Return the metrics of `metrics=[...]`; None where nothing is typed."""
    if not metric_settings:
        return None
    import yaml

    from luthier.metrics import parse_metrics

    try:
        # As in a config: the last of several wins, and an empty value is an empty list.
        return parse_metrics(yaml.safe_load(metric_settings[-1].partition("=")[2]) or [], "metrics")
    except yaml.YAMLError as error:
        raise UserError(f"{metric_settings[-1]}: the value cannot be read: {error}") from error


def _writable(name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"-o {name}: cannot be written: name a file in a folder that is there.")
    with explain_write_errors(path, "-o"), TemporaryFile(dir=path.parent):
        pass
    return path


def _check_decider(
    typed: "ModelArguments", parsed: ParsedArguments, metrics: "list[Metric] | None"
) -> None:
    """Raise UserError for settings that only a model that writes can follow."""
    refused = [*typed.generation, *(["metrics"] if metrics is not None else [])]
    refused += [
        flag for flag in ("--benchmarks", "--batch") if flag in parsed.texts | parsed.numbers
    ]
    if refused:
        raise UserError(
            f"{refused[0]} is for models that write. A classifier, a tagger or a reward model is "
            "measured by what it decides of each row; `luthier docs evaluate` has the numbers."
        )


def _evaluated(
    model: "MeasuredModel",
    other: "MeasuredModel | None",
    typed: "ModelArguments",
    parsed: ParsedArguments,
    metrics: "list[Metric] | None",
) -> dict[str, Any]:
    """Measure the model, then what it is compared with, and return the report for JSON."""
    from luthier.evaluate.models import WritingModel, check_comparable

    console = make_console(quiet="--json" in parsed.switches)
    settings = dict(typed.generation)
    with model:
        config = model.artifact.config
        # Benchmarks bring their own rows: the run's are measured beside them only when named.
        only_benchmarks = "--benchmarks" in parsed.texts and not typed.dataset
        sets = [] if only_benchmarks else _sets(model, typed, parsed, metrics, config)
        generation = _settings(model, settings, parsed)
        tuned = [model.measure(each, generation) for each in sets]
        benchmarks = {"tuned": _benchmarks(model, parsed)}
        bases = []
        if isinstance(model, WritingModel) and other is model:
            # The adapter's base is in memory already, so the two are measured with the same
            # weights.
            with model.as_base():
                bases = [model.measure(each, generation) for each in sets]
                benchmarks["base"] = _benchmarks(model, parsed)
        alphabet = model.alphabet
    # One model after the other: the first block has ended, so only one is in memory at a time.
    if other is not None and other is not model:
        with other:
            # The rows are encoded anew: the other model may have its own template and tokenizer.
            theirs = _sets(other, typed, parsed, metrics, model.artifact.config) if sets else []
            bases = [other.measure(each, generation) for each in theirs]
            benchmarks["base"] = _benchmarks(other, parsed)
            check_comparable(other, alphabet, sets, theirs)
    from luthier.evaluate.compare import compare_outcomes, print_comparison

    results, against = [], "other" if "--against" in parsed.texts else "base"
    for number, each in enumerate(sets):
        base = bases[number] if bases else None
        results.append(compare_outcomes(each.items, base, tuned[number], each.better, LEVEL))
        print_comparison(results[-1], console, against)
    report = _plain(model, other, results, generation)
    if parsed.texts.get("--benchmarks"):
        from luthier.evaluate.benchmarks import compare_benchmarks, print_benchmarks

        report["benchmarks"] = compare_benchmarks(benchmarks, LEVEL)
        print_benchmarks(report["benchmarks"], console)
    return report


def _settings(
    model: "MeasuredModel", settings: dict[str, Any], flags: ParsedArguments
) -> dict[str, Any]:
    """Return the settings of generation: the run's own, unless something else is typed."""
    config = model.artifact.config
    if config is not None:
        # As in the run's own evaluations, so that the numbers can be compared with its log.
        settings.setdefault("max_new_tokens", config.trainer.evaluation.max_new_tokens)
    return settings | (
        {"batch_size": flags.numbers["--batch"]} if "--batch" in flags.numbers else {}
    )


def _sets(
    model: "MeasuredModel",
    typed: "ModelArguments",
    parsed: ParsedArguments,
    metrics: "list[Metric] | None",
    config: "RunConfig | None",
) -> "list[EvaluationSet]":
    """Return the sets to measure on with their metrics; `config` is the config of their run."""
    evaluation_sets = []
    for items in _items(model, typed, parsed, config):
        if not items.rows:
            left = ", ".join(f"{count:,} {why}" for why, count in items.left_out.items())
            raise UserError(
                f"{items.name}: there is no row to measure on" + (f" ({left})." if left else ".")
            )
        evaluation_sets.append(model.set_of(items, metrics, config))
    return evaluation_sets


def _items(
    model: "MeasuredModel",
    typed: "ModelArguments",
    parsed: ParsedArguments,
    config: "RunConfig | None",
) -> "Iterator[EvaluationRows]":
    from luthier.cli.model_arguments import make_dataset_config
    from luthier.evaluate.rows import read_dataset_rows, read_run_rows
    from luthier.model.tokenizer import load_tokenizer

    limit = parsed.numbers.get("--limit")
    if typed.dataset:
        return read_dataset_rows(make_dataset_config(typed.dataset), model.maker(config), limit)
    if config is None:
        raise UserError(
            f"{model.artifact.name} is no run, so no rows were held out. Name rows to measure on: "
            "dataset.path=FILE."
        )
    return read_run_rows(config, model.maker(config), limit, lambda: load_tokenizer(config.model))


def _benchmarks(model: "MeasuredModel", parsed: ParsedArguments) -> dict[str, Any]:
    tasks = parsed.texts.get("--benchmarks")
    if tasks is None:
        return {}
    from luthier.evaluate.benchmarks import run_benchmarks
    from luthier.evaluate.models import WritingModel

    assert isinstance(model, WritingModel)  # others were refused
    limit, batch = parsed.numbers.get("--limit"), parsed.numbers.get("--batch")
    return run_benchmarks(model, tasks.split(","), parsed.texts.get("--tasks"), limit, batch)


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
