"""Run benchmarks of lm-evaluation-harness with a model that luthier loaded."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.metrics.bootstrap import bootstrap_interval, compare_paired

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.infer.llm import LLM

_BATCH = 8


def check_installed() -> None:
    """Raise UserError where the harness is missing; imports nothing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--benchmarks: lm-evaluation-harness is not installed:\n    pip install 'luthier[eval]'"
        )


def run_benchmarks(
    llm: "LLM", tasks: Sequence[str], folder: str | None, limit: int | None, batch: int | None
) -> dict[str, Any]:
    """Run tasks with the model as it answers now.

    Returns `results`, by task and metric, and `rows`, the scores of single documents in the
    harness's order. A model with a chat template is asked through it. Raises UserError for a task
    that does not exist and for data that cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=_folder(folder))
    task_names = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in task_names]
    if unknown:
        raise UserError(f"--benchmarks: {_no_task(unknown[0], sorted(task_names))}")
    # HFLM gets the loaded model and not its name: it is placed and packed already, and may have
    # its adapter off. The context is set, because the harness (0.4.13) guesses it from the config.
    model = HFLM(
        pretrained=llm.model, tokenizer=llm.tokenizer, backend="causal",
        batch_size=batch or _BATCH, max_length=llm.context,
    )  # fmt: skip
    try:
        # bootstrap_iters=0: intervals are drawn here from single documents, paired over two models,
        # which the harness does not do.
        harness_results: Any = lm_eval.simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=True,
            apply_chat_template=llm.has_template, bootstrap_iters=0,
        )  # fmt: skip
    # Tasks download their data when they are built; without a network that fails in many ways.
    except (OSError, ConnectionError, FileNotFoundError) as error:
        raise UserError(f"--benchmarks: the data of a task cannot be had: {error}") from error
    rows = {name: _rows(samples) for name, samples in harness_results["samples"].items()}
    results = {name: _numbers(each) for name, each in harness_results["results"].items()}
    return {"results": results, "rows": rows}


def compare_benchmarks(benchmarks: Mapping[str, Any], level: float) -> dict[str, Any]:
    """Return each task's numbers with intervals over its documents, and paired differences."""
    tuned, base = benchmarks["tuned"], benchmarks.get("base")
    comparison: dict[str, Any] = {}
    for task, numbers in tuned["results"].items():
        for name, value in numbers.items():
            rows = tuned["rows"].get(task, {}).get(name)
            others = base and base["rows"].get(task, {}).get(name)
            label = f"{task}/{name}"
            # Group scores and corpus metrics have no value for each document: they get no interval.
            if rows is None:
                comparison[label] = {"tuned": {"value": value}}
                if base:
                    comparison[label]["base"] = {"value": base["results"][task][name]}
            elif others is None:
                comparison[label] = {"tuned": asdict(bootstrap_interval(rows, level))}
            else:
                pair = compare_paired(others, rows, level)
                comparison[label] = {
                    "base": asdict(pair.first), "tuned": asdict(pair.second),
                    "difference": asdict(pair.difference),
                    "higher": pair.higher, "lower": pair.lower,
                }  # fmt: skip
    return comparison


def print_benchmarks(results: Mapping[str, Any], console: "Console") -> None:
    """Print the numbers of the benchmarks."""
    from rich.text import Text

    from luthier.evaluate.compare import comparison_values
    from luthier.terminal import print_table

    console.print(Text("\nbenchmarks", style="bold"))
    print_table(console, comparison_values(dict(results)))


def _folder(folder: str | None) -> str | None:
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--tasks {folder}: there is no such folder.")
    return folder


def _no_task(name: str, task_names: Sequence[str]) -> str:
    from luthier.errors import nearest_option

    near = nearest_option(name, task_names)
    guess = f" Did you mean {near}?" if near else ""
    return f"lm-evaluation-harness has no task {name!r}.{guess} `lm-eval ls tasks` lists them."


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a task, without standard errors and what is no number."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }


def _rows(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the documents' scores by metric, in order, for metrics with a number for each."""
    ordered = sorted(samples, key=lambda sample: (str(sample.get("filter")), sample["doc_id"]))
    filters = {str(sample.get("filter")) for sample in ordered}
    scores_by_metric: dict[str, list[float]] = {}
    for sample in ordered:
        for name in sample.get("metrics", ()):
            value = sample.get(name)
            if isinstance(value, int | float):
                # Under the name that it has in the harness's results, where `,none` was removed.
                suffix = "" if sample.get("filter") == "none" else f",{sample.get('filter')}"
                scores_by_metric.setdefault(f"{name}{suffix}", []).append(float(value))
    # Each filter scores every document once; a metric that misses some cannot be paired.
    count = len(ordered) // max(len(filters), 1)
    return {name: scores for name, scores in scores_by_metric.items() if len(scores) == count}
