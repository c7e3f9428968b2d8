"""Distillation: the divergence from the teacher by arithmetic, and what a teacher has to share."""

import copy

import pytest
import torch

from helpers.online_trainer import ROWS, prepared, run_config, trainer
from helpers.preference_trainer import model, say, tokenizer
from luthier.errors import UserError
from luthier.train.methods.encoders import make_chat_encoder


@pytest.fixture
def teacher(tmp_path):
    """Another model of the same vocabulary, with wider heads."""
    folder = tmp_path / "teacher"
    model(seed=1, head_dim=16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def student(folder, teacher, rows=ROWS, net=None, **args):
    config = run_config(folder, rows, "distill", rewards=(), teacher=teacher, **args)
    return trainer(config, folder, net)


def distributions(net, seen, row):
    """The log-probabilities of all tokens at each completion token, by plain logits."""
    prompt = seen["prompt_ids"][row][seen["prompt_mask"][row].bool()]
    completion = seen["completion_ids"][row][seen["completion_mask"][row].bool()]
    logits = net(torch.cat([prompt, completion])[None]).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_the_step_is_the_reverse_divergence_from_the_teacher(tmp_path, teacher):
    net = model()
    before, seen = copy.deepcopy(net), []
    made = student(tmp_path, teacher, net=net, per_device_train_batch_size=4)
    generate = made._generate_and_score_completions
    made._generate_and_score_completions = lambda rows: seen.append(generate(rows)) or seen[-1]
    made.train()
    wise = made.teacher_model
    total, tokens = 0, 0
    for row in range(4):
        mine = distributions(before, seen[0], row)
        theirs = distributions(wise, seen[0], row).detach()
        total, tokens = total + (mine.exp() * (mine - theirs)).sum(), tokens + len(mine)
    loss = total / tokens
    loss.backward()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for (name, old), new in zip(before.named_parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(old.data - new.data, old.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_prompts_and_stop_tokens_are_those_of_the_chat_encoder(tmp_path, teacher):
    made = student(tmp_path, teacher, per_device_train_batch_size=4)
    config = run_config(tmp_path, method="distill", rewards=(), teacher=teacher)
    encoder = make_chat_encoder(config, tokenizer())
    assert made.generation_config.eos_token_id == encoder.stop_token_ids
    seen = made._generate_and_score_completions([made.train_dataset[n] for n in (1, 3)])
    pairs = zip(seen["prompt_ids"], seen["prompt_mask"], strict=True)
    found = [ids[mask.bool()].tolist() for ids, mask in pairs]
    assert found == [encoder.prompt(ROWS[1]["messages"][:1]), encoder.prompt(ROWS[3]["messages"])]
    assert len(prepared(config).train) == 4


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, teacher):
    other = tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<other>"]})
    other.save_pretrained(teacher)
    with pytest.raises(UserError, match="'<other>' is no token here and 259 there"):
        student(tmp_path, teacher)


def test_a_teacher_with_another_number_of_outputs_is_refused(tmp_path, teacher):
    wide = model()
    wide.resize_token_embeddings(300)
    wide.save_pretrained(teacher)
    with pytest.raises(UserError, match=r"trainer\.teacher=.*vocab_size 300"):
        student(tmp_path, teacher, per_device_train_batch_size=4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    model().save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    made = student(tmp_path, str(tmp_path / "teacher"), per_device_train_batch_size=4)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_the_divergence_falls(tmp_path, teacher):
    rows = [{"messages": [say("user", letter)]} for letter in "abcdefgh"]
    made = student(
        tmp_path, teacher, rows, max_steps=40, optim="adamw_torch", learning_rate=0.003,
        max_completion_length=3,
    )  # fmt: skip
    made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
