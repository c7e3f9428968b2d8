"""The optimizer that `trainer.optimizer` chooses: Muon, the user's own, and groups of weights.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) is for the matrices of hidden
layers. Embeddings, output layers and vectors train with AdamW there, and so they do here. Updates
are scaled as in Moonlight (https://arxiv.org/abs/2502.16982), so that both share one learning rate
and one weight decay.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from luthier.config.code_settings import CodeEntry, read_code_entries
from luthier.config.schema import OptimizerConfig
from luthier.errors import UserError
from luthier.model.model_class import find_text_modules, is_within
from luthier.model.trainable import match_parameters
from luthier.python_code import describe_exception, load_python_object

_KEY = "trainer.optimizer"


def create_configured_optimizer(
    trainer: Any, model: Any, settings: OptimizerConfig, create_default: Callable[[], Any]
) -> Any:
    """Return the optimizer of a trainer as `trainer.optimizer` says.

    `model` is the one whose weights it changes, and `create_default` makes that of
    `trainer.args.optim`. Raises UserError for a function that fails or leaves weights out, and for
    patterns that find nothing.
    """
    for entry in read_code_entries(settings.name):
        return _call_optimizer_function(trainer, model, entry)
    optimizer = _build_muon(trainer, model) if settings.name == "muon" else create_default()
    if settings.groups:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = split_by_patterns(optimizer.param_groups, trained, settings.groups)
        optimizer.param_groups[:] = groups
    return optimizer


def split_by_patterns(
    groups: Iterable[Mapping[str, Any]],
    trained: Mapping[str, Any],
    rules: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return an optimizer's groups with the weights apart that have rates of their own.

    `trained` are the weights that train, by name, and `rules` the entries of
    `trainer.optimizer.groups`: the first whose pattern is found in a name holds. Groups at the
    common rate come first, and each keeps whatever else it has. Raises UserError for a pattern that
    finds no weight that trains, or none that is left by the rules before it.
    """
    rule_of: dict[int, int] = {}
    for number, rule in enumerate(rules):
        key = f"{_KEY}.groups[{number}].match"
        names = match_parameters(key, [rule["match"]], dict(trained), "parameter that trains")
        new = {id(trained[name]) for name in names} - rule_of.keys()
        if not new:
            raise UserError(
                f"{key}: {rule['match']!r} matches only parameters that entries before it match, "
                "and the first one holds. Put it before them, or remove it."
            )
        rule_of |= dict.fromkeys(new, number)
    split: list[dict[str, Any]] = []
    for number in (None, *range(len(rules))):
        changes = {} if number is None else _group_changes(rules[number])
        for group in groups:
            weights = [p for p in group["params"] if rule_of.get(id(p)) == number]
            if weights:
                split.append({**group, **changes, "params": weights})
    return split


def _group_changes(rule: Mapping[str, Any]) -> dict[str, Any]:
    values = {"lr": rule.get("learning_rate"), "weight_decay": rule.get("weight_decay")}
    return {name: value for name, value in values.items() if value is not None}


# Muon for hidden matrices, AdamW for all else.


