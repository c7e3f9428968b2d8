"""`luthier evaluate`: base against tuned on held-out rows, on any dataset, on benchmarks."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.inspect.arguments import Flag, Given, Grammar

if TYPE_CHECKING:
    from luthier.config.schema import RunConfig
    from luthier.evaluate.compare import Result
    from luthier.evaluate.items import Items
    from luthier.evaluate.measure import Outcome
    from luthier.infer.llm import LLM
    from luthier.infer.words import Words
    from luthier.metrics import Metric

GRAMMAR = Grammar(
    "evaluate",
    "luthier evaluate MODEL [metrics=[...]] [dataset.KEY=VALUE ...] [key=value ...] [flags]\n\n"
    "Measures a run, a checkpoint, an adapter or a model beside its base: perplexity over the\n"
    "trained tokens and the metrics of its replies, each with its 95 % interval, and the\n"
    "difference on the same rows (paired bootstrap); rows won and lost are shown. Without\n"
    "dataset.* the rows are those that the run held out, and the metrics are the run's own.\n\n"
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
    from luthier.infer.words import sort

    own = [word for word in given.overrides[1:] if word.startswith("metrics=")]
    typed = sort("evaluate", [w for w in given.overrides if w not in own], ("MODEL",))
    metrics = _metrics_typed(own)
    out = _writable(given.texts.get("-o"))
    if "--benchmarks" in given.texts:
        from luthier.evaluate.harness import check_installed

        check_installed()
    llm, other = _models(typed, given)
    from luthier.infer.quiet import quiet

    quiet()
    found = _evaluated(llm, other, typed, given, metrics)
    if out is not None:
        from luthier.record.files import write_json

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


def _models(typed: "Words", given: Given) -> "tuple[LLM, LLM | None]":
    """The model, and what it is compared with: itself for an adapter's base, None for nothing."""
    from luthier.infer.llm import LLM

    llm = LLM(typed.places[0], base=given.texts.get("--base"), **typed.llm())
    artefact = llm.artefact
    if artefact.task == "SEQ_2_SEQ_LM":
        raise UserError(
            f"{artefact.word}: luthier evaluate measures models that write on, not encoder-decoder "
            "models; the results of the run are in its run.json."
        )
    against = given.texts.get("--against")
    if "--alone" in given.switches:
        return llm, None
    if against is not None:
        return llm, LLM(against, **typed.llm())
    if llm.has_adapter:
        return llm, llm
    if artefact.config is None:
        return llm, None
    base = LLM(artefact.config.model.path, **typed.llm())
    # The base is asked in the words of the training: its own template may be another one.
    tokenizer = {"tokenizer": artefact.base.tokenizer}
    base.artefact = replace(
        base.artefact, chat=artefact.chat, base=artefact.config.model.model_copy(update=tokenizer)
    )
    return llm, base


def _evaluated(
    llm: "LLM", other: "LLM | None", typed: "Words", given: Given, metrics: "list[Metric] | None"
) -> dict[str, Any]:
    """Measure the one, then the other, and put the numbers together."""
    from rich.console import Console

    console = Console(quiet="--json" in given.switches, highlight=False)
    settings = dict(typed.generation)
    with llm:
        config = llm.artefact.config
        sets = [] if _only_benchmarks(typed, given) else _sets(llm, typed, given, metrics, config)
        asked = _settings(llm, settings, given)
        tuned = [_measure(llm, items, own, asked) for items, own in sets]
        benchmarks = {"tuned": _benchmarks(llm, given)}
        bases = []
        if other is llm:
            with llm.as_base():
                bases = [_measure(llm, items, own, asked) for items, own in sets]
                benchmarks["base"] = _benchmarks(llm, given)
        vocabulary = llm.tokenizer.get_vocab()
    if other is not None and other is not llm:
        with other:
            # In its own words, should it have others: a run is asked as it was trained.
            theirs = _sets(other, typed, given, metrics, llm.artefact.config) if sets else []
            bases = [_measure(other, items, own, asked) for items, own in theirs]
            benchmarks["base"] = _benchmarks(other, given)
            _check_alike(other, sets, theirs, vocabulary)
    from luthier.evaluate.compare import result
    from luthier.evaluate.report import show

    results = []
    for number, (items, own) in enumerate(sets):
        base = bases[number] if bases else None
        results.append(result(items, base, tuned[number], own, LEVEL))
        show(results[-1], console)
    found = _plain(llm, other, results, asked)
    if given.texts.get("--benchmarks"):
        from luthier.evaluate.harness import compared, show_tasks

        found["benchmarks"] = compared(benchmarks, LEVEL)
        show_tasks(found["benchmarks"], console)
    return found


