"""What the system says becomes words with the place and advice; other errors pass."""

import errno
from pathlib import Path

import pytest

from luthier.errors import UserError
from luthier.storage.write_errors import describe_write_error, explain_write_errors

ERRORS = [
    (OSError(errno.ENOSPC, "no", "/run/run.json"), "output_dir: /run/run.json cannot be written"),
    (OSError(errno.ENOSPC, "no"), "output_dir: /run cannot be written: the disk is full"),
    (OSError(errno.EDQUOT, "no"), "your quota on this disk is used up"),
    (PermissionError(errno.EACCES, "no", "/run"), "permission is missing (Permission denied)"),
    (OSError(errno.EROFS, "no", "/"), "output_dir: / cannot be written: the file system is read"),
    (OSError(errno.ENAMETOOLONG, "no", "/run/x"), "a name in this path is too long"),
    (FileNotFoundError(errno.ENOENT, "no", "/rows"), "/rows cannot be read or written: there is"),
    (OSError(errno.EIO, "no", b"/run/bytes"), "/run/bytes cannot be written: the disk does not"),
    (OSError(errno.EACCES, "no", "/.run.new/x"), "output_dir: /.run.new/x cannot be written"),
    (RuntimeError("SafetensorError: No space left on device"), "the disk is full"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "text"), ERRORS, ids=lambda value: str(value)[:40])
def test_an_error_of_a_file_is_explained(error, text):
    mistake = describe_write_error(error, Path("/run"), "output_dir")
    assert text in str(mistake)
    assert str(mistake).endswith("and run the same command again.")


OTHERS = [
    OSError("a model that is not on the hub"), ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError(errno.EACCES, "no file is named"), ValueError("wrong"), RuntimeError("a bug"),
    BrokenPipeError(errno.EPIPE, "gone"), OSError(errno.EIO, "a socket", 5),
]  # fmt: skip


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, explain_write_errors(tmp_path, "output_dir"):
        raise error
    assert raised.value is error


def test_a_mistake_of_the_user_passes_as_it_is(tmp_path):
    with pytest.raises(UserError, match=r"^mine$"), explain_write_errors(tmp_path, "--out"):
        raise UserError("mine")


def test_without_a_place_only_errors_that_name_one_are_explained():
    assert describe_write_error(OSError(errno.ENOSPC, "no"), None, "") is None
    named = describe_write_error(OSError(errno.ENOSPC, "no", "/x"), None, "")
    assert "/x cannot be read or written: the disk is full" in str(named)
