"""From a row to an example: the shape is found from the columns or named; see docs/shapes.md."""

from luthier.data.formats.detect import find_shape
from luthier.data.formats.match import Example, Shape

__all__ = ["Example", "Shape", "find_shape"]
