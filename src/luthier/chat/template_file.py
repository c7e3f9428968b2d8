"""The text of a chat template that a setting holds or names as a file, which needs no Jinja."""

from pathlib import Path
from stat import S_ISREG

from luthier.chat.types import ChatError

MAX_TEMPLATE_CHARS = 1_000_000
"""Characters of a template; the longest on the hub have 50,000."""


def read_template(template: str) -> str:
    """Return a template given as text or as the path of a file, as text."""
    if "{" in template or "\n" in template:
        return template
    try:
        return _read_template_file(Path(template).expanduser())
    except (OSError, RuntimeError, ValueError) as error:  # an unknown ~user, a null character
        why = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise ChatError(
            f"the chat template `{template}` is neither Jinja text nor a file that can be read "
            f"({why})",
            reason="no template",
        ) from None


def _read_template_file(path: Path) -> str:
    """Return the text of a file; raises ValueError for what cannot be a template's."""
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise ValueError("it is a folder, a pipe or a device")
    with path.open("rb") as file:
        data = file.read(MAX_TEMPLATE_CHARS + 1)
    if len(data) > MAX_TEMPLATE_CHARS:
        raise ValueError(f"it is longer than {MAX_TEMPLATE_CHARS:,} bytes")
    # The files of /proc and /sys say that they are empty, or a page long, whatever they hold.
    if len(data) != status.st_size:
        raise ValueError("it is no ordinary file")
    text = data.decode("utf-8")
    if "{{" not in text and "{%" not in text:
        raise ValueError("it has no Jinja in it, neither {{ nor {%")
    # As Python reads a file as text.
    return text.replace("\r\n", "\n").replace("\r", "\n")
