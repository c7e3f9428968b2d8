"""What can be wrong with a row or with a template, in words that name the row."""

from __future__ import annotations

from luthier.errors import UserError


class ChatError(UserError):
    """A conversation that cannot become tokens, or a template that cannot be used.

    `reason` is one word for counting, `row` the row's number in a batch, `message` the message's
    number in the row, `field` the field of that message; each is None where it does not apply.
    """

    def __init__(
        self,
        text: str,
        *,
        reason: str,
        row: int | None = None,
        message: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(text)
        self.text = text
        self.reason = reason
        self.row = row
        self.message = message
        self.field = field

    def __str__(self) -> str:
        where = [f"row {self.row}"] if self.row is not None else []
        if self.message is not None:
            where.append(f"message {self.message}")
        if self.field is not None:
            where.append(f"field `{self.field}`")
        return f"{', '.join(where)}: {self.text}" if where else self.text

    @property
    def words(self) -> str:
        """The error without the row, for one that says itself which row it is."""
        return str(self.in_row(None))

    def in_row(self, row: int | None) -> ChatError:
        """The same error with the row's number."""
        return ChatError(
            self.text, reason=self.reason, row=row, message=self.message, field=self.field
        )
