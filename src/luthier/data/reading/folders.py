"""Which files of a folder or an archive are its data, where nobody has named them one by one."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from luthier.data.reading.formats import format_of
from luthier.data.reading.places import Place
from luthier.errors import UserError

Found = tuple[str, Place]
"""A file's name and place."""
_PAPERS = re.compile(r"(readme|license|licence|notice|changelog|citation)\b", re.IGNORECASE)
_TRAINING = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)")
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|val|dev|eval|heldout|held-out)([^a-z]|$)")


def data_files(folder: str, found: Sequence[Found], format: str) -> list[Found]:
    """The data files among these, of one format and of no two splits.

    Hidden files, readmes and licences are none; text is data only where nothing else is.
    """
    shown = [entry for entry in found if not _is_hidden(entry[0])]
    if format != "auto":
        return _of_format(folder, shown, format)
    known = [(format_of(name), (name, place)) for name, place in shown]
    formats = Counter(kind for kind, _ in known if kind is not None)
    if len(formats) > 1:
        del formats["text"]
    if len(formats) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(formats.items()))
        raise UserError(
            f"dataset: {folder} holds files of several formats ({counts}). Set format to "
            f"one of them, or name the files: path={folder}/*.SUFFIX."
        )
    kept = [entry for kind, entry in known if kind in formats]
    return _of_one_split(folder, kept or _none(folder))


def _of_format(folder: str, found: Sequence[Found], format: str) -> list[Found]:
    """The files whose names say this format, or all where no name says any."""
    kinds = [format_of(name) for name, _ in found]
    if not any(kinds):
        return _of_one_split(folder, list(found) or _none(folder, format))
    kept = [entry for kind, entry in zip(kinds, found, strict=True) if kind == format]
    return _of_one_split(folder, kept or _none(folder, format))


def _none(folder: str, format: str = "") -> list[Found]:
    """Stop at a folder without data."""
    kind = f"{format} files" if format else "data files"
    raise UserError(
        f"dataset: {folder} holds no {kind}. Folders inside it are not looked into unless you say "
        f"so: path={folder.rstrip('/')}/**/*.jsonl, say."
    )


def _of_one_split(folder: str, found: list[Found]) -> list[Found]:
    """The files, unless their names say that some of them are to be held out of training."""
    stems = {name: PurePosixPath(name).name.lower() for name, _ in found}
    training = [name for name, stem in stems.items() if _TRAINING.search(stem)]
    held_out = [name for name, stem in stems.items() if _HELD_OUT.search(stem)]
    if training and held_out:
        raise UserError(
            f"dataset: {folder} holds files of several splits by their names, such as "
            f"{training[0]} and {held_out[0]}. Name those to train on in path (a file, a "
            "glob or a list) and the others in dataset.eval.path."
        )
    return found


def _is_hidden(name: str) -> bool:
    """Whether a file is hidden or there for people."""
    last = PurePosixPath(name).name
    return last.startswith((".", "_")) or bool(_PAPERS.match(last))
