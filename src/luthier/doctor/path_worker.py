"""A process that trains paths one after the other and writes a line of JSON for each.

Started by `luthier.doctor.path_tests`, so that a path that crashes, hangs or spoils a GPU takes
nothing else with it. Its only argument is a file of `WorkerJob`.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from luthier.doctor.tiny_model import write_tiny_model
from luthier.errors import UserError, explain_memory_shortage
from luthier.redaction import redact_message
from luthier.storage.typed_files import load_json

if TYPE_CHECKING:
    from luthier.train.loop import TrainingSession

WEIGHTS_FILE, GRADIENTS_FILE, LOSSES_FILE = "{}.weights", "{}.gradients", "{}.losses"
"""Names of files of a reference: the weights that train as they are at first, the gradients of the
first step, and the losses."""


class PathJob(TypedDict):
    """One path for the worker."""

    name: str
    overrides: list[str]
    reference: str
    """The name of the reference whose files it is compared with."""
    is_reference: bool
    """Whether it makes these files, by plain arithmetic."""


class WorkerJob(TypedDict):
    """What a worker has to do."""

    folder: str
    """Where the references lie."""
    results: str
    """The file that lines are appended to: `{"begins": NAME}` and then the result of each."""
    paths: list[PathJob]


def main(file: Path) -> None:
    """Train every path of a job; what one raises is its result."""
    job: WorkerJob = load_json(file, WorkerJob) or WorkerJob(folder="", results="", paths=[])
    results, folder = Path(job["results"]), Path(job["folder"])
    if not (folder / "rows.jsonl").exists():
        write_tiny_model(folder)
    for path in job["paths"]:
        _append(results, {"begins": path["name"]})
        result: dict[str, Any] = {"name": path["name"]}
        try:
            result |= run_path(path, folder)
        except Exception as error:
            result["problem"] = describe_error(error)
        _append(results, result)


def _append(file: Path, line: dict[str, Any]) -> None:
    """Append a line on the first process; the others have none to write."""
    if os.environ.get("RANK", "0") == "0":
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def describe_error(error: Exception) -> str:
    """Return what an error means, in a line."""
    mistake = error if isinstance(error, UserError) else explain_memory_shortage(error)
    if mistake is not None:
        return redact_message(" ".join(str(mistake).split()))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact_message(f"{type(error).__name__}: {lines[0] if lines else 'no more is said'}")


def run_path(path: PathJob, folder: Path) -> dict[str, Any]:
    """Train one path and return its numbers, all as shares or in plain units."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from luthier.config import load_config
    from luthier.environment import set_environment
    from luthier.model.device import choose_machine
    from luthier.record.record import RunRecord
    from luthier.train.build import build_session, seed_everything

    # accelerate's state is one for a process, and of the path before.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.compiler.reset()
    config = load_config(path["overrides"]).config
    set_environment(config)
    seed_everything(config)
    machine = choose_machine(config.model)
    state = PartialState(cpu=machine.device_type == "cpu")
    is_cuda = machine.device_type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as run:
        record = RunRecord(Path(run))
        session = build_session(config, Path(run), record, state.is_main_process, machine)
        if path["is_reference"]:
            return _train_reference(session, folder, path["reference"])
        result = _train(session, folder, path["reference"])
    if is_cuda and state.num_processes == 1:
        result |= _compare_memory(config, torch.cuda.max_memory_allocated())
    return result


def _train(session: "TrainingSession", folder: Path, reference: str) -> dict[str, Any]:
    """Train a session as a run does, and compare it with the reference."""
    from safetensors.torch import load_file

    from luthier.doctor.step_watcher import StepWatcher
    from luthier.train.launch.checks import check_running_launch

    trainer = session.trainer
    _set_trained_weights(trainer.model, load_file(folder / WEIGHTS_FILE.format(reference)))
    watcher = StepWatcher(trainer)
    trainer.add_callback(watcher)
    trainer.train()
    launch = check_running_launch(trainer.accelerator, trainer.args)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    expected = load_json(folder / LOSSES_FILE.format(reference), list[float]) or []
    gradients = load_file(folder / GRADIENTS_FILE.format(reference))
    result = {
        "losses": losses,
        "loss_difference": _loss_difference(losses, expected),
        "gradient_difference": _gradient_difference(watcher.gradients, gradients),
        "processes": launch["processes"],
        "sharding": launch["sharding"],
        "tokens_per_second": _count_tokens(trainer) / watcher.seconds_per_step,
    }
    trainer.end()
    return result


