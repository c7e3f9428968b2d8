"""The loop of a sweep: start trials where there is room, watch them, end the bad ones."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from luthier.config.load import load_config
from luthier.errors import UserError, suggest_options
from luthier.sweep import trials as on_disk
from luthier.sweep.local import GuardedJob
from luthier.sweep.objective import KEY, measure_objectives
from luthier.sweep.strategies import Strategy
from luthier.sweep.sweep_plan import SweepPlan, data_key
from luthier.sweep.trials import Trial, has_data

# Data is encoded once for all trials: the first one that needs it does, the others wait for it.
# Without this, sixteen trials that start together would encode the same rows sixteen times.


class DatasetEncoding:
    """Which trials share their data, and which data is in the cache."""

    def __init__(self, sweep: SweepPlan) -> None:
        self._sweep = sweep
        self._keys: dict[int, str | UserError] = {}
        self._ready: set[str] = set()

    def may_start(self, trial: Trial, running: Iterable[Trial]) -> bool:
        """Return whether a trial's data is encoded, or nobody is encoding it."""
        key = self._find_key(trial)
        # A wrong configuration waits for nothing: starting it is what reports it.
        if isinstance(key, UserError) or key in self._ready:
            return True
        busy = [other for other in running if self._find_key(other) == key]
        if any(has_data(self._sweep.folder.run(other)) for other in busy):
            self._ready.add(key)
            return True
        return not busy

    def refuse(self, trial: Trial) -> None:
        """Raise UserError for a trial whose configuration is wrong: one that was drawn may be."""
        key = self._find_key(trial)
        if isinstance(key, UserError):
            raise key

    def _find_key(self, trial: Trial) -> str | UserError:
        """Return what decides a trial's data, or what is wrong with its configuration."""
        # Points of a grid were composed when the sweep was planned; one that Optuna draws is
        # composed here, once.
        checked_key = self._sweep.data.get(tuple(trial.params.values()))
        if checked_key is None and trial.number not in self._keys:
            try:
                choices = self._sweep.choices(trial.params)
                resolved = load_config(choices, self._sweep.is_trusted).resolved
                self._keys[trial.number] = data_key(resolved)
            except UserError as error:
                self._keys[trial.number] = error
        return checked_key or self._keys[trial.number]


# The loop. It alone starts and ends trials; what it knows of them it reads from their files, so
# that a sweep that was killed goes on from where those files are.

RESUME = 75
"""What a run ends with that wrote a checkpoint and can go on, and so does a stopped sweep."""
_CAN_GO_ON = ("stopped", "interrupted")
"""What a run's record says then; a launcher has an exit code of its own."""
_TICK = 0.1
_ONE_PRESS = 1.0
"""Seconds within which signals count as one: a terminal and a launcher both pass on Ctrl-C."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SweepView(Protocol):
    """How a sweep is shown to the person who started it."""

    def started(self, trial: Trial, where: str) -> None:
        """A trial begins."""

    def ended(self, trial: Trial) -> None:
        """A trial has ended."""

    def show(self, trials: list[Trial], running: dict[int, str]) -> None:
        """How all trials stand; `running` says where, by number."""

    def say(self, text: str) -> None:
        """Print one line."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class TrialPlace(Protocol):
    """Where trials run: so many at a time."""

    slots: list[str]
    """The name of each slot."""

    def start(self, trial: Trial, overrides: list[str], slot: int) -> GuardedJob:
        """Start a trial in a free slot."""

    def again(self, trial: Trial) -> GuardedJob | None:
        """Return the job of a trial that an earlier sweep started; None if it cannot still run."""


@dataclass
class RunningTrial:
    """A trial while it runs."""

    trial: Trial
    job: GuardedJob
    began: float
    """On the monotonic clock, as if it had never been interrupted."""
    started: float = 0.0
    """On the clock of files."""
    reported: int = -1
    """The last step that the pruner knows."""
    is_bad: bool = False
    stamp: tuple[int, ...] = ()
    """Of the files that it writes, as they were read last."""


