"""GRPO and RLOO: prompts token for token, rewards with their columns, gradients by arithmetic."""

import copy
import json

import pytest
import torch

from helpers.chatml import CHATML
from helpers.online_trainer import ROWS, prepared, run_config, trainer
from helpers.preference_trainer import model, say, tokenizer
from helpers.tool_templates import PLAIN, TOOLS_FILE, call
from luthier.errors import UserError
from luthier.train.methods.encoders import make_chat_encoder
from luthier.train.methods.online import OnlineTrainerMixin, make_prompt_datasets

CONTEXTS = [
    ROWS[0]["messages"][:1],
    ROWS[1]["messages"][:1],
    ROWS[2]["messages"],
    ROWS[3]["messages"],
]


def test_prompts_are_those_of_the_chat_encoder(tmp_path):
    config = run_config(tmp_path)
    rows, sets = make_prompt_datasets(prepared(config))
    encoder = make_chat_encoder(config, tokenizer())
    assert [row["prompt"] for row in rows] == CONTEXTS
    assert [row["prompt_ids"] for row in rows] == [encoder.prompt(one) for one in CONTEXTS]
    assert sets == {}
    # What a user typed is text, where TRL's own encoding would end the turn.
    assert rows[1]["prompt_ids"].count(258) == 1


def test_columns_of_the_rows_and_the_reference_beside_them(tmp_path):
    rows, _ = make_prompt_datasets(prepared(run_config(tmp_path)))
    columns = rows.columns()
    assert columns["reference"] == ["two", "red", None, "own"]
    assert columns["level"] == [1, None, 3, None]
    assert columns["kind"] == [None, "open", None, None]
    assert {"prompt", "prompt_ids"} & set(columns) == set()


def test_an_evaluation_set_has_its_own_rows(tmp_path):
    config = run_config(tmp_path, dataset={"eval": {"count": 1}})
    train, sets = make_prompt_datasets(prepared(config))
    assert (len(train), len(sets[""])) == (3, 1)
    seen = [row["prompt"] for row in (*train, *sets[""])]
    assert all(one in seen for one in CONTEXTS)


LONG = [say("user", "x" * 40), say("assistant", "y"), say("user", "z")]


@pytest.mark.parametrize(
    ("chat", "prompts"),
    [
        ({"max_length": 70}, [LONG[2:]]),
        ({"max_length": 70, "on_long": "drop"}, []),
        ({"max_length": 200}, [LONG]),
    ],
    ids=["turns go from its front", "it goes", "it fits"],
)
def test_a_prompt_leaves_room_for_its_completion(tmp_path, chat, prompts):
    rows = [{"messages": [say("user", "short")]}, {"messages": LONG}]
    config = run_config(tmp_path, rows, chat=chat)
    train, _ = make_prompt_datasets(prepared(config))
    encoder = make_chat_encoder(config, tokenizer())
    expected = [encoder.prompt(rows[0]["messages"]), *map(encoder.prompt, prompts)]
    assert [row["prompt_ids"] for row in train] == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [({"messages": [say("assistant", "a")]}, "no prompt"),
     ({"messages": [say("tool", "lost"), say("user", "a")]}, "lost")],
    ids=["nothing before the reply", "text that the template does not show"],
)  # fmt: skip
def test_rows_that_make_no_prompt_are_dropped_with_a_reason(tmp_path, row, reason):
    no_tools = "for m in messages if m.role != 'tool'"
    shows_all_but_tools = CHATML.replace("for m in messages", no_tools)
    assert shows_all_but_tools != CHATML
    chat = {"template": shows_all_but_tools, "on_lost": "drop"}
    data = prepared(run_config(tmp_path, [*ROWS, row], chat=chat))
    assert data.train_counts.dropped == {reason: 1}


def test_lost_text_stops_the_run_unless_it_is_dropped(tmp_path):
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}<|im_end|>"
    with pytest.raises(UserError, match=r"rows\.jsonl:3: .*does not show"):
        prepared(run_config(tmp_path, chat={"template": template}))


