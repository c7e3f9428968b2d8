"""Row formats: what a row's columns mean, and the example that is made of them."""

from luthier.data.formats.detect import detect_format
from luthier.data.formats.match import Example, RowFormat

__all__ = ["Example", "RowFormat", "detect_format"]
