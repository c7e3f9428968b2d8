"""From the user's files and hub datasets to token rows; see docs/data.md.

`luthier.data.prepare` makes the token rows; it needs numpy and pyarrow, so it is imported late.
"""

from luthier.data.examples import DatasetSources, check_sources
from luthier.data.formats import Example

__all__ = ["DatasetSources", "Example", "check_sources"]
