"""A JSONL file of replies grows row by row, and the same command goes on with it."""

import json
from pathlib import Path
from typing import Any

from luthier.errors import UserError
from luthier.storage.atomic import write_json
from luthier.storage.typed_files import load_json
from luthier.storage.write_errors import explain_write_errors

RECORD = ".made.json"
"""The ending of the record's name, behind the name of the file."""


class AnswerFile:
    """A file with one line for each answered row, in the order of the rows.

    Beside it lies a record of what made it, so that only the same command goes on with it.
    """

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        """Open or start the file; `origin` is all that decides the replies, as JSON values.

        Raises UserError for a file that another command made.
        """
        # Through JSON and back, so that it equals what is read: tuples become lists, for one.
        self.path, self._origin = path, json.loads(json.dumps(origin))
        self.record = path.with_name(path.name + RECORD)
        with explain_write_errors(path, "-o"):
            self.done = self._take()
        """Rows that are answered already."""

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows, whole lines at once."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # A model may write half of a surrogate pair, which UTF-8 has no bytes for.
        with explain_write_errors(self.path, "-o"), self.path.open("ab") as file:
            file.write(lines.encode("utf-8", "backslashreplace"))

    def _take(self) -> int:
        """Start the file, or find how far it is; the rest of a line that broke off goes away."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The record first: a file without one is taken for somebody else's.
            write_json(self.record, self._origin)
            self.path.touch()
            return 0
        self._check()
        text = self.path.read_bytes()
        # A killed process leaves half of its last line; that row is answered again.
        complete_lines = text[: text.rfind(b"\n") + 1]
        if len(complete_lines) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(complete_lines))
        return complete_lines.count(b"\n")

    def _check(self) -> None:
        if not self.path.is_file():
            raise UserError(f"-o {self.path}: this is a folder. Name a file.")
        # An empty file has nothing to lose: any command may begin in it.
        if not self.path.stat().st_size:
            write_json(self.record, self._origin)
            return
        old = load_json(self.record, dict[str, Any], "Choose another name for the replies.")
        if old is None:
            raise UserError(
                f"-o {self.path}: this file is there and not made by luthier generate (there is no "
                f"{self.record.name} beside it). Choose another name; nothing is overwritten."
            )
        # Replies of two models or settings in one file could not be told apart later.
        differing = sorted(
            key for key in {*old, *self._origin} if old.get(key) != self._origin.get(key)
        )
        if differing:
            lines = [f"  {key}: {_short(old.get(key))} -> {_short(self._origin.get(key))}"
                     for key in differing]  # fmt: skip
            raise UserError(
                f"-o {self.path}: this file was begun with other settings:\n"
                + "\n".join(lines)
                + "\nChoose another name, or remove the file to begin anew."
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