SHORT = [{"length": {"target": 3, "unit": "characters"}}]


def one_step(folder, method, **args):
    """The trainer, the model before its step, and what was answered and how it was judged."""
    config = run_config(folder, method=method, rewards=SHORT, **args)
    net = model()
    net.config.max_position_embeddings = 2048  # prompts with tools are long, byte by byte
    before, seen = copy.deepcopy(net), []
    made = trainer(config, folder, net)
    score = made._generate_and_score_completions
    made._generate_and_score_completions = lambda rows: seen.append(score(rows)) or seen[-1]
    made.train()
    return made, before, seen[0]


def log_probabilities(net, seen):
    """The log-probability of each completion token by plain logits, row by row."""
    found = []
    for n in range(len(seen["completion_ids"])):
        prompt = seen["prompt_ids"][n][seen["prompt_mask"][n].bool()]
        completion = seen["completion_ids"][n][seen["completion_mask"][n].bool()]
        logits = net(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return found


def lengths(seen):
    """The reward of each completion: its characters, without what a tokenizer does not show."""
    pairs = zip(seen["completion_ids"], seen["completion_mask"], strict=True)
    ids = [ids[mask.bool()] for ids, mask in pairs]
    shown = tokenizer().batch_decode(ids, skip_special_tokens=True)
    return torch.tensor([-min(abs(len(text) - 3) / 3, 1.0) for text in shown]).view(-1, 4)


def check_gradient(made, before):
    """With SGD at rate 1 the step is the gradient."""
    for (name, old), new in zip(before.named_parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(old.data - new.data, old.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_the_step_of_grpo_by_arithmetic(tmp_path):
    made, before, seen = one_step(tmp_path, "grpo")
    rewards = lengths(seen)
    mean, spread = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    advantages = ((rewards - mean) / (spread + 1e-4)).view(-1)
    torch.testing.assert_close(seen["advantages"], advantages, rtol=1e-4, atol=1e-5)
    assert advantages.abs().max() > 0.5
    logs = log_probabilities(before, seen)
    tokens = sum(map(len, logs))
    loss = -sum(a * log.sum() for a, log in zip(advantages, logs, strict=True)) / tokens
    loss.backward()
    check_gradient(made, before)
    assert made.state.log_history[0]["reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)


def test_the_step_of_rloo_by_arithmetic(tmp_path):
    made, before, seen = one_step(tmp_path, "rloo", beta=0.0)
    rewards = lengths(seen)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    advantages = (rewards - others).view(-1)
    torch.testing.assert_close(seen["advantages"], advantages, rtol=1e-4, atol=1e-5)
    assert advantages.abs().max() > 0.1
    logs = log_probabilities(before, seen)
    loss = -sum(a * log.sum() for a, log in zip(advantages, logs, strict=True)) / len(logs)
    loss.backward()
    check_gradient(made, before)


REPLIES = [
    # The first turn of eight completions: two call, one of them twice; the last one is cut.
    [call("add", a=1, b=2), "no", call("add", a=3, b=4), "a", "b", "c", "d", None],
    ["3", call("add", a=7, b=1)],
    ["8"],
]


def scripted(monkeypatch, seen):
    """Let each turn be written by a script, and keep the ids that it is written behind."""
    turns = iter(REPLIES)

    def write(self, prompt_ids, *rest):
        seen.append([list(ids) for ids in prompt_ids])
        ids = [
            tokenizer()("x" * 400 if text is None else text).input_ids + [258] * (text is not None)
            for text in next(turns)
        ]
        return (ids, None) if self._turn_arguments == (None, {}, 1) else ids

    monkeypatch.setattr(OnlineTrainerMixin, "_generate_single_turn", write)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_step_with_tools_by_arithmetic(tmp_path, monkeypatch, method):
    """The loss covers the tokens of the model alone, whose ids are those that were sampled."""
    (tmp_path / "own.py").write_text(TOOLS_FILE)
    (tmp_path / "run").mkdir()
    contexts = []
    scripted(monkeypatch, contexts)
    made, before, seen = one_step(
        tmp_path, method, beta=0.0, chat={"template": PLAIN}, max_completion_length=300,
        tools=[f"python:{tmp_path / 'own.py'}:add"], rollouts={"record": 3},
    )  # fmt: skip
    assert [len(each) for each in contexts] == [8, 2, 1]
    masks = seen["completion_mask"] * seen["tool_mask"]
    kept = zip(seen["completion_ids"], masks, strict=True)
    wrote = [tokenizer().decode(ids[mask.bool()]) for ids, mask in kept]
    end = "<|im_end|>"
    assert wrote[0] == f"{REPLIES[0][0]}{end}3{end}"
    assert wrote[2] == f"{REPLIES[0][2]}{end}{REPLIES[1][1]}{end}8{end}"
    assert (len(wrote[7]), wrote[1]) == (300, f"no{end}")
    # The third completion as it stands is what its last turn was sampled from, and that turn.
    whole = torch.cat([seen["prompt_ids"][2][seen["prompt_mask"][2].bool()],
                       seen["completion_ids"][2][seen["completion_mask"][2].bool()]])  # fmt: skip
    assert whole.tolist() == contexts[2][0] + tokenizer()("8").input_ids + [258]
    own = [
        log[mask[: len(log)].bool()]
        for log, mask in zip(log_probabilities(before, seen), seen["tool_mask"], strict=True)
    ]
    total = sum(map(len, own)) if method == "grpo" else len(own)
    loss = -sum(a * log.sum() for a, log in zip(seen["advantages"], own, strict=True)) / total
    loss.backward()
    check_gradient(made, before)
    logged = made.state.log_history[0]
    assert logged["completions/mean_length"] == pytest.approx(sum(map(len, own)) / 8)
    assert logged["completions/clipped_ratio"] == logged["tools/cut_frequency"] == 1 / 8
    assert (logged["tools/call_frequency"], logged["tools/failure_frequency"]) == (3 / 8, 0)
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    recorded = [json.loads(line) for line in lines]
    assert [row["end"] for row in recorded] == ["stopped"] * 3
    assert [message["content"] for message in recorded[0]["completion"]] == ["", "3", "3"]
    assert recorded[0]["rewards"] == {"length": pytest.approx(seen_reward(made, 0))}


def seen_reward(made, number):
    return made._logs["rewards"]["length"][number]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_an_environment_scores_its_own_completion(tmp_path, monkeypatch, method):
    (tmp_path / "own.py").write_text(TOOLS_FILE)
    turns = [[call("count_up", by=2)] * 4 + ["no"] * 4, ["ok"] * 4]
    monkeypatch.setitem(globals(), "REPLIES", turns)
    scripted(monkeypatch, [])
    rows = [{"messages": [say("user", str(n))], "goal": 2 + n} for n in range(2)]
    config = run_config(
        tmp_path, rows, method, rewards=[], chat={"template": PLAIN}, max_completion_length=200,
        environment=f"python:{tmp_path / 'own.py'}:Counter",
    )  # fmt: skip
    made = trainer(config, tmp_path)
    assert made.reward_func_names == ["Counter"]
    inputs = [made.train_dataset[n] for n in (0, 0, 1, 1, 0, 0, 1, 1)]
    goals = [row["goal"] for row in inputs]
    made._generate_and_score_completions(inputs)
    assert list(made._logs["rewards"]["Counter"]) == [
        float(goal == (2 if n < 4 else 0)) for n, goal in enumerate(goals)
    ]
    assert made._logs["prompt"][0][-1]["content"].endswith(f" Goal: {goals[0]}.")


class OtherServer:
    """Stands for vLLM: samples from weights of its own, and says with which log-probabilities."""

    def __init__(self, net):
        self.net, self.generation_kwargs = net, {}

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        ids, logps = [], []
        for prompt in prompts:
            row = torch.tensor([prompt])
            for _ in range(6):
                drawn = torch.multinomial(self.net(row).logits[0, -1].softmax(-1), 1)
                row = torch.cat([row, drawn[None]], dim=1)
            told = self.net(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            new = row[0, len(prompt) :]
            ids.append(new.tolist())
            logps.append([[value] for value in told.gather(1, new[:, None])[:, 0].tolist()])
        return prompts, ids, logps, None


def served_by(folder, method, server_net, net, lora=None):
    made = trainer(
        run_config(folder, method=method, rewards=SHORT, lora=lora, beta=0.0), folder, net
    )
    made.use_vllm, made._last_loaded_step = True, 0
    made.vllm_generation = OtherServer(server_net)
    made.vllm_importance_sampling_correction = False
    return made, [made.train_dataset[n] for n in (1, 1, 1, 1, 3, 3, 3, 3)]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_server_with_other_weights_is_found_at_its_first_completions(tmp_path, method):
    made, rows = served_by(tmp_path, method, model(), model())
    made._generate_and_score_completions(rows)
    made, rows = served_by(tmp_path, method, model(seed=1), model())
    with pytest.raises(UserError, match=r"not drawn from the weights that train: .* differ by"):
        made._generate_and_score_completions(rows)


def test_a_server_without_the_adapter_is_found(tmp_path):
    from luthier.model.adapters import add_adapter

    net = add_adapter(model(), {"r": 2}, seed=0)
    made, rows = served_by(tmp_path, "grpo", model(), net, {"r": 2})
    made._generate_and_score_completions(rows)  # an adapter that has not learnt yet changes nothing
    for name, parameter in made.model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.normal_(std=0.02)
    with pytest.raises(UserError, match="drawn from the model without its adapter"):
        made._generate_and_score_completions(rows)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_step_is_the_same_for_any_split_of_its_completions(tmp_path, method):
    found = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        made, before, _ = one_step(
            tmp_path, method, beta=0.0, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        pairs = zip(before.parameters(), made.model.parameters(), strict=True)
        found.append([old.data - new.data for old, new in pairs])
    assert max(step.abs().max() for step in found[0]) > 1e-3
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_generation_starts_from_the_prompt_and_ends_at_the_stop_tokens(tmp_path, method):
    config = run_config(tmp_path, method=method, beta=0.0)
    made = trainer(config, tmp_path)
    encoder = make_chat_encoder(config, tokenizer())
    assert made.generation_config.eos_token_id == encoder.stop_token_ids == [258]
    assert made.generation_config.use_cache
    rows = [made.train_dataset[n] for n in (1, 1, 1, 1, 3, 3, 3, 3)]
    seen = made._generate_and_score_completions(rows)
    masks = zip(seen["prompt_ids"], seen["prompt_mask"], strict=True)
    ids = [ids[mask.bool()].tolist() for ids, mask in masks]
    assert ids == [encoder.prompt(CONTEXTS[n]) for n in (1, 1, 1, 1, 3, 3, 3, 3)]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_an_adapter_learns_in_float32_and_its_start_is_not_saved_twice(tmp_path, method):
    from luthier.model.adapters import add_adapter

    made = trainer(
        run_config(tmp_path, method=method, beta=0.1, lora={"r": 2}, rewards=SHORT),
        tmp_path,
        add_adapter(model(), {"r": 2, "lora_dropout": 0.3}, seed=0),
    )
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}
    made.train()
    assert made.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    grown = [p for name, p in made.model.named_parameters() if "lora_B.default" in name]
    assert any(p.abs().max() > 0 for p in grown)


def test_rewards_see_the_columns_of_their_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seen_columns.py").write_text(
        "SEEN = []\n"
        "def reward(prompts, completions, level, reference, **others):\n"
        "    SEEN.append((prompts, level, reference))\n"
        "    return [float(one or 0) for one in level]\n"
    )
    made = trainer(run_config(tmp_path, rewards=["python:seen_columns.reward"]), tmp_path)
    import seen_columns

    # Tried before training, on the first rows.
    (tried,) = seen_columns.SEEN
    assert tried == (CONTEXTS[:2], [1, None], ["two", "red"])
    made._generate_and_score_completions([made.train_dataset[2]] * 4)
    assert seen_columns.SEEN[1] == ([CONTEXTS[2]] * 4, [3] * 4, [None] * 4)


def test_means_of_rewards_have_the_name_of_their_evaluation_set(tmp_path):
    (tmp_path / "more.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    sets = {"more": {"path": str(tmp_path / "more.jsonl")}}
    rewards = [{"length": {"max": 1, "unit": "characters"}}]
    config = run_config(tmp_path, rewards=rewards, dataset={"eval": {"count": 1, "sets": sets}},
                        num_generations_eval=2)  # fmt: skip
    measured = trainer(config, tmp_path).evaluate()
    assert {"eval_reward", "eval_more_reward", "eval_loss", "eval_more_loss"} <= set(measured)
    assert "eval_more_rewards/length/mean" in measured


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize("batch", [2, 4, 10])
def test_held_out_rewards_do_not_depend_on_the_batch_size(tmp_path, monkeypatch, method, batch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "level_reward.py").write_text(
        "def reward(completions, level, **others):\n    return [float(one) for one in level]\n"
        "def some(completions, level, **others):\n"
        "    return [None if one < 4 else 6.0 for one in level]\n"
    )
    lines = [{"messages": [say("user", str(n))], "level": n} for n in range(5)]
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in lines))
    own = [{"messages": [say("user", "else")], "level": 9}] * 2
    config = run_config(
        tmp_path, own, method,
        ["python:level_reward.reward", {"python:level_reward.some": {"weight": 2}}],
        dataset={"eval": {"path": str(held)}}, per_device_eval_batch_size=batch,
        num_generations_eval=2,
    )  # fmt: skip
    measured = trainer(config, tmp_path).evaluate()
    assert measured["eval_rewards/reward/mean"] == 2
    assert measured["eval_rewards/some/mean"] == 6
    assert measured["eval_reward"] == pytest.approx((0 + 1 + 2 + 3 + 4 + 2 * 6) / 5)


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([{"number": {"reference": "answer"}}], "rows have no column 'answer'"),
        (["number"], "3 of 3 references cannot be"),
        (["python:wrong_reward.raises"], "reward raises: .* failed: KeyError"),
        (["python:wrong_reward.short"], "reward short: it returned 1 numbers for 2"),
        (["python:wrong_reward.nan"], "reward nan: the reward of completion 0 is nan"),
        (["python:wrong_reward.needs"], "needs colour, and there is no such column"),
    ],
    ids=["no column", "no number", "raises", "wrong length", "NaN", "an unknown column"],
)
def test_wrong_rewards_stop_the_run_before_the_first_step(tmp_path, monkeypatch, rewards, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong_reward.py").write_text(
        "def raises(completions, **columns):\n    return {}['x']\n"
        "def short(completions, **columns):\n    return [1.0]\n"
        "def nan(completions, **columns):\n    return [float('nan')] * len(completions)\n"
        "def needs(completions, colour):\n    return [1.0] * len(completions)\n"
    )
    with pytest.raises(UserError, match=words):
        trainer(run_config(tmp_path, rewards=rewards), tmp_path)


def test_every_epoch_has_its_own_order_whatever_came_before(tmp_path):
    rows = [{"messages": [say("user", str(n))]} for n in range(9)]
    made = trainer(run_config(tmp_path, rows, rewards=SHORT), tmp_path)
    orders = []
    for epochs in ((0, 1, 2), (2,)):
        sampler = made._get_train_sampler()
        for epoch in epochs:
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
    assert orders[2] == orders[3]
    assert orders[0] != orders[1] != orders[2]
    # Two prompts a step, each four times in a row; the ninth waits for another epoch.
    assert all(len(order) == 32 for order in orders)
    assert all(len(set(order[n : n + 4])) == 1 for order in orders for n in range(0, 32, 4))


def test_too_few_prompts_for_one_step(tmp_path):
    with pytest.raises(UserError, match="there are 1 prompts, and the model answers 2 at once"):
        trainer(run_config(tmp_path, ROWS[:1], rewards=SHORT), tmp_path)


def test_an_evaluation_takes_all_completions_of_a_prompt_together(tmp_path):
    held = {"eval": {"count": 2}}
    config = run_config(
        tmp_path, rewards=SHORT, dataset=held, per_device_train_batch_size=4,
        per_device_eval_batch_size=6,
    )  # fmt: skip
    with pytest.raises(UserError, match="of 6 completions on all processes together, which 4"):
        trainer(config, tmp_path)


def test_completions_need_room(tmp_path):
    with pytest.raises(UserError, match="there is no room for a prompt"):
        prepared(run_config(tmp_path, chat={"max_length": 6}))


def test_a_reward_rises(tmp_path):
    """The model learns to answer with one letter."""
    rewards = [{"regex": {"pattern": "^a+$"}}, {"contains": {"reference": "letter", "weight": 0.3}}]
    rows = [{"messages": [say("user", word)], "letter": "a"} for word in ("x", "y", "z", "w")]
    config = run_config(
        tmp_path, rows, rewards=rewards, max_steps=30, optim="adamw_torch", learning_rate=0.01,
        per_device_train_batch_size=32, num_generations=16, max_completion_length=3,
    )  # fmt: skip
    made = trainer(config, tmp_path)
    made.train()
    reward = [row["reward"] for row in made.state.log_history if "reward" in row]
    assert sum(reward[:3]) / 3 < 0.2
    assert sum(reward[-3:]) / 3 > 0.8


@pytest.mark.parametrize(
    "kwargs", [None, {"every_n_layers": 2}], ids=["all layers", "every second"]
)
def test_recomputed_activations_give_the_same_step(tmp_path, kwargs):
    """TRL turns recomputing off to generate, and on again."""
    from luthier.model.adapters import add_adapter

    norms = []
    for given in (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs},
    ):
        config = run_config(tmp_path, rewards=SHORT, lora={"r": 2}, **given)
        made = trainer(config, tmp_path, add_adapter(model(), {"r": 2}, seed=0))
        made.train()
        norms.append([row["grad_norm"] for row in made.state.log_history if "grad_norm" in row])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0][0] > 0


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_resumed_training_ends_with_the_same_model(tmp_path, method):
    config = run_config(tmp_path, method=method, rewards=SHORT, max_steps=4, save_strategy="steps",
                        save_steps=2, beta=0.0)  # fmt: skip
    whole, again = trainer(config, tmp_path / "a"), trainer(config, tmp_path / "a")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoints/checkpoint-2"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adapters_of_a_quantized_model_stay_float32_and_learn_at_small_rates(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    from luthier.model.adapters import add_adapter

    config = run_config(tmp_path, rewards=SHORT, lora={"r": 2}, max_steps=2, optim="adamw_torch",
                        learning_rate=1e-5, gradient_accumulation_steps=2)  # fmt: skip
    quantized = LlamaForCausalLM.from_pretrained(
        tmp_path / "model",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"},
    )
    net = add_adapter(quantized, {"r": 2, "target_modules": "all-linear"}, seed=0)
    start = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    trainer(config, tmp_path, net).train()
    after = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(not torch.equal(start[n], after[n]) for n in after if "lora_B" in n)
