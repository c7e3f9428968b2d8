"""Every training method stops and goes on exactly, with its own counts between two lines of log."""

import json
import signal

import pytest

from helpers.train_command import LORA, metrics, record, said, weights, words

pytestmark = pytest.mark.train

NAMES = ("red", "green", "blue", "grey")
ROWS = {
    "dpo": lambda n: {"prompt": f"name {n}", "chosen": NAMES[n % 4], "rejected": NAMES[n % 4 - 1]},
    "kto": lambda n: {"prompt": f"name {n}", "completion": NAMES[n % 4], "label": n % 3 > 0},
    "classify": lambda n: {"text": f"{NAMES[n % 4]} {n}", "label": NAMES[n % 2]},
    "grpo": lambda n: {"prompt": f"name {n}", "completion": NAMES[n % 4]},
}  # fmt: skip
MORE = {
    "grpo": ("trainer.rewards=[exact_match,{length:{max:20,weight:0.2}}]", "chat.max_length=96",
             "trainer.args.num_generations=2", "trainer.args.max_completion_length=8"),
    "classify": ("chat.max_length=32",),
}  # fmt: skip


def line_of(folder, method, name):
    path = folder / f"{method}.jsonl"
    path.write_text("".join(json.dumps(ROWS[method](n)) + "\n" for n in range(32)))
    args = {"save_strategy": "no", "max_steps": 6, "logging_steps": 4, "eval_strategy": "no"}
    line = [
        word for word in words(folder, **args)
        if not word.startswith(("dataset.path=", "trainer.evaluation", "chat.max_length="))
    ]  # fmt: skip
    more = MORE.get(method, ("chat.max_length=64",))
    return [*line, f"trainer={method}", f"dataset.path={path}", "dataset.eval.count=null", *LORA,
            *more, f"output_dir={name}"]  # fmt: skip


@pytest.mark.parametrize("method", ROWS)
def test_a_method_goes_on_exactly(forks, tiny, method):
    whole, stopped = (line_of(tiny, method, f"{method}-{n}") for n in ("whole", "stopped"))
    assert forks.run(tiny, *whole) == 0, said(tiny)[-3000:]
    # Behind step 3: between two lines of the log.
    signals = [("luthier.train.callbacks:StopCallback.on_step_end", 3, signal.SIGTERM)]
    assert forks.run(tiny, *stopped, signals=signals) == 75, said(tiny)[-3000:]
    assert record(tiny / f"{method}-stopped")["sessions"][-1]["to_step"] == 3
    assert forks.run(tiny, *stopped) == 0, said(tiny)[-3000:]
    a, b = tiny / f"{method}-whole", tiny / f"{method}-stopped"
    assert metrics(a) == metrics(b)
    assert weights(a) == weights(b)
