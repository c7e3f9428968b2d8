"""Data is encoded once for all trials: the first one that needs it does, the others wait for it."""

from collections.abc import Iterable

from luthier.config.load import load
from luthier.errors import UserError
from luthier.sweep.planning import Sweep, data_key
from luthier.sweep.trials import Trial, has_data


class Encoding:
    """Which trials share their data, and which data is in the cache."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._keys: dict[int, str | UserError] = {}
        self._ready: set[str] = set()

    def may_start(self, trial: Trial, running: Iterable[Trial]) -> bool:
        """Whether a trial's data is encoded, or nobody is encoding it."""
        key = self._key(trial)
        if isinstance(key, UserError) or key in self._ready:
            return True
        busy = [one for one in running if self._key(one) == key]
        if any(has_data(self._sweep.folder.run(one)) for one in busy):
            self._ready.add(key)
            return True
        return not busy

    def refuse(self, trial: Trial) -> None:
        """Raise UserError for a trial whose configuration is wrong: one that was drawn may be."""
        key = self._key(trial)
        if isinstance(key, UserError):
            raise key

    def _key(self, trial: Trial) -> str | UserError:
        """What decides a trial's data, or what is wrong with its configuration."""
        known = self._sweep.data.get(tuple(trial.params.values()))
        if known is None and trial.number not in self._keys:
            try:
                resolved = load(self._sweep.choices(trial.params)).resolved
                self._keys[trial.number] = data_key(resolved)
            except UserError as error:
                self._keys[trial.number] = error
        return known or self._keys[trial.number]
