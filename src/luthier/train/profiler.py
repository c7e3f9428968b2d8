"""A profile of a few steps in the run's folder: a trace, and what took the most time.

The trace opens in Perfetto (https://ui.perfetto.dev) and in Chrome's about:tracing.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import profiler
from torch.autograd import DeviceType
from transformers import TrainerCallback

from luthier.config.cross_checks import PROFILED_STEPS, profile_needs_steps
from luthier.errors import UserError
from luthier.storage.atomic import write_text
from luthier.train import console

if TYPE_CHECKING:
    from luthier.config.schema import RunConfig

FOLDER, TRACE_FILE, OPERATIONS_FILE = "profile", "trace.json.gz", "operations.txt"
LISTED_OPERATIONS = 10
_NAME_WIDTH = 46
_LABEL = f"steps {PROFILED_STEPS[0]} to {PROFILED_STEPS[-1]}"
_OTHER_KERNELS = "kernels outside of torch's operations"


class OperationTime(NamedTuple):
    """The time that one operation of torch took itself, without those that it called."""

    name: str
    microseconds: float
    calls: int


def add_profiler(trainer: Any, config: "RunConfig", folder: Path) -> None:
    """Let a trainer profile its steps where `trainer.profile` is set; the first process does so.

    `folder` is the run's. Raises UserError for a run that has too few steps.
    """
    if not config.trainer.profile:
        return
    steps = trainer.count_planned_steps()
    if steps < PROFILED_STEPS[-1]:
        raise UserError(f"trainer.profile: {profile_needs_steps(steps)}")
    if trainer.args.process_index == 0:
        trainer.add_callback(ProfilerCallback(folder / FOLDER))


class ProfilerCallback(TrainerCallback):
    """Profiles a few steps of a training, and writes what it saw behind the last of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._profile: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count the steps; of a run that goes on, those that are left."""
        left = state.max_steps - state.global_step
        if left < PROFILED_STEPS[-1]:
            console.print_line(
                f"profile   none: it needs {PROFILED_STEPS[-1]} steps, and {left} are left"
            )
            return
        schedule = profiler.schedule(
            wait=PROFILED_STEPS[0] - 2, warmup=1, active=len(PROFILED_STEPS), repeat=1
        )
        self._profile = profiler.profile(schedule=schedule, on_trace_ready=self._finish)
        self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the profiler that a step ends; behind the profiled ones it is gone."""
        if self._profile is not None:
            self._profile.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop a profile whose steps were not all taken, such as where a signal came."""
        if self._profile is None:
            return
        # torch would write what there is, as if these were all the steps.
        self._profile.on_trace_ready = None
        self._profile.stop()
        self._profile = None
        console.print_line(f"profile   none: the training ended before all of {_LABEL}")

    def _finish(self, profile: Any) -> None:
        """Write the profile when torch says that the last of its steps has ended."""
        self._profile = None
        write_profile(profile, self._folder)


def write_profile(profile: Any, folder: Path) -> None:
    """Write the trace and the table of a `torch.profiler.profile` into a folder, and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    # torch compresses what ends in .gz.
    temporary = folder / f".{TRACE_FILE}"
    profile.export_chrome_trace(str(temporary))
    temporary.replace(folder / TRACE_FILE)
    table = format_operations(*measure_operations(profile.key_averages()))
    write_text(folder / OPERATIONS_FILE, f"{table}\n")
    console.print_line(f"profile   {_LABEL}: {folder / TRACE_FILE}\n{table}")


def measure_operations(events: Iterable[Any]) -> tuple[list[OperationTime], str]:
    """Return the operations by their own time, the longest first, and whose time it is.

    `events` are those of `key_averages`. The time is that of the kernels where there is a GPU, else
    of the CPU; the mark that the profiler puts around a step is no operation.
    """
    events = [event for event in events if not event.key.startswith("ProfilerStep")]
    operations = [event for event in events if event.device_type == DeviceType.CPU]
    # torch lists a kernel's time twice: as itself, and with the operation that started it.
    kernel_time = sum(
        float(event.self_device_time_total)
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    )
    device = "GPU" if kernel_time else "CPU"
    attribute = "self_device_time_total" if kernel_time else "self_cpu_time_total"
    times = [OperationTime(e.key, float(getattr(e, attribute)), e.count) for e in operations]
    rest = kernel_time - sum(time.microseconds for time in times)
    # Kernels of other packages may be started by no operation of torch.
    if rest > kernel_time / 1000:
        times.append(OperationTime(_OTHER_KERNELS, rest, 0))
    used = [time for time in times if time.microseconds > 0]
    return sorted(used, key=lambda time: -time.microseconds), device


def format_operations(operations: list[OperationTime], device: str) -> str:
    """Return a table of what took the most time, 80 columns wide; its numbers are of one step."""
    steps, total = len(PROFILED_STEPS), sum(time.microseconds for time in operations)
    lines = [f"{'operation':<{_NAME_WIDTH}}{f'{device} time':>9}{'ms/step':>12}{'calls/step':>13}"]
    rows = operations[:LISTED_OPERATIONS]
    others = operations[LISTED_OPERATIONS:]
    if others:
        rest = sum(time.microseconds for time in others)
        rows = [*rows, OperationTime(f"{len(others)} others", rest, 0)]
    for name, microseconds, calls in rows:
        short = name if len(name) < _NAME_WIDTH else f"{name[: _NAME_WIDTH - 4]}..."
        counted = f"{calls / steps:,.0f}" if calls else ""
        lines.append(
            f"{short:<{_NAME_WIDTH}}{microseconds / total:>9.1%}"
            f"{microseconds / 1000 / steps:>12,.2f}{counted:>13}"
        )
    return "\n".join(line.rstrip() for line in lines)
