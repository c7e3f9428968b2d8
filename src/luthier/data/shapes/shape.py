"""A shape that was found: it reads rows."""

from dataclasses import dataclass
from typing import Any

from luthier.data.rows import Row, RowError
from luthier.data.shapes.columns import Columns, MissingColumn
from luthier.data.shapes.conversation import Example
from luthier.data.shapes.fitting import Group, fits, strongest
from luthier.data.shapes.forms import FORMS, VERSION, Form, Kind

__all__ = ["Example", "Shape"]


@dataclass(frozen=True)
class Shape:
    """How the rows of a source are read."""

    form: Form
    columns: Columns
    unused: tuple[str, ...] = ()
    """Columns of the source that are not read."""

    @property
    def name(self) -> str:
        """What `dataset.shape` calls it, such as `sharegpt`."""
        return self.form.shape

    @property
    def kind(self) -> Kind:
        """What its examples are, such as `conversation`."""
        return self.form.kind

    def read(self, row: Row) -> Example:
        """One row as an example; RowError says what is wrong with it."""
        try:
            return self.form.read(row, self.columns)
        except MissingColumn as error:
            raise RowError(f"{error}{self._other(row)}") from None

    def settings(self) -> dict[str, Any]:
        """Everything that decides the examples, for JSON."""
        return {
            "shape": self.name,
            "columns": dict(sorted(self.columns.names.items())),
            "system": self.columns.system,
            "version": VERSION,
        }

    def _other(self, row: Row) -> str:
        """The words for a row whose columns are those of another shape."""
        found = strongest(fits(Group(tuple(row.fields), [row]), FORMS, {}))
        others = [fit.form.shape for fit in found if fit.form.shape != self.name]
        if not others:
            return ""
        return f"; these are the columns of {others[0]}, and the source is read as {self.name}"
