"""The output layer and the log-probabilities of its tokens in one function, for CPUs.

TRL's fused head (`trl.trainer.utils.add_fused_lm_head`) never holds all logits: it projects some
tokens at a time, and projects them again in the backward. On CUDA Triton kernels do that well. On a
CPU, TRL 1.16 scores every position, also those that do not train, makes half a dozen copies of each
tile of logits, and takes a third of a step of a small model. `HeadLogProbs` takes its place there.
"""

import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.autograd.function import once_differentiable
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What the function returns of each token; TRL's `FusedCausalLMOutput` says what each is."""
TILE_NUMBERS = 2**24
"""Logits in memory at once: 64 MiB in float32, which are 341 tokens of 49,152 logits."""
LEAST_ROWS = 32
"""Tokens that are projected at once, however large the vocabulary is."""
_BLOCK_NUMBERS = 2**18
"""Logits that a CPU works on at once, so few that they stay in a core's cache."""
_SLICE = 2**15
"""Rows of the output weight that are converted at once where products have another format."""
_DEVICES = ("cpu", "mps")


class LogitScaling(NamedTuple):
    """What a model does to the products of hidden states and output weight to get its logits."""

    factor: float = 1.0
    """What products are multiplied by, such as `logit_scale` of Cohere's models."""
    softcap: float | None = None
    """The bound of the logits, which comes after the factor; None without one (Gemma 2 has one)."""
    inverse_temperature: float = 1.0
    """What the logits are multiplied by last."""

    def apply_(self, products: Tensor) -> Tensor | None:
        """Turn products into logits, in place; return the derivative of the softcap, if any."""
        slope = None
        if self.factor != 1.0:
            products.mul_(self.factor)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_()
            slope = products.square().neg_().add_(1)
            products.mul_(self.softcap)
        if self.inverse_temperature != 1.0:
            products.mul_(self.inverse_temperature)
        return slope

    @property
    def slope(self) -> float:
        """The derivative of the logits by the products, without that of the softcap."""
        return self.factor * self.inverse_temperature


class HeadLogProbs(torch.autograd.Function):
    """The log-probability of each target, and more about its distribution where that is asked for.

    The gradient of a log-probability by its hidden state does not depend on what becomes of the
    log-probability. So the forward takes it from the logits at hand, and the backward scales it.
    Where the output layer trains too, or the entropy has a gradient, the backward projects again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: "TiledHead",
        outputs: tuple[str, ...],
        has_gradient: bool,
    ) -> tuple[Tensor | None, ...]:
        """Return what `OUTPUTS` names, each of shape (tokens,); None for what `outputs` leaves out.

        `hidden` is (tokens, width), `weight` (vocabulary, width), `targets` (tokens,). Numbers are
        float32, or float64 with such inputs. `has_gradient`: whether hidden states get a gradient.
        """
        ctx.set_materialize_grads(False)
        is_frozen = not any(ctx.needs_input_grad[1:3])
        gradient = head.zeros(hidden.shape) if has_gradient and is_frozen else None
        results = {name: head.zeros(targets.shape) for name in ("sum_exp", *outputs)}
        for rows, tile in head.project(hidden, weight, bias):
            for block, logits in head.split(rows, tile):
                slope = head.scaling.apply_(logits)
                values = head.fold_(logits, targets[block], outputs)
                for name, result in results.items():
                    result[block] = values[name]
                if gradient is not None:
                    _subtract_targets_(logits, targets[block], values["sum_exp"], slope)
            if gradient is not None:
                head.add_product_(gradient[rows], tile, weight)
                gradient[rows] *= -head.scaling.slope / results["sum_exp"][rows, None]
        if "is_top1" in results:
            results["is_top1"] = results["is_top1"].bool()
        named = tuple(results.get(name) for name in OUTPUTS)
        ctx.mark_non_differentiable(*(x for x in named[2:] if x is not None))
        ctx.save_for_backward(hidden, weight, bias, targets, gradient, named[1])
        ctx.head = head
        return named

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight and bias."""
        hidden, weight, bias, _targets, gradient, _entropy = ctx.saved_tensors
        if gradient is None or grad_entropy is not None:
            with maybe_gather_lm_head_ctx(weight, bias), ctx.head.exact():
                grads = _project_again(ctx, grad_log_probs, grad_entropy)
        elif grad_log_probs is not None:
            grads = [gradient * grad_log_probs[:, None]]
        else:
            grads = []
        inputs = (hidden, weight, bias)
        typed = [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=False)]
        return (*typed, *[None] * (len(ctx.needs_input_grad) - len(typed)))