def _count_tokens(trainer: Any) -> int:
    """Return the tokens of a step, which are those of all rows."""
    return int(trainer.train_dataset.lengths.sum())


def _loss_difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest difference of a step's loss, as a share of what it should be."""
    if len(losses) != len(expected):
        raise UserError(f"{len(losses)} steps were logged, and {len(expected)} were to be taken.")
    pairs = zip(losses, expected, strict=True)
    return max(abs(loss - other) / abs(other) for loss, other in pairs)


def _gradient_difference(gradients: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the length of the difference of two gradients, as a share of what it should be."""
    if gradients.keys() != expected.keys():
        names = sorted(gradients.keys() ^ expected.keys())
        raise UserError(f"{len(names)} weights train here or there alone, such as {names[0]}.")
    difference = sum(float((gradients[n] - expected[n]).square().sum()) for n in expected)
    length = sum(float(expected[name].square().sum()) for name in expected)
    return float((difference / length) ** 0.5)


def _trained(model: Any) -> dict[str, Any]:
    """Return the weights that train, by their plain names."""
    from luthier.doctor.step_watcher import plain_name

    return {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def _set_trained_weights(model: Any, values: dict[str, Any]) -> None:
    """Give the weights that train the values of the reference; adapters are drawn by device."""
    for name, parameter in _trained(model).items():
        if name in values:
            parameter.data.copy_(values[name])


def _train_reference(session: "TrainingSession", folder: Path, reference: str) -> dict[str, Any]:
    """Train by plain arithmetic, row by row, and write what every path is compared with."""
    import torch
    from safetensors.torch import save_file

    trainer = session.trainer
    model, rows = trainer.model.train(), trainer.train_dataset
    weights = _trained(model)
    if reference == "lora":
        # At first B is zero, and A would have no gradient at all.
        for name, parameter in weights.items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    copies = {name: parameter.detach().clone() for name, parameter in weights.items()}
    save_file(copies, folder / WEIGHTS_FILE.format(reference))
    args = trainer.args
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    documents = [_read_row(rows, number) for number in range(len(rows))]
    trained_tokens = sum(int((labels[1:] != -100).sum()) for _, labels in documents)
    losses, seconds = [], 0.0
    for step in range(args.max_steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        total = 0.0
        for ids, labels in documents:
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            loss = loss / trained_tokens
            loss.backward()
            total += float(loss)
        if step == 0:
            gradients = {n: p.grad.detach().clone() for n, p in weights.items()}
            save_file(gradients, folder / GRADIENTS_FILE.format(reference))
        optimizer.step()
        losses.append(total)
        seconds = time.perf_counter() - began
    (folder / LOSSES_FILE.format(reference)).write_text(json.dumps(losses), encoding="utf-8")
    return {"losses": losses, "tokens_per_second": _count_tokens(trainer) / seconds}


def _read_row(rows: Any, number: int) -> tuple[Any, Any]:
    """Return ids and labels of a row that takes part, int64, shape (tokens,)."""
    import torch

    row = rows.table.row(number if rows.index is None else int(rows.index[number]))
    return tuple(torch.tensor(row[name].astype("int64")) for name in ("input_ids", "labels"))


def _compare_memory(config: Any, peak: int) -> dict[str, int]:
    """Return the most bytes of tensors that a GPU held, and those that the plan has for it."""
    from luthier.memory.plan import plan_memory
    from luthier.memory.workload import detect_hardware

    memory = {"peak_bytes": peak}
    with suppress(UserError):  # a run that cannot be planned may well train
        hardware = detect_hardware(config.model, 1)
        plan = plan_memory(config, hardware)
        # torch does not count what the driver takes.
        memory["planned_bytes"] = plan.best.total - hardware.overhead
    return memory


if __name__ == "__main__":
    main(Path(sys.argv[1]))
