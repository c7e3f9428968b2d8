"""Mistakes in metrics and rewards, and in what is done with them, before anything is loaded."""

import subprocess
import sys

import pytest

from luthier.config import load_config
from luthier.errors import UserError

Q = "recipe=quickstart"
M = "trainer.evaluation.metrics"
BEST = "trainer.args.metric_for_best_model"
RL = (Q, "trainer=grpo", "quantization=none")

MISTAKES = {
    "metric": ([Q, f"{M}=[exact]"], [f"{M}: there is no metric 'exact'. Did you mean exact_match"]),
    "setting of a metric": ([Q, f"{M}=[{{length:{{unit:pages}}}}]"], ["'pages' is not an option"]),
    "all that is wrong": ([Q, f"{M}=[exact,regex]"], ["no metric 'exact'", "regex needs pattern"]),
    "no metric": ([Q, f"{M}=[5]"], [f"{M}: 5 is not text"]),
    "no list": ([Q, f"{M}=exact_match"], [f"{M}: 'exact_match' is not a list."]),
    "metric of a set": (
        [Q, "+dataset.eval.sets={a:{path:x}}", "trainer.evaluation.sets={a:[exact]}"],
        ["trainer.evaluation.sets.a: there is no metric 'exact'"],
    ),
    "set": (
        [Q, "+dataset.eval.sets={sums:{path:x}}", "trainer.evaluation.sets={sum:[number]}"],
        ["trainer.evaluation.sets.sum: there is no evaluation set", "Did you mean sums?"],
    ),
    "replies at evaluations": (
        [Q, "trainer.evaluation.when=evaluations", "trainer.args.eval_strategy=no"],
        ["trainer.evaluation.when: rows are answered at evaluations, and there are none"],
    ),
    "patience": (
        [Q, "trainer.evaluation.patience=2", "trainer.args.eval_strategy=no"],
        ["trainer.evaluation.patience: it counts evaluations, and there are none"],
    ),
    "best, at the ends only": (
        [Q, f"{BEST}=exact_match"],
        [f"{BEST}: exact_match is measured before and after training only"],
    ),
    "best, neither good nor bad": (
        [Q, f"{M}=[length]", f"{BEST}=eval_length", "trainer.evaluation.when=evaluations"],
        [f"{BEST}: length is neither good nor bad by itself"],
    ),
    "a profile of too few steps": (
        [Q, "trainer.profile=true", "trainer.args.max_steps=5"],
        ["trainer.profile: steps 3 to 6 are profiled, and the run has 5. Set"],
    ),
    "no reward": ([*RL], ["trainer.rewards: trainer.method=grpo needs at least one"]),
    "reward": ([*RL, "trainer.rewards=[nummer]"], ["trainer.rewards: there is no reward 'nummer'"]),
    "rewards that nothing takes": (
        [Q, "trainer.rewards=[number]"],
        ["trainer.method=sft trains without rewards", "trainer=grpo or trainer=rloo"],
    ),
    "no teacher": (
        [Q, "trainer=distill", "quantization=none"],
        ["trainer.teacher: has no value"],
    ),
    "a teacher of nobody": (
        [Q, "trainer.teacher=x"],
        ["trainer.teacher: trainer.method=sft has no teacher"],
    ),
    "a teacher by TRL's name": (
        [Q, "trainer=distill", "trainer.args.teacher_model_name_or_path=x"],
        ["trainer.args.teacher_model_name_or_path: is not set here: use trainer.teacher"],
    ),
    "weights of rewards": (
        [*RL, "trainer.rewards=[number]", "trainer.args.reward_weights=[1]"],
        ["trainer.args.reward_weights: is not set here: use the weight of each"],
    ),
    "template settings": (
        [*RL, "trainer.rewards=[number]", "trainer.args.chat_template_kwargs={a:1}"],
        ["trainer.args.chat_template_kwargs: is not set here: use chat.variables"],
    ),
    "a setting of SFT": (
        [*RL, "trainer.rewards=[number]", "trainer.args.packing=true"],
        ["trainer.args.packing: is not a setting of trl.GRPOConfig"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("typed", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(typed, parts):
    with pytest.raises(UserError) as error:
        load_config(typed)
    assert all(part in str(error.value) for part in parts), error.value


RIGHT = {
    "a metric with settings": [Q, f"{M}=[exact_match,{{regex:{{pattern:a}}}}]"],
    "best of replies": [Q, f"{BEST}=exact_match", "trainer.evaluation.when=evaluations"],
    "best, decided": [
        Q, f"{M}=[length]", f"{BEST}=length", "trainer.args.greater_is_better=false",
        "trainer.evaluation.when=evaluations",
    ],
    "best loss": [Q, f"{BEST}=loss"],
    "patience": [Q, "trainer.evaluation.patience=1"],
    "rewards": [*RL, "trainer.rewards=[number,{length:{max:5,weight:0.2}}]"],
    "distill": [Q, "trainer=distill", "trainer.teacher=x"],
    "rloo": [Q, "trainer=rloo", "quantization=none", "trainer.rewards=[json_valid]"],
}  # fmt: skip


@pytest.mark.parametrize("typed", RIGHT.values(), ids=RIGHT)
def test_what_is_right(typed):
    load_config(typed)


def test_only_the_metrics_that_a_config_names_are_imported():
    code = (
        "import sys; from luthier.config import load_config\n"
        f"load_config([{Q!r}, '{M}=[]'])\n"
        "assert not [name for name in sys.modules if name.startswith('luthier.metrics')]\n"
        f"load_config([{Q!r}, '{M}=[json_f1]'])\n"
        "assert 'luthier.metrics.structured' in sys.modules\n"
        "assert 'luthier.metrics.ngrams' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
