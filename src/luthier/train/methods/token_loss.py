"""`trainer.loss`: a loss of each trained token, by a function of the user's own."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from luthier.config.code_settings import read_code_entries
from luthier.errors import UserError, format_value
from luthier.python_code import describe_exception, load_python_object, select_arguments

_KEY = "trainer.loss"
_OWN_NAMES = ("log_probs", "labels")
"""What is passed by its position; a column of such a name is not passed."""


class TokenLoss:
    """Calls the function of `trainer.loss` on the trained tokens of a batch.

    It gets `log_probs` (float32) and `labels` (int64) of shape (trained tokens,), and by their
    names those columns of the rows that it takes, and the arguments of the config. A column
    has one entry for each of these tokens, that of the token's own row: a tensor where it holds
    numbers in every row of the batch, else a list. So packed rows, padding and the number of
    processes change nothing of what it sees of a token.
    """

    def __init__(self, setting: Any) -> None:
        """Take the value of `trainer.loss`; raises UserError where there is no such function."""
        (entry,) = read_code_entries(setting)
        self._path, self._arguments = entry
        self._function: Callable[..., Any] = load_python_object(self._path)
        # How it is called with columns alone, behind what is passed by its position.
        self._with_columns = partial(self._function, None, None)
        try:
            inspect.signature(self._with_columns)
        except ValueError:
            raise UserError(
                f"{_KEY}: {self._path} takes {inspect.signature(self._function)}, and is called "
                "with log_probs and labels, and with the columns that it names behind them."
            ) from None
        self._is_tried = False

    def __call__(
        self,
        log_probs: torch.Tensor,
        labels: torch.Tensor,
        documents: torch.Tensor,
        columns: Sequence[Mapping[str, Any]],
    ) -> torch.Tensor:
        """Return the loss of each token, float32 of shape (trained tokens,).

        `documents` (int64) says which of `columns` are those of a token's row. Raises UserError for
        a function that fails or returns something else, and on the first batch for losses that are
        not finite.
        """
        numbers = documents.tolist()
        available = {
            name: _per_token([row.get(name) for row in columns], documents, numbers)
            for name in dict.fromkeys(name for row in columns for name in row)
            if name not in _OWN_NAMES
        }
        available |= self._arguments
        where = f"{_KEY}: {self._path}"
        arguments = select_arguments(self._with_columns, available, where)
        try:
            losses = self._function(log_probs, labels, **arguments)
        except Exception as error:  # the user's function may raise anything
            raise UserError(f"{_KEY}: {self._path} failed: {describe_exception(error)}") from error
        self._check(losses, log_probs)
        return losses.float()

    def _check(self, losses: Any, log_probs: torch.Tensor) -> None:
        """Raise UserError for what is no loss of each token."""
        where, form = f"{_KEY}: {self._path}", "Return one for each token, such as -log_probs"
        if not isinstance(losses, torch.Tensor):
            raise UserError(f"{where} returned a {type(losses).__name__}. {form}.")
        if losses.shape != log_probs.shape:
            shapes = f"of shape {_shape(losses)} for {len(log_probs)} tokens"
            mean = (
                "; luthier takes the mean over all trained tokens of a step"
                if losses.numel() == 1
                else ""
            )
            raise UserError(f"{where} returned losses {shapes}. {form}{mean}.")
        if log_probs.requires_grad and not losses.requires_grad:
            raise UserError(
                f"{where} returned losses without a gradient, so nothing would train. Compute them "
                "from log_probs with torch, without detach() or item()."
            )
        if self._is_tried:
            return
        self._is_tried = True
        broken = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        if broken:
            value = format_value(losses[broken[0]].item())
            at = f"{log_probs[broken[0]].item():.4g}"
            raise UserError(
                f"{where} returned {value} for {len(broken)} of the {len(losses)} tokens of the "
                f"first batch, such as one with a log-probability of {at}. Look for logarithms and "
                "roots of 0, and divisions by it."
            )


def _per_token(values: list[Any], documents: torch.Tensor, numbers: list[int]) -> Any:
    """Return the entries of a column, one for each token: a tensor of numbers, or a list."""
    if all(isinstance(value, int | float) for value in values):
        # Whole numbers stay whole, and others are float32, as the log-probabilities are.
        return torch.tensor(values, device=documents.device)[documents]
    return [values[number] for number in numbers]


def _shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