def _project_again(
    ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None
) -> list[Tensor | None]:
    """Return the gradients of hidden states, weight and bias; None for what has none."""
    hidden, weight, bias, targets, _, entropy = ctx.saved_tensors
    head: TiledHead = ctx.head
    inputs = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
    grads = [head.zeros(x.shape) if needs else None for x, needs in inputs]
    grad_hidden, grad_weight, grad_bias = grads
    # What the lines of a tile are still to be multiplied by, which is cheaper in the products.
    scales = head.zeros(targets.shape) if grad_log_probs is None else grad_log_probs.clone()
    for rows, tile in head.project(hidden, weight, bias):
        for block, logits in head.split(rows, tile):
            slope = head.scaling.apply_(logits)
            sum_exp = head.fold_(logits, targets[block], ())["sum_exp"]
            at_target = sum_exp
            if grad_entropy is not None:
                # The derivative of the entropy H by the logit of token j is -p_j (log p_j + H).
                columns = (entropy[block] - sum_exp.log(), grad_entropy[block], scales[block])
                shift, factor, offset = (column[:, None] for column in columns)
                logits.mul_(head.scratch[: len(logits)].add_(shift).mul_(factor).add_(offset))
                at_target = sum_exp * scales[block]
                scales[block] = 1.0
            _subtract_targets_(logits, targets[block], at_target, slope)
            scales[block] *= -head.scaling.slope / sum_exp
        if grad_hidden is not None:
            head.add_product_(grad_hidden[rows], tile, weight)
            grad_hidden[rows] *= scales[rows, None]
        if grad_weight is not None:
            grad_weight.addmm_(tile.T, head.rounded(hidden[rows]) * scales[rows, None])
        if grad_bias is not None:
            grad_bias.addmv_(tile.T, scales[rows])
    return grads


def _subtract_targets_(exps: Tensor, targets: Tensor, sums: Tensor, slope: Tensor | None) -> None:
    """Turn exponentials of logits into minus the gradient of log-probabilities, times their sum."""
    exps.scatter_add_(-1, targets[:, None], -sums[:, None])
    if slope is not None:
        exps.mul_(slope)


