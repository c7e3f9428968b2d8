"""The sources that a dataset's config names, for training and for evaluation."""

from collections.abc import Iterator

from luthier.config.schema import DatasetConfig, SourceConfig
from luthier.errors import UserError

MAIN = "dataset"
"""The name of the only source of a dataset that names no sources."""
_PATH, _SPLIT = "dataset.eval.path", "dataset.eval.split"


def train_sources(config: DatasetConfig) -> dict[str, SourceConfig]:
    """The sources to train on, by name; UserError where there is none, or two ways to name one."""
    own = SourceConfig(**{name: getattr(config, name) for name in SourceConfig.model_fields})
    if not config.sources:
        if config.path is None:
            raise UserError(
                "dataset names no rows. Set dataset.path to a file, a folder or a hub dataset, or "
                "name several under dataset.sources."
            )
        return {MAIN: own}
    given = [name for name in SourceConfig.model_fields if name in _said(config, own)]
    if given:
        raise UserError(
            f"dataset.{given[0]} is for a dataset of one source, and dataset.sources names "
            f"{', '.join(config.sources)}. Set it for each source it is for, such as "
            f"dataset.sources.{next(iter(config.sources))}.{given[0]}, or remove dataset.sources."
        )
    return dict(config.sources)


def _said(config: DatasetConfig, own: SourceConfig) -> Iterator[str]:
    """The settings of a single source that are not what they are by default."""
    default = SourceConfig()
    for name in SourceConfig.model_fields:
        if getattr(own, name) != getattr(default, name):
            yield name


def eval_sources(config: DatasetConfig) -> dict[str, SourceConfig]:
    """The evaluation sets that have rows of their own, by the config key that describes each.

    `dataset.eval.path` and `dataset.eval.split` are read as the training rows are. Raises UserError
    for more than one way to hold rows out, and for settings that say nothing of such a set.
    """
    _check_one_way(config)
    found: dict[str, SourceConfig] = {}
    if config.eval.path is not None:
        own = _like_training(config)
        # The split is one of the training data; a file of its own has none, a folder its own.
        found[_PATH] = own.model_copy(
            update={"path": config.eval.path, "split": "train", "name": None, "revision": None}
        )
    if config.eval.split is not None:
        if config.path is None:
            raise UserError(
                "dataset.eval.split is a split of dataset.path, which is not set. For sources of "
                "their own name evaluation sets: dataset.eval.sets.NAME.path=..."
            )
        found[_SPLIT] = _like_training(config).model_copy(update={"split": config.eval.split})
    for name, source in config.eval.sets.items():
        key = f"dataset.eval.sets.{name}"
        if source.path is None:
            raise UserError(f"{key} has no path: say where its rows are.")
        if source.weight is not None or source.repeats != 1:
            raise UserError(
                f"{key}: weight and repeats mix training rows, and an evaluation set is seen "
                "whole, once. Remove them; max_rows takes the first rows only."
            )
        found[key] = source
    return found


def _check_one_way(config: DatasetConfig) -> None:
    """Refuse more than one way to hold rows out."""
    ways = [key for key in ("path", "split", "share", "count") if getattr(config.eval, key)]
    if len(ways) > 1:
        names = " and ".join(f"dataset.eval.{way}" for way in ways)
        raise UserError(
            f"{names} are set: rows are held out in one way only. "
            "Keep one and set the others to null."
        )


def _like_training(config: DatasetConfig) -> SourceConfig:
    """How the training rows are read, less what chooses among them."""
    own = {name: getattr(config, name) for name in SourceConfig.model_fields}
    return SourceConfig(**own | {"max_rows": None, "filter": None, "weight": None, "repeats": 1})


def key_of_path(key: str) -> str:
    """The config key that a source's path and split stand under, for messages."""
    return {_PATH: MAIN, _SPLIT: "dataset.eval"}.get(key, key)


def key_of_shape(key: str) -> str:
    """The config key that a source's shape and columns stand under, for messages."""
    return MAIN if key in (_PATH, _SPLIT) else key


def set_name(key: str) -> str:
    """What an evaluation set is called in metrics: its name; the main one has none."""
    return key.removeprefix("dataset.eval.sets.") if ".sets." in key else ""
