"""From the user's files and hub datasets to token rows; see docs/data.md."""

from luthier.data.check import check_files
from luthier.data.formats import Conversation
from luthier.data.prepare import Counts, Prepared, prepare

__all__ = ["Conversation", "Counts", "Prepared", "check_files", "prepare"]
