"""The one error type that a user's mistake raises, and how it is shown: in words, once."""

import json
import os
import sys
import time
from pathlib import Path

_SECONDS_TO_SPEAK = 5.0
"""How long the other processes wait, so that the first one speaks before all are ended."""


class UserError(Exception):
    """A mistake that the user can mend; the text says what is wrong, where, and what to do.

    Entry points show it with `report` and exit with `exit_code`.
    """

    exit_code = 2


def report(error: UserError) -> int:
    """Print a mistake once for all processes of a launch, and return the exit code.

    torch's launcher stops all processes when one fails, and closes its own report with the text in
    the error file of that one: so each process leaves the text there, and the first one goes first.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is not None:
        note = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(error_file).write_text(json.dumps({"message": note}), encoding="utf-8")
    if error_file is not None and os.environ.get("RANK", "0") != "0":
        time.sleep(_SECONDS_TO_SPEAK)
    print(error, file=sys.stderr, flush=True)
    return error.exit_code