def _check_alike(other: "LLM", sets: list[Any], theirs: list[Any], vocabulary: Any) -> None:
    """Raise UserError where numbers of the two models cannot be put beside each other."""
    if other.tokenizer.get_vocab() != vocabulary:
        raise UserError(
            f"{other.artefact.word} reads other tokens, so loss and perplexity say nothing beside "
            "each other. Measure each with --alone."
        )
    for (mine, _), (its, _) in zip(sets, theirs, strict=True):
        if [item.where for item in mine.rows] != [item.where for item in its.rows]:
            raise UserError(
                f"{mine.name}: {len(mine.rows):,} rows make tokens for the one model and "
                f"{len(its.rows):,} for the other. Measure each with --alone."
            )


def _only_benchmarks(typed: "Words", given: Given) -> bool:
    return "--benchmarks" in given.texts and not typed.dataset


def _measure(
    llm: "LLM", items: "Items", metrics: "list[Metric]", settings: dict[str, Any]
) -> "Outcome":
    from luthier.evaluate.measure import measure

    return measure(llm, items, metrics, settings)


def _settings(llm: "LLM", given: dict[str, Any], flags: Given) -> dict[str, Any]:
    """How replies are generated: as the run did, unless something else is said."""
    config = llm.artefact.config
    if config is not None:
        given.setdefault("max_new_tokens", config.trainer.evaluation.max_new_tokens)
    return given | ({"batch_size": flags.numbers["--batch"]} if "--batch" in flags.numbers else {})


def _sets(
    llm: "LLM",
    typed: "Words",
    given: Given,
    metrics: "list[Metric] | None",
    config: "RunConfig | None",
) -> "list[tuple[Items, list[Metric]]]":
    """The rows to measure on, each set with its metrics; what these need is imported.

    `config`: that of the run whose rows they are.
    """
    from luthier.metrics import prepare_metrics

    found = []
    for items in _items(llm, typed, given, config):
        own = _metrics_of(config, items.name) if metrics is None else metrics
        if not items.rows:
            raise UserError(f"{items.name}: there is no row to measure on.")
        questions = [item.question for item in items.rows if item.question is not None]
        if own and questions:
            prepare_metrics(own, [question.expected for question in questions])
        found.append((items, own if questions else []))
    return found


def _items(
    llm: "LLM", typed: "Words", given: Given, config: "RunConfig | None"
) -> "Iterator[Items]":
    from luthier.evaluate.items import Maker, of_dataset, of_run
    from luthier.infer.words import dataset_of
    from luthier.model.tokenizer import load_tokenizer

    limit = given.numbers.get("--limit")
    chat = llm.encoder.settings() if llm.has_template else None
    maker = Maker(llm.tokenizer, chat, config.dataset.stride if config else 0, llm.context)
    if typed.dataset:
        return of_dataset(dataset_of(typed.dataset), maker, limit)
    if config is None:
        raise UserError(
            f"{llm.artefact.word} is no run, so no rows were held out. Name rows to measure on: "
            "dataset.path=FILE."
        )
    return of_run(config, maker, limit, lambda: load_tokenizer(config.model))


def _metrics_of(config: "RunConfig | None", name: str) -> "list[Metric]":
    """The run's own metrics of an evaluation set; none for a model that is no run's."""
    from luthier.metrics import parse_metrics

    if config is None:
        return []
    evaluation = config.trainer.evaluation
    return parse_metrics(evaluation.sets.get(name, evaluation.metrics))


def _benchmarks(llm: "LLM", given: Given) -> dict[str, Any]:
    tasks = given.texts.get("--benchmarks")
    if tasks is None:
        return {}
    from luthier.evaluate.harness import run_tasks

    limit, batch = given.numbers.get("--limit"), given.numbers.get("--batch")
    return run_tasks(llm, tasks.split(","), given.texts.get("--tasks"), limit, batch)


def _plain(
    llm: "LLM", other: "LLM | None", results: "list[Result]", settings: dict[str, Any]
) -> dict[str, Any]:
    from luthier.record.facts import versions

    return {
        "model": llm.artefact.word,
        "against": None if other is None else other.artefact.base.path,
        "level": LEVEL,
        "settings": settings,
        "sets": [each.plain() for each in results],
        "versions": versions(),
    }