class Controller:
    """A sweep while it runs."""

    def __init__(
        self, sweep: SweepPlan, strategy: Strategy, trial_place: TrialPlace, view: SweepView
    ) -> None:
        self.trials = sweep.folder.load()
        self._sweep, self._strategy, self._place, self._view = sweep, strategy, trial_place, view
        self._encoding = DatasetEncoding(sweep)
        self._running: dict[int, RunningTrial] = {}
        """By slot."""
        self._signals = 0
        self._ending = False
        self._full = False
        """Whether no further trial is to start."""

    def run(self, is_orphan: Callable[[], bool]) -> int:
        """Try everything; returns 0, 1 if a trial failed, or 75 if there is more to do.

        `is_orphan` says when what started this sweep is gone.
        """
        with self._count_signals():
            try:
                self._resume_trials()
                while not self._signals and not is_orphan():
                    self._watch_trials()
                    self._start_trials()
                    self._show_trials()
                    if not self._running:
                        break
                    time.sleep(_TICK)
            finally:
                self._end_all()
        if not self._full and any(not trial.is_ended for trial in self.trials):
            return RESUME
        return int(any(trial.state == "failed" for trial in self.trials))

    @contextmanager
    def _count_signals(self) -> Iterator[None]:
        """Count signals in place of dying of them."""

        last = -_ONE_PRESS

        def heard(*_: Any) -> None:
            nonlocal last
            now = time.monotonic()
            # A bool counts as 0 or 1: signals of one press are counted once.
            self._signals += now - last >= _ONE_PRESS
            last = now

        before = {number: signal.signal(number, heard) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _show_trials(self) -> None:
        slots = {job.trial.number: self._place.slots[n] for n, job in self._running.items()}
        self._view.show(self.trials, slots)

    def _resume_trials(self) -> None:
        """Find how the trials of an earlier start stand."""
        for trial in self.trials:
            if trial.state == "failed" and self._sweep.sweeper.retry_failed:
                trial.state, trial.error = "waiting", None
            # A job of a cluster outlives its sweep: it is watched again and not started twice.
            job = self._place.again(trial) if trial.state == "running" else None
            free = self._free_slots()
            if job is not None and free:
                self._running[free[0]] = RunningTrial(trial, job, time.monotonic() - trial.seconds)
                continue
            if not trial.is_ended:
                # The attempts count restarts of one sweep, so that a new start gives a trial all of
                # them again.
                trial.state, trial.attempts = "waiting", 0
                if (
                    on_disk.read_run_record(self._sweep.folder.run(trial)).get("status")
                    == "finished"
                ):
                    trial.state = "finished"
            self._read_measures(trial)
            self._sweep.folder.save(trial)
            self._strategy.tell(trial)
        for trial in self.trials:
            self._refuse_unlogged(trial)

    def _free_slots(self) -> list[int]:
        return [slot for slot in range(len(self._place.slots)) if slot not in self._running]

    def _start_trials(self) -> None:
        """Start trials while there are free slots."""
        while not self._full and (free := self._free_slots()):
            trial = self._next_trial()
            if trial is None:
                return
            self._start_trial(trial, free[0])

    def _next_trial(self) -> Trial | None:
        """Return a trial that was begun, else a new one; none that waits for data being encoded."""
        running = [candidate.trial for candidate in self._running.values()]
        waiting = [trial for trial in self.trials if trial.state == "waiting"]
        if not waiting and (point := self._strategy.next(self.trials)) is not None:
            # A new point is drawn only when nothing waits: Optuna learns from what has ended.
            waiting = [Trial(len(self.trials), point)]
            self.trials += waiting
        may_start = (
            candidate for candidate in waiting if self._encoding.may_start(candidate, running)
        )
        return next(may_start, None)

    def _start_trial(self, trial: Trial, slot: int) -> None:
        trial.attempts += 1
        trial.state, trial.error = "running", None
        overrides = self._sweep.overrides(trial)
        # Before its first process: a short run may have written its record when this one goes on.
        started = time.time()
        try:
            self._encoding.refuse(trial)
            job = self._place.start(trial, overrides, slot)
        except UserError as error:
            trial.state, trial.error = "failed", str(error)
            self._conclude_trial(trial)
            return
        self._sweep.folder.save(trial)
        # A trial that goes on keeps the time of its earlier starts.
        began = time.monotonic() - trial.seconds
        self._running[slot] = RunningTrial(trial, job, began, started)
        self._view.started(trial, self._place.slots[slot])

    def _watch_trials(self) -> None:
        """Read what the running trials have logged, end the bad ones, note those that ended."""
        for slot, running_trial in list(self._running.items()):
            code = running_trial.job.code()
            running_trial.trial.seconds = time.monotonic() - running_trial.began
            # Ten times a second for every trial: files are parsed only when they have changed.
            stamp = on_disk.timestamp(self._sweep.folder.run(running_trial.trial))
            if code is not None or stamp != running_trial.stamp:
                running_trial.stamp = stamp
                self._report_measures(
                    running_trial, self._read_measures(running_trial.trial), runs=code is None
                )
            if code is not None:
                # Only after the last reading: what was logged between two ticks counts too.
                del self._running[slot]
                self._settle_trial(running_trial, code)

    def _read_measures(self, trial: Trial) -> list[dict[str, Any]]:
        """Take over the numbers that a run has left so far."""
        folder = self._sweep.folder.run(trial)
        rows = on_disk.read_rows(folder)
        measures = measure_objectives(on_disk.read_run_record(folder), rows)
        trial.step = int(measures.pop("step", trial.step))
        trial.values = measures or trial.values
        return rows

    def _report_measures(
        self, running_trial: RunningTrial, rows: list[dict[str, Any]], runs: bool
    ) -> None:
        """Tell new measures to the pruner, and end a trial that still runs if it says so."""
        watched = self._sweep.watched
        if watched is None or running_trial.is_bad:
            return
        for row in rows:
            step, value = int(row.get("step", 0)), row.get(watched.name)
            # The file is read from its start each time, and a run that went on from a checkpoint
            # logs its steps again.
            if value is None or step <= running_trial.reported:
                continue
            running_trial.reported = step
            if self._strategy.is_bad(running_trial.trial, step, float(value)) and runs:
                running_trial.is_bad = True
                running_trial.job.stop()
                return

    def _settle_trial(self, running_trial: RunningTrial, code: int) -> None:
        """Decide what became of a trial whose processes are gone."""
        trial, run = running_trial.trial, self._sweep.folder.run(running_trial.trial)
        status = on_disk.status_since(run, running_trial.started)
        # The record comes before the exit code: a launcher may end badly after a run that finished.
        if status == "finished":
            trial.state = "finished"
        elif running_trial.is_bad:
            trial.state = "pruned"
        elif self._ending:
            trial.state = "interrupted"
        elif code == RESUME or status in _CAN_GO_ON:
            again = trial.attempts <= self._sweep.launcher.restarts
            trial.state = "waiting" if again else "interrupted"
        else:
            trial.state = "failed"
            trial.error = on_disk.failure_reason(run, self._sweep.folder.logs(trial)[1], code)
        self._conclude_trial(trial)

    def _conclude_trial(self, trial: Trial) -> None:
        self._sweep.folder.save(trial)
        self._strategy.tell(trial)
        self._view.ended(trial)
        if trial.state == "failed" and self._sweep.sweeper.on_failure == "stop":
            self._full = True
        # While everything ends an error of this kind would leave the other trials unwatched.
        if not self._ending:
            self._refuse_unlogged(trial)

    def _refuse_unlogged(self, trial: Trial) -> None:
        """Stop where a finished trial has not logged what the sweep compares by."""
        for objective in self._sweep.objectives if trial.state == "finished" else ():
            if objective.name not in trial.values:
                raise UserError(
                    f"{KEY}: trial {trial.name} is finished, and its run has not logged "
                    f"{objective.name!r}. {suggest_options(objective.name, trial.values)}\nRun "
                    "the same command with another objective; finished trials are kept."
                )

    def _end_all(self) -> None:
        """Ask all trials to end, and wait until they have; a further signal kills them."""
        self._ending = True
        if not self._running:
            return
        count = len(self._running)
        what = "1 trial" if count == 1 else f"{count} trials"
        self._stop_jobs()
        # The trials are asked first: printing may block, on a terminal that was paused.
        self._view.say(f"ending {what}, with checkpoints; once more to kill")
        heard = self._signals
        while self._running:
            if self._signals > heard:
                heard = self._signals
                self._stop_jobs()
            self._watch_trials()
            time.sleep(_TICK)

    def _stop_jobs(self) -> None:
        for running_trial in self._running.values():
            running_trial.job.stop()


def orphan_check(launched: bool) -> Callable[[], bool]:
    """Return a test whether the launcher above this process has ended and left it behind."""
    parent = os.getppid()
    # An orphan is handed to another parent; no signal comes with it.
    return lambda: launched and os.getppid() != parent
