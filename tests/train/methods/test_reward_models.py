"""Reward models as rewards: the scores of plain transformers, and what is no reward model."""

import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from helpers import head_runs
from helpers.judge_server import judging
from helpers.online_trainer import run_config, trainer
from luthier.errors import UserError
from luthier.metrics.rewards import parse_rewards
from luthier.train.methods.reward_models import load_reward_models
from luthier.train.reward_checks import check_reward_sources, hash_reward_models

PROMPTS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2 <|im_end|>"}],
    [{"role": "user", "content": "x" * 60}],
    [{"role": "user", "content": "Hi"}],
]
REPLIES = ["Hello!", "4", "", "Go away, please, and do not come back."]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in REPLIES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each way to train a reward model, and one of a classifier."""
    folder = tmp_path_factory.mktemp("reward_models")
    names = ["rewards", "rewards by an adapter", "classes"]
    return {name: head_runs.finish(folder / name, *head_runs.CASES[name])[0] for name in names}


def score_plainly(run):
    """What transformers and peft say of each conversation, one by one and without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    auto = transformers.AutoModelForSequenceClassification
    if (run / "model" / "adapter_config.json").exists():
        base = auto.from_pretrained(run.parent / "base", num_labels=1)
        model = PeftModel.from_pretrained(base, run / "model")
    else:
        model = auto.from_pretrained(run / "model", num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    scores = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        # As the template writes it; a control token in a user's text is text, letter by letter.
        ids = []
        for message in [*prompt, *completion]:
            text = tokenizer.encode(f"{message['role']}\n{message['content']}".replace("<|", "\0"))
            text = [pair for n in text for pair in (tokenizer.encode("<") + tokenizer.encode("|")
                    if [n] == tokenizer.encode("\0") else [n])]  # fmt: skip
            start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
            ids += [start, *text, end, *tokenizer.encode("\n")]
        with torch.no_grad():
            scores.append(float(model.eval()(torch.tensor([ids])).logits[0, 0]))
    return scores


@pytest.mark.parametrize("name", ["rewards", "rewards by an adapter"])
def test_scores_are_those_of_plain_transformers(runs, tmp_path, name):
    config = run_config(tmp_path)
    settings, _ = parse_rewards([{"model": str(runs[name]), "batch_size": 3}])
    state = torch.random.get_rng_state()
    (reward,) = load_reward_models(settings, config)
    assert torch.equal(torch.random.get_rng_state(), state)
    model = reward._scorer.model
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    scores = reward(prompts=PROMPTS, completions=COMPLETIONS, reference=[None] * 4)
    expected = score_plainly(runs[name])
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_the_step_of_grpo_takes_the_scores(runs, tmp_path):
    rewards = [{"model": str(runs["rewards"]), "weight": 2}, {"length": {"max": 3}}]
    made = trainer(run_config(tmp_path, rewards=rewards), tmp_path)
    made.train()
    log = made.state.log_history[0]
    assert log["reward"] == pytest.approx(
        2 * log["rewards/model/mean"] + log["rewards/length/mean"], abs=1e-5
    )
    assert hash_reward_models(rewards) is not None


def test_a_conversation_that_cannot_be_read_is_named(runs, tmp_path):
    settings, _ = parse_rewards([{"model": str(runs["rewards"])}])
    (reward,) = load_reward_models(settings, run_config(tmp_path))
    long = [{"role": "assistant", "content": "x" * 3000}]
    with pytest.raises(UserError, match=r"cannot score completion 1: it has 3,\d+ tokens, and the"):
        reward(prompts=PROMPTS[:2], completions=[COMPLETIONS[0], long])


@pytest.mark.parametrize(
    ("case", "words"),
    [("classes", "it was trained with trainer=classify"),
     ("three labels", "it is a classifier with 3 labels"),
     ("an adapter of two labels", "it is a classifier with 2 labels"),
     ("a writer", "it writes text and scores none"),
     ("nothing", "there is no")],
)  # fmt: skip
def test_what_is_no_reward_model_is_refused(runs, tmp_path, case, words):
    folder = tmp_path / "copied"
    if case == "classes":
        folder = runs["classes"]
    elif case == "three labels":
        shutil.copytree(runs["rewards"] / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        config["id2label"] = {str(n): f"L{n}" for n in range(3)}
        (folder / "config.json").write_text(json.dumps(config))
    elif case == "an adapter of two labels":
        shutil.copytree(runs["rewards by an adapter"] / "model", folder)
        labels = {"id2label": {"0": "a", "1": "b"}}
        (folder / "labels.json").write_text(json.dumps(labels))
    elif case == "a writer":
        folder = run_config(tmp_path).model.path
    with pytest.raises(UserError, match=words):
        check_reward_sources([{"model": str(folder)}])


def test_an_adapter_far_from_its_run(runs, tmp_path):
    run = runs["rewards by an adapter"]
    shutil.copytree(run / "model", tmp_path / "copied")
    entry = {"model": str(tmp_path / "copied"), "base": str(run.parent / "base"), "name": "far"}
    check_reward_sources([entry])
    settings, _ = parse_rewards([entry, {"model": str(run)}])
    far, near = load_reward_models(settings, run_config(tmp_path))
    asked = {"prompts": PROMPTS, "completions": COMPLETIONS}
    assert far(**asked) == pytest.approx(near(**asked), abs=1e-6)


def test_a_head_without_weights_is_refused(runs, tmp_path):
    folder = tmp_path / "headless"
    shutil.copytree(run_config(tmp_path).model.path, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    (folder / "config.json").write_text(json.dumps(config | names))
    settings, _ = parse_rewards([{"model": str(folder)}])
    with pytest.raises(UserError, match=r"no weights for score, which would be random"):
        load_reward_models(settings, run_config(tmp_path))


class TellStep(transformers.TrainerCallback):
    """Tells a judge how many steps were taken."""

    def __init__(self, taken):
        self.taken = taken

    def on_step_end(self, args, state, control, **kwargs):
        self.taken[0] = state.global_step


STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("method", "step"), [("grpo", 2), ("rloo", 3)], ids=["at an epoch's begin", "within one"]
)
def test_a_judge_that_fails_stops_with_a_checkpoint_to_go_on_from(tmp_path, method, step):
    taken, fails_at = [0], [step]

    def answer(body, number):
        text = body["messages"][0]["content"]
        return (400, "out of credit") if taken[0] == fails_at[0] else str(len(text))

    with judging(answer) as judge:
        entry = {"judge": judge.address, "model": "m", "prompt": "{reply}", "retries": 0}

        def build(name, **args):
            folder = tmp_path / name
            folder.mkdir()
            args = STEPS | args
            made = trainer(run_config(folder, rewards=[entry], method=method, **args), folder)
            made.add_callback(TellStep(taken))
            return made

        stopped = build("stopped", save_strategy="no")
        with pytest.raises(UserError, match=f"(?s)out of credit.*The {step} steps before it"):
            stopped.train()
        first = next((tmp_path / "stopped").rglob(f"checkpoint-{step}"))
        fails_at[0] = None
        early = build("at once")
        fails_at[0] = taken[0] = 0
        with pytest.raises(UserError, match=r"(?s)out of credit.*No step was taken yet"):
            early.train()
        fails_at[0] = None
        whole = build("whole")
        whole.train()
        second = next((tmp_path / "whole").rglob(f"checkpoint-{step}"))
        for name in ("model.safetensors", "counted_0.json", "rng_state.pth", "optimizer.pt"):
            assert_same_file(first / name, second / name)
        resumed = build("resumed")
        resumed.train(str(first))
        weights = dict(whole.model.named_parameters())
        for name, weight in resumed.model.named_parameters():
            assert torch.equal(weight, weights[name]), name


def assert_same_file(path, other):
    if path.suffix == ".safetensors":
        tensors, others = load_file(path), load_file(other)
        assert all(torch.equal(tensors[name], others[name]) for name in others)
    elif path.suffix == ".json":
        assert json.loads(path.read_text()) == json.loads(other.read_text())
    else:
        torch.set_printoptions(threshold=100_000)
        state, expected = (repr(torch.load(file, weights_only=False)) for file in (path, other))
        torch.set_printoptions(profile="default")
        assert "..." not in expected and state == expected
