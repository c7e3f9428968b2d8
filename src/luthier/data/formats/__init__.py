"""Row formats: what the columns of a row mean, and the example that is made of it."""

from luthier.data.formats.conversations import Example
from luthier.data.formats.detect import RowFormat, detect_format

__all__ = ["Example", "RowFormat", "detect_format"]