class MuonWithAdamW(Optimizer):
    """Muon for some groups of weights and AdamW for the others, as one optimizer.

    Schedulers, checkpoints and accelerate see one list of groups and one state.
    """

    def __init__(
        self, matrix_groups: Sequence[dict[str, Any]], other_groups: Sequence[dict[str, Any]]
    ) -> None:
        """Take groups of matrices for Muon, and of other weights for AdamW; the latter may be none.

        Each has `params`, and may have what its optimizer takes, such as `lr`.
        """
        self._optimizers: dict[bool, Optimizer] = {}
        self._optimizers[True] = Muon(matrix_groups, adjust_lr_fn="match_rms_adamw")
        if other_groups:
            # Fused, it makes no copies of the tables of embeddings.
            self._optimizers[False] = AdamW(other_groups, fused=True)
        groups = [
            group | {"uses_muon": uses_muon}
            for uses_muon, optimizer in self._optimizers.items()
            for group in optimizer.param_groups
        ]
        super().__init__(groups, {})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> Any:
        """Take one step with both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for uses_muon, optimizer in self._optimizers.items():
            # Schedulers and checkpoints change and replace the groups and the state.
            groups = [group for group in self.param_groups if group["uses_muon"] == uses_muon]
            optimizer.param_groups, optimizer.state = groups, self.state
            optimizer.step()
        return loss


def _build_muon(trainer: Any, model: Any) -> MuonWithAdamW:
    """Return Muon for the hidden matrices of a model, and AdamW for the rest, and say so."""
    args = trainer.args
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = find_hidden_matrices(model)
    if not matrices:
        raise UserError(
            f"{_KEY}.name=muon: it trains the matrices of hidden layers, and none of them trains "
            "here. Use another optimizer, or let them train (model.train, model.freeze)."
        )
    decayed = {*trainer.get_decay_parameter_names(model)}
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, weight in trained.items():
        if name not in matrices:
            groups[name in decayed].append(weight)
    adamw = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    others = [
        {"params": weights, "weight_decay": args.weight_decay if decays else 0.0, **adamw}
        for decays, weights in groups.items()
        if weights
    ]
    hidden = {"params": [trained[name] for name in matrices], "weight_decay": args.weight_decay}
    for group in (hidden, *others):
        group["lr"] = args.learning_rate
    if trainer.accelerator.is_main_process:
        from luthier.train import console

        total = sum(weight.numel() for weight in trained.values())
        share = sum(trained[name].numel() for name in matrices) / total
        count = len(trained) - len(matrices)
        console.print_line(
            f"optimizer muon trains {len(matrices)} matrices of hidden layers ({share:.0%} of the "
            f"weights that train), AdamW the other {count} weights"
        )
    return MuonWithAdamW([hidden], others)


def find_hidden_matrices(model: Any) -> list[str]:
    """Return the names of the matrices of hidden layers that train.

    Tables of embeddings and output layers are none, nor are weights of another number of
    dimensions, such as those that hold all experts of a layer.
    """
    tables = {
        id(weight)
        for layer in model.modules()
        if isinstance(layer, torch.nn.Embedding)
        for weight in layer.parameters()
    }
    heads = find_text_modules(model).heads
    return [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad
        and weight.ndim == 2
        and id(weight) not in tables
        and not any(is_within(name, head) for head in heads)
    ]


# The user's own.


def _call_optimizer_function(trainer: Any, model: Any, entry: CodeEntry) -> Optimizer:
    """Return the optimizer that a function of the user's gives; of groups, with `args.optim`."""
    path, key = entry.path, f"{_KEY}.name"
    function = load_python_object(path, entry.arguments, positional=("model", "args"))
    try:
        returned = function(model, trainer.args, **entry.arguments)
        if isinstance(returned, list | tuple) and all(isinstance(g, Mapping) for g in returned):
            made_class, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
            returned = made_class([dict(group) for group in returned], **settings)
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"{key}: {path} failed: {describe_exception(error)}") from error
    if not isinstance(returned, Optimizer):
        raise UserError(
            f"{key}: {path} returned a {type(returned).__name__}. Return a torch.optim.Optimizer, "
            "or a list of parameter groups such as [{'params': [...], 'lr': 1e-4}]."
        )
    _check_parameters(model, returned, f"{key}: {path}")
    return returned


def _check_parameters(model: Any, optimizer: Optimizer, where: str) -> None:
    """Raise UserError where an optimizer does not have exactly the weights that train."""
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if left_out := [name for key, name in trained.items() if key not in chosen]:
        raise UserError(
            f"{where} leaves out {len(left_out)} of {len(trained)} parameters that are to train, "
            f"such as {left_out[0]}. Put them into a group, or freeze them with model.freeze."
        )
    if chosen - trained.keys():
        raise UserError(
            f"{where} has {len(chosen - trained.keys())} parameters that are none of the model's, "
            "or do not train. Take those of model.parameters() with requires_grad."
        )
