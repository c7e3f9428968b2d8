"""Where rows come from: a local file or a hub dataset, each row with its place."""

from luthier.config.schema import DatasetConfig
from luthier.data.files import is_local, read_file
from luthier.data.hub import check_hub, read_hub
from luthier.data.rows import Row
from luthier.errors import UserError


def read_rows(config: DatasetConfig) -> tuple[Row, ...]:
    """The rows of `dataset.path`, at most `max_rows` of them, in order."""
    if is_local(config.path):
        return read_file(config.path)[: config.max_rows]
    return read_hub(config, config.split, config.max_rows)


def read_heldout(config: DatasetConfig) -> tuple[Row, ...]:
    """The rows of `dataset.eval.path` or `dataset.eval.split`; none where neither is set."""
    if config.eval.path is not None:
        return read_file(config.eval.path)
    if config.eval.split is not None:
        return read_hub(config, config.eval.split)
    return ()


def check_sources(config: DatasetConfig) -> None:
    """Refuse settings that would go unused or unmet, before anything is read."""
    _check_one_way(config)
    if not is_local(config.path):
        check_hub(config)
        return
    unused = {"name": config.name, "revision": config.revision, "eval.split": config.eval.split}
    if config.split != "train":
        unused["split"] = config.split
    for key, value in unused.items():
        if value is not None:
            raise UserError(
                f"dataset.{key}={value} is for hub datasets, and {config.path} is a local file. "
                f"Remove dataset.{key}{_instead(key)}."
            )


def _instead(key: str) -> str:
    """What does for a local file what the setting does for a hub dataset."""
    held_out = "; eval.path, eval.share or eval.count hold rows out of a file"
    return held_out if key == "eval.split" else ""


def _check_one_way(config: DatasetConfig) -> None:
    """Refuse more than one way to hold rows out."""
    ways = [key for key, value in config.eval.model_dump().items() if value is not None]
    if len(ways) > 1:
        names = " and ".join(f"dataset.eval.{way}" for way in ways)
        raise UserError(
            f"{names} are set: rows are held out in one way only. "
            "Keep one and set the others to null."
        )
    if config.eval.path is not None and not is_local(config.eval.path):
        raise UserError(
            f"dataset.eval.path={config.eval.path} is no local .json or .jsonl file. "
            "For a split of the same hub dataset use dataset.eval.split."
        )