class TiledHead:
    """Projects tokens tile by tile, and folds the logits of a tile into numbers of its tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, scaling: LogitScaling) -> None:
        """Take the tensors for their device, shapes and formats alone."""
        self.scaling = scaling
        device, self._product_dtype = hidden.device, hidden.dtype
        if torch.is_autocast_enabled(device.type):
            self._product_dtype = torch.get_autocast_dtype(device.type)
        self._dtype = torch.promote_types(self._product_dtype, torch.float32)
        self._device, self._vocabulary = device, weight.shape[0]
        most = max(TILE_NUMBERS // self._vocabulary, LEAST_ROWS)
        self._rows = min(most, max(len(hidden), 1))
        block = _BLOCK_NUMBERS // self._vocabulary if device.type == "cpu" else self._rows
        self._block = min(max(block, 1), self._rows)
        self.scratch = torch.empty(0)
        """After `fold_`, unless it computed the entropy: the logits less the highest of each."""

    def exact(self) -> Any:
        """Return a context in which autocast rounds no product: formats are chosen here."""
        return torch.autocast(self._device.type, enabled=False)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros in the format in which sums are taken, float32 or float64."""
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def rounded(self, values: Tensor) -> Tensor:
        """Return values as products take them, in the format of sums."""
        return values.to(self._product_dtype).to(self._dtype)

    def project(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of tokens, each with its products (tokens, vocabulary).

        The next products overwrite them.
        """
        buffer = torch.empty(self._rows, self._vocabulary, dtype=self._dtype, device=self._device)
        self.scratch = buffer.new_empty(self._block, self._vocabulary)
        try:
            for start in range(0, len(hidden), self._rows):
                rows = slice(start, min(start + self._rows, len(hidden)))
                tile = buffer[: rows.stop - start]
                self._project_into(tile, hidden[rows].to(self._product_dtype), weight)
                if bias is not None:
                    tile += self.rounded(bias)
                yield rows, tile
        finally:
            self.scratch = torch.empty(0)

    def _project_into(self, tile: Tensor, inputs: Tensor, weight: Tensor) -> None:
        if weight.dtype == self._product_dtype == self._dtype:
            torch.mm(inputs, weight.T, out=tile)
            return
        for columns in self._weight_slices():
            tile[:, columns] = inputs @ weight[columns].to(self._product_dtype).T

    def split(self, rows: slice, tile: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of tokens that are worked on at once, each with its part of a tile."""
        for start in range(rows.start, rows.stop, self._block):
            stop = min(start + self._block, rows.stop)
            yield slice(start, stop), tile[start - rows.start : stop - rows.start]

    def fold_(self, logits: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Return `sum_exp` and what `outputs` names, and turn logits into their exponentials.

        The exponentials are those of logits less the highest of each token, and `sum_exp` is the
        sum of them.
        """
        values = {}
        highest = logits.amax(-1)
        if "is_top1" in outputs:
            values["is_top1"] = logits.argmax(-1) == targets
        if "mean_logits" in outputs:
            values["mean_logits"] = logits.mean(-1)
        target_logits = logits.gather(-1, targets[:, None])[:, 0]
        shifted = torch.sub(logits, highest[:, None], out=self.scratch[: len(logits)])
        exps = torch.exp(shifted, out=logits)
        values["sum_exp"] = sums = exps.sum(-1)
        log_sums = sums.log()
        values["log_probs"] = target_logits - highest - log_sums
        if "entropy" in outputs:
            values["entropy"] = log_sums - shifted.mul_(exps).sum(-1) / sums
        if "log_sum_sq_probs" in outputs:
            values["log_sum_sq_probs"] = exps.square().sum(-1).log() - 2 * log_sums
        return values

    def add_product_(self, sums: Tensor, tile: Tensor, weight: Tensor) -> None:
        """Add the product of a tile (tokens, vocabulary) and the weight to sums (tokens, width)."""
        if weight.dtype == self._product_dtype == self._dtype:
            sums.addmm_(tile, weight)
            return
        for columns in self._weight_slices():
            sums.addmm_(tile[:, columns], self.rounded(weight[columns]))

    def _weight_slices(self) -> Iterator[slice]:
        for start in range(0, self._vocabulary, _SLICE):
            yield slice(start, min(start + _SLICE, self._vocabulary))


class _HeadFunction:
    """Stands where TRL's function stands, and takes what that takes."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        factor: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> Any:
        """Return what `OUTPUTS` names: by `HeadLogProbs` on a CPU, by TRL's function elsewhere."""
        if hidden.device.type not in _DEVICES:
            shared = (hidden, weight, bias, targets, temperature, chunk_size, softcap, factor)
            return ChunkedLogProbFunction.apply(*shared, outputs)
        scaling = LogitScaling(factor, softcap, 1 / temperature)
        return _apply(hidden, weight, bias, targets, scaling, outputs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scaling: LogitScaling,
    outputs: tuple[str, ...],
) -> Any:
    head = TiledHead(hidden, weight, scaling)
    has_gradient = torch.is_grad_enabled() and hidden.requires_grad
    names = tuple(dict.fromkeys(("log_probs", *outputs)))
    with head.exact():
        return HeadLogProbs.apply(hidden, weight, bias, targets, head, names, has_gradient)


def use_head_log_probs(model: Any, compact: bool = True) -> None:
    """Have the fused head that TRL gave to a model compute with `HeadLogProbs` on a CPU.

    The model may have an adapter; one without that head stays as it is. `compact`: whether only
    tokens with a label are projected, whose number is not known where tensors have no content.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    forward = vars(model).get("forward")
    function = getattr(forward, "__func__", None)
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    if function is None or "_ChunkedLogProbFunction" not in names:
        return
    # TRL 1.16 has no setting for it: the function is a name of its module, and so is the question
    # whether to leave out tokens without a label. A copy of TRL's forward looks both up here.
    uses_triton = function.__globals__["_use_triton"]
    replaced = {
        "_ChunkedLogProbFunction": _HeadFunction,
        "_use_triton": lambda device: (compact and device.type in _DEVICES) or uses_triton(device),
    }
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    vars(copy).update(vars(function))
    model.forward = types.MethodType(copy, model)
