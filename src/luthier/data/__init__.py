"""From the user's files and hub datasets to token rows; see docs/data.md.

`luthier.data.prepare` makes the token rows; it needs numpy and pyarrow, so it is imported late.
"""

from luthier.data.formats import Example
from luthier.data.quick_check import check_sources

__all__ = ["Example", "check_sources"]
