"""Held-out rows answered by the model under training, before and after, and their score."""

from typing import Any

from luthier.config.schema import EvaluationConfig
from luthier.errors import UserError
from luthier.infer.generate import generate
from luthier.infer.score import Question, exact_match, questions

METRICS = {"exact_match": exact_match}


def asked(config: EvaluationConfig, heldout: list[Any], sharding: str) -> list[Question]:
    """The questions that a run answers: all that are scored, or only those that are shown.

    Raises UserError for a score under a sharding that splits the weights themselves: generating
    there would gather them once per token.
    """
    if sharding.startswith("fsdp") or sharding == "zero3":
        if config.metrics:
            raise UserError(
                f"trainer.evaluation.metrics: replies are not generated under {sharding}, where "
                "each rank holds a part of the weights.\nUse trainer.evaluation.metrics=[] for "
                "the loss alone, or launch/ddp.yaml or launch/zero2.yaml."
            )
        return []
    return questions(heldout, config.rows if config.metrics else config.samples)


def answer(
    model: Any,
    tokenizer: Any,
    encoder: Any,
    config: EvaluationConfig,
    asked: list[Question],
    when: str,
) -> list[str]:
    """Answer each question greedily, shared out over the ranks; every rank gets all replies."""
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm

    state = PartialState()
    mine = asked[state.process_index :: state.num_processes]
    with tqdm(
        total=len(mine),
        desc=f"replies {when} training",
        unit="row",
        disable=not state.is_main_process,
    ) as bar:
        ids = generate(
            model,
            [encoder.prompt(q.messages, tools=q.tools) for q in mine],
            stop_ids=encoder.stop_token_ids,
            pad_id=tokenizer.pad_token_id,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            on_batch=lambda rows: bar.update(rows),
        )
    texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in ids]
    if state.num_processes == 1:
        return texts
    numbered = gather_object(
        [(state.process_index + n * state.num_processes, text) for n, text in enumerate(texts)]
    )
    return [text for _, text in sorted(numbered)]


def score(config: EvaluationConfig, asked: list[Question], replies: list[str]) -> dict[str, float]:
    """Each configured metric over all questions."""
    expected = [q.expected for q in asked]
    return {name: METRICS[name](replies, expected) for name in config.metrics} if asked else {}
