"""The errors of the training package that are the caller's fault."""

from __future__ import annotations


class InvalidValue(ValueError):
    """A batch, parameter or setting that cannot be used; nothing has been changed when it is
    raised.

    `tensor`, `row` (index in the whole batch), `column`, `expected` and `actual` say where and
    what, when they are known.
    """

    def __init__(
        self,
        message: str,
        *,
        tensor: str | None = None,
        row: int | None = None,
        column: int | None = None,
        expected: str | None = None,
        actual: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.tensor = tensor
        self.row = row
        self.column = column
        self.expected = expected
        self.actual = actual

    def details(self) -> dict[str, str | int]:
        """What is known about the place of the error, without the empty fields."""
        names = ("tensor", "row", "column", "expected", "actual")
        fields = {name: getattr(self, name) for name in names}
        return {name: value for name, value in fields.items() if value is not None}


class DoesNotFit(InvalidValue):
    """Memory ran out on some rank, under `row` alone if it is known; nothing was changed."""
