"""Trials as jobs of a SLURM cluster through submitit; its local executor runs the same code."""

import math
import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import UserError
from luthier.sweep.local import GuardedJob, LaunchCommand, environment_without_rank, start_guarded
from luthier.sweep.settings import SubmititSettings
from luthier.sweep.sweep_plan import SweepPlan
from luthier.sweep.trials import Trial, TrialFolder

if TYPE_CHECKING:
    import submitit

_TICK = 0.1
_PATIENCE = 60.0
"""Seconds beyond its grace that a cluster takes to note the end of a job."""
_KEY = "hydra.launcher.parameters"


class TrialCommand:
    """What a job does: it runs a guarded trial, and passes on that its time is over."""

    def __init__(self, command: list[str], folder: str, grace: float) -> None:
        self.words, self.folder, self.grace = command, folder, grace
        self._guard: int | None = None
        """The number of the guard's process."""
        self._pipe = -1
        self._code: int | None = None

    def __call__(self) -> int:
        """Run the trial; returns its exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle_cancel)
        environ = environment_without_rank(os.environ)
        environ = {n: text for n, text in environ.items() if not n.startswith("SUBMITIT_")}
        # In a session of its own, so that a signal to the job's group reaches this process alone.
        started = subprocess.Popen(
            self.words, cwd=self.folder, stdin=subprocess.PIPE, start_new_session=True, env=environ
        )
        assert started.stdin is not None
        self._guard, self._pipe = started.pid, started.stdin.fileno()
        while not self._has_ended():
            time.sleep(_TICK)
        return self._code or 0

    def checkpoint(self) -> Any:
        """Have the trial write its checkpoint when the job's time is over, and submit it again."""
        import submitit

        self._end_trial()
        again = TrialCommand(self.words, self.folder, self.grace)
        return submitit.helpers.DelayedSubmission(again)

    def _handle_cancel(self, *_: Any) -> None:
        """The sweep cancels the job: the trial ends with a checkpoint, and the job with it."""
        self._end_trial()

    def _end_trial(self) -> None:
        if self._guard is None:
            return
        os.write(self._pipe, b"x")
        while not self._has_ended():
            time.sleep(_TICK)

    def _has_ended(self) -> bool:
        """Return whether the trial is gone; a signal handler asks too, so it waits for no lock."""
        assert self._guard is not None
        if self._code is None:
            try:
                pid, status = os.waitpid(self._guard, os.WNOHANG)
            # Collected by the other caller: the loop, or a signal's handler within it.
            except ChildProcessError:
                return True
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code is not None

    def __getstate__(self) -> dict[str, Any]:
        # submitit pickles the command to submit it again; the old process and pipe mean nothing
        # then.
        return self.__dict__ | {"_guard": None, "_pipe": -1, "_code": None}


class SubmittedJob:
    """A job of the cluster."""

    def __init__(self, job: "submitit.Job[int]", grace: float) -> None:
        self._job, self._grace = job, grace
        self._given_up = math.inf
        """When a cancelled job is taken for ended, where the cluster keeps no accounts of it."""

    def code(self) -> int | None:
        """Return the exit code, or None while it waits or runs; 1 where the cluster ended it."""
        if not self._job.done():
            return 1 if time.monotonic() > self._given_up else None
        try:
            return int(self._job.results()[0])
        except Exception:  # whatever the cluster did: the trial's record says how far it came
            return 1

    def stop(self) -> None:
        """Cancel it; the trial writes its checkpoint first."""
        # Unchecked: scancel fails for a job that has ended in the meantime, which is as good.
        self._job.cancel(check=False)
        self._given_up = min(self._given_up, time.monotonic() + self._grace + _PATIENCE)


class SlurmCluster:
    """A cluster, as a place for trials."""

    def __init__(self, planned: SweepPlan, launch: LaunchCommand) -> None:
        settings = planned.launcher
        assert isinstance(settings, SubmititSettings)
        self.slots = [f"job {number + 1}" for number in range(settings.slots)]
        self._settings, self._launch, self._folder = settings, launch, planned.folder
        self._on_cpu = launch.on_cpu or planned.base.config.model.device == "cpu"
        self._executor = make_executor(settings, self._count_gpus(), planned.folder)

    def _count_gpus(self) -> int:
        each = self._settings.gpus_per_trial
        if each == "auto":
            local = self._settings.cluster == "local"
            return 0 if self._on_cpu or local else self._launch.processes
        return int(each)

    def start(self, trial: Trial, overrides: list[str], slot: int) -> GuardedJob:
        """Submit a trial."""
        logs = self._folder.logs(trial)
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        overrides_line = self._launch.command(overrides, has_gpus=False)
        guard = start_guarded(overrides_line, self._launch.has_launcher, logs, self._settings.grace)
        command = TrialCommand(guard, str(Path.cwd()), self._settings.grace)
        job = self._executor.submit(command)
        trial.job = str(job.job_id)
        return SubmittedJob(job, self._settings.grace)

    def again(self, trial: Trial) -> GuardedJob | None:
        """Return a trial's job if it waits or runs: a cluster does not end it with the sweep."""
        if trial.job is None or self._settings.cluster != "slurm":
            return None
        import submitit

        job: submitit.Job[int] = submitit.SlurmJob(self._folder.path / "jobs", trial.job)
        return None if job.done(force_check=True) else SubmittedJob(job, self._settings.grace)


def check_slurm(settings: SubmititSettings) -> None:
    """Refuse what can be known to be wrong before anything is submitted."""
    if find_spec("submitit") is None:
        raise UserError(
            "hydra/launcher: submitit is not installed. Install it: pip install "
            "'luthier[submitit]'."
        )
    nodes = settings.parameters.get("nodes", settings.parameters.get("slurm_nodes", 1))
    if nodes != 1 or settings.parameters.get("tasks_per_node", 1) != 1:
        raise UserError(
            f"{_KEY}: a trial is one task on one machine, whose processes `accelerate launch` "
            "starts. Remove nodes and tasks_per_node."
        )


def make_executor(
    settings: SubmititSettings, gpus: int, folder: TrialFolder
) -> "submitit.AutoExecutor":
    """submitit's executor with the settings of the sweep; raises UserError for what it refuses."""
    check_slurm(settings)
    import submitit

    try:
        executor = submitit.AutoExecutor(folder.path / "jobs", cluster=settings.cluster)
        # What the user set comes last and wins.
        parameters = {"gpus_per_node": gpus, "name": folder.path.name[:40], **settings.parameters}
        executor.update_parameters(**parameters)
    # submitit 1.5.4 has no error of its own: an unknown parameter is a NameError, a missing sbatch
    # a RuntimeError.
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"hydra/launcher=submitit_{settings.cluster}: {error}") from error
    return executor
