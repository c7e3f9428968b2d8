"""What the check found, as plain values for machines."""

from dataclasses import asdict
from typing import Any

from luthier.inspect.account import Account
from luthier.inspect.composition import how_held_out
from luthier.inspect.lengths import histogram, quantiles
from luthier.inspect.sides import Side
from luthier.inspect.survey import Survey


def plain(survey: Survey) -> dict[str, Any]:
    """The survey as plain values."""
    comparison = survey.comparison
    main = [side for side in survey.whole.sides if side.name in ("train", "held out")]
    sets = [side for side in survey.whole.sides if side not in main]
    return {
        "name": survey.material.name,
        "holds": survey.holds,
        "error": survey.error,
        "limit": survey.limit,
        "sources": {account.opened.key: _source_sentence(account) for account in survey.accounts},
        "mixture": _mixture(survey),
        "duplicates": _duplicates(survey),
        "held_out": _held_out(survey),
        "sides": {side.name.replace(" ", "_"): _side(side) for side in main},
        "sets": {side.name: _side(side) for side in sets},
        "batches": asdict(survey.batches) if survey.batches is not None else None,
        "rules": [asdict(rule) for rule in survey.rules],
        "prompts": {
            "compared_rows": comparison.boundaries.rows,
            "of_rows": comparison.of,
            "turns": comparison.prompts.checked,
            "differ": comparison.prompts.broken,
        },
        "boundaries": asdict(comparison.boundaries),
    }


def _source_sentence(account: Account) -> dict[str, Any]:
    opened = account.opened
    return {
        "label": opened.source.label,
        "shape": opened.shape.name,
        "kind": opened.shape.kind,
        "rows": len(account),
        "unused_columns": list(opened.shape.unused),
        "filter": opened.config.filter,
        "filtered_out": account.bad.filtered,
        "bad_rows": len(account.bad.rows),
        "train_on": opened.config.train_on,
        "findings": [asdict(finding) for finding in account.findings.values()],
    }


def _mixture(survey: Survey) -> dict[str, Any]:
    shares = survey.whole.mixture
    total = sum(share.epoch for share in shares.values())
    return {
        "mix": survey.material.config.dataset.mix,
        "rows": total,
        "sources": {
            name: {
                **asdict(share),
                "repeats": round(share.repeats, 4),
                "share": round(share.epoch / total, 4) if total else None,
            }
            for name, share in shares.items()
        },
    }


def _duplicates(survey: Survey) -> dict[str, Any]:
    found = {name: asdict(equal) for name, equal in survey.whole.equals().items()}
    return {
        "deduplicate": survey.material.config.dataset.deduplicate,
        "left_out": survey.train.left_out.get("duplicate", 0),
        **found,
    }


def _held_out(survey: Survey) -> dict[str, Any]:
    config = survey.material.config
    return {
        "how": how_held_out(config.dataset.eval, config.seed) or None,
        "sets": {name: asdict(found) for name, found in survey.whole.overlaps().items()},
    }


def _side(side: Side) -> dict[str, Any]:
    counts = {name: value for name, value in vars(side).items() if name not in ("name", "lengths")}
    lengths = side.lengths.tolist()
    return {
        **counts,
        "sequences": len(lengths),
        "tokens": side.tokens,
        "trained_share": round(side.trained_tokens / side.tokens, 4) if side.tokens else None,
        "lengths": quantiles(lengths),
        "histogram": [
            {"from": start, "below": end, "sequences": count}
            for start, end, count in histogram(lengths)
        ],
    }
