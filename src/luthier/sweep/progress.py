"""What a person sees while a sweep runs: a live table, or lines where there is no terminal."""

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from luthier.sweep.controller import SweepView
from luthier.sweep.objective import Objective
from luthier.sweep.trials import (
    Trial,
    best_trial,
    completed_trials,
    format_number,
    format_params,
    trial_table,
)
from luthier.terminal import format_duration

_EVERY = 0.5
"""Seconds between two drawings."""
_HEAD = 6
"""Lines that a live table needs besides its rows."""


def make_view(objectives: Sequence[Objective], total: int, console: Console) -> "SweepView":
    """Return a live table in a terminal, lines elsewhere."""
    view_class = LiveTable if console.is_terminal else PlainProgress
    return view_class(objectives, total, console)


class PlainProgress:
    """A line when a trial begins and when it ends."""

    def __init__(self, objectives: Sequence[Objective], total: int, console: Console) -> None:
        self._objectives, self._total, self._console = objectives, total, console
        self._ended: dict[int, Trial] = {}

    def started(self, trial: Trial, where: str) -> None:
        """Say which point is tried, and where."""
        again = " again" if trial.attempts > 1 or trial.step else ""
        self.say(f"{_label_trial(trial)} starts{again} on {where}: {format_params(trial.params)}")

    def ended(self, trial: Trial) -> None:
        """Say what came out."""
        self._ended[trial.number] = trial
        numbers = "  ".join(
            f"{objective.name} {format_number(trial.values.get(objective.name))}"
            for objective in self._objectives
            if objective.name in trial.values
        )
        why = f": {trial.error.splitlines()[-1]}" if trial.error else ""
        is_best = trial in best_trial(list(self._ended.values()), self._objectives)
        mark = "  (best so far)" if is_best else ""
        # The person need not know which of the two it is: the same command goes on with both.
        state = "can go on" if trial.state in ("waiting", "interrupted") else trial.state
        took = format_duration(trial.seconds)
        self.say(f"{_label_trial(trial)} {state} after {took}{why}  {numbers}{mark}".rstrip())

    def show(self, trials: list[Trial], running: dict[int, str]) -> None:
        """Do nothing: the lines already say what changes."""

    def say(self, text: str) -> None:
        """Print one line."""
        # Overrides such as lora.target_modules=[q_proj] are text, and rich would read the brackets.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Do nothing: no display is open."""


class LiveTable(PlainProgress):
    """A table that changes as the trials do; what is said goes above it."""

    def __init__(self, objectives: Sequence[Objective], total: int, console: Console) -> None:
        super().__init__(objectives, total, console)
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._live.start()
        self._drawn = 0.0

    def started(self, trial: Trial, where: str) -> None:
        """Do nothing: the table shows it."""

    def show(self, trials: list[Trial], running: dict[int, str]) -> None:
        """Draw the table, twice a second, as far as the terminal has room."""
        if time.monotonic() - self._drawn < _EVERY:
            return
        self._drawn = time.monotonic()
        # rich's Live leaves lines behind when a table is higher than the terminal.
        room = max(3, self._console.size.height - _HEAD)
        table = trial_table(trials, self._objectives, running, room)
        self._live.update(Group(table, Text(), summary_line(trials, self._objectives, self._total)))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._live.stop()


def summary_line(trials: Sequence[Trial], objectives: Sequence[Objective], total: int) -> Text:
    """Return how many trials stand how, and the best value so far."""
    counts = Counter(trial.state for trial in trials)
    counts["waiting"] += max(0, total - len(trials))
    counted_states = [f"{count} {state}" for state, count in counts.items() if count]
    done = completed_trials(trials, objectives)
    first = objectives[0].name
    leader = f"; best {first} {format_number(done[0].values[first])}" if done else ""
    return Text(f"{total} trials: {', '.join(counted_states)}{leader}", style="dim")


def _label_trial(trial: Trial) -> str:
    return f"trial {trial.name}"
