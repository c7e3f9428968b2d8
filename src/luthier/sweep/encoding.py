"""Data is encoded once for all trials: the first one that needs it does, the others wait for it."""

import json
from collections.abc import Iterable
from typing import Any

from luthier.config.run_config import load
from luthier.errors import UserError
from luthier.sweep.planning import Sweep
from luthier.sweep.trials import Trial, has_data

_OF_THE_MODEL = ("path", "revision", "tokenizer", "add_tokens", "add_special_tokens")
_OF_THE_MACHINE = ("workers", "cache")


class Encoding:
    """Which trials share their data, and which data is in the cache."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._keys: dict[int, str | None] = {}
        self._ready: set[str] = set()

    def may_start(self, trial: Trial, running: Iterable[Trial]) -> bool:
        """Whether a trial's data is encoded, or nobody is encoding it."""
        key = self._key(trial)
        if key is None or key in self._ready:
            return True
        busy = [one for one in running if self._key(one) == key]
        if any(has_data(self._sweep.folder.run(one)) for one in busy):
            self._ready.add(key)
            return True
        return not busy

    def _key(self, trial: Trial) -> str | None:
        """What decides a trial's data; None where its configuration is wrong."""
        if trial.number not in self._keys:
            try:
                loaded = load(self._sweep.choices(trial.params))
            except UserError:
                self._keys[trial.number] = None
            else:
                self._keys[trial.number] = data_key(loaded.resolved)
        return self._keys[trial.number]


def data_key(resolved: dict[str, Any]) -> str:
    """What decides the encoded rows of a configuration: those with the same text share them."""
    model, dataset = resolved["model"], resolved["dataset"]
    of_model = {name: model[name] for name in _OF_THE_MODEL}
    of_data = {name: one for name, one in dataset.items() if name not in _OF_THE_MACHINE}
    method = resolved["trainer"]["method"]
    return json.dumps([of_model, of_data, resolved["chat"], method], sort_keys=True)
