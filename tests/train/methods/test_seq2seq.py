"""Encoder-decoder models: losses against plain arithmetic, targets that end, generated targets."""

import json

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from helpers.task_models import (
    ASSETS,
    bert,
    built,
    config_of,
    run,
    saved,
    t5,
    unigram,
    wordpiece,
)
from luthier.config.cross_checks import check_combinations
from luthier.config.passthrough import check_pass_through as check_passthrough
from luthier.errors import UserError
from luthier.infer.generate import generate
from luthier.model.adapters import add_adapter
from luthier.train.methods.encoders import make_seq2seq_prompts

ROWS = [
    {"source": "where is my card", "target": "in Paris"},
    {"source": "a lute", "target": "a plucked instrument, and a luthier in Cremona makes it"},
    {"source": "Anna Bell found a luthier in Cremona, and a lute", "target": "found"},
    {"source": "violins", "target": "guitars and violins"},
]
HELD = [
    {"source": "where is it", "target": "lost in Paris"},
    {"source": "Anna found violins and guitars", "target": "a lute"},
    {"source": "my card", "target": "Bell found it, I lost it"},
]
PAD, END = 0, 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("t5"), t5, unigram())


def made(folder, model, rows=ROWS, held=None, adapt=None, **also):
    return built(config_of("seq2seq", folder, model, rows, held, **also), unigram(), adapt)


def plain(net, tokenizer, row):
    """The logits and the labels of one row, without padding."""
    source = torch.tensor([tokenizer(row["source"])["input_ids"]])
    labels = torch.tensor([tokenizer(text_target=row["target"])["input_ids"]])
    assert labels[0].tolist().count(END) == 1
    decoder = torch.cat([torch.tensor([[PAD]]), labels[:, :-1]], dim=1)
    net.eval()
    return net(input_ids=source, decoder_input_ids=decoder).logits[0], labels[0]


def plain_loss(net, tokenizer, rows):
    logits, labels = zip(*(plain(net, tokenizer, row) for row in rows), strict=True)
    return cross_entropy(torch.cat(logits), torch.cat(labels))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_evaluation_is_the_mean_over_all_tokens(tmp_path, model, size):
    trainer, _ = made(tmp_path, model, held=HELD, args={"per_device_eval_batch_size": size})
    found = trainer.evaluate()
    expected = float(plain_loss(trainer.model, unigram(), HELD))
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    pairs = [plain(trainer.model, unigram(), row) for row in HELD]
    right = sum(int((logits.argmax(dim=-1) == labels).sum()) for logits, labels in pairs)
    tokens = sum(len(labels) for _, labels in pairs)
    assert found["eval_mean_token_accuracy"] == pytest.approx(right / tokens)


@pytest.mark.parametrize(("size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, model, size, accumulate):
    args = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate,
        "max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0, "logging_steps": 1,
    }  # fmt: skip
    trainer, _ = made(tmp_path, model, args=args)
    weight = trainer.model.shared.weight
    loss = plain_loss(trainer.model, unigram(), ROWS)
    (gradient,) = torch.autograd.grad(loss, weight)
    before = weight.detach().clone()
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged == [pytest.approx(float(loss.detach()), rel=1e-5)]
    torch.testing.assert_close(weight.detach(), before - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_labels_are_padded_apart_from_sources(tmp_path, model):
    trainer, _ = made(tmp_path, model, args={"per_device_train_batch_size": 4})
    batch = next(iter(trainer.get_train_dataloader()))
    ends = (batch["labels"] == END).sum(dim=1)
    assert ends.tolist() == [1] * 4
    assert (batch["labels"] == PAD).sum() == 0
    assert batch["items"].tolist() == (batch["labels"] != -100).sum(dim=1).tolist()
    lengths = batch["attention_mask"].sum(dim=1)
    assert (batch["input_ids"][torch.arange(4), lengths - 1] == END).all()


def test_replies_are_the_same_alone_and_side_by_side(tmp_path, model):
    trainer, _ = made(tmp_path, model, args={"max_steps": 30, "learning_rate": 1e-2})
    trainer.train()
    config = config_of("seq2seq", tmp_path, model, ROWS, chat={"max_length": 9})
    sources = make_seq2seq_prompts(config, unigram())
    prompts = [sources.prompt([{"role": "user", "content": row["source"]}]) for row in ROWS]
    assert max(map(len, prompts)) == 9
    assert all(prompt[-1] == END for prompt in prompts)
    how = {"stop_ids": sources.stop_token_ids, "pad_id": PAD, "max_new_tokens": 12}
    together = generate(trainer.model, prompts, batch_size=4, **how)
    alone = [generate(trainer.model, [prompt], batch_size=1, **how)[0] for prompt in prompts]
    assert together == alone
    greedy = transformers.GenerationConfig(
        max_new_tokens=12, do_sample=False, pad_token_id=PAD, eos_token_id=END
    )
    for prompt, reply in zip(prompts, together, strict=True):
        out = trainer.model.generate(torch.tensor([prompt]), generation_config=greedy)[0, 1:]
        ids = out.tolist()
        assert reply == (ids[: ids.index(END)] if END in ids else ids)
    assert any(together)


def test_an_adapter_on_an_encoder_decoder_model(tmp_path, model):
    def adapt(net):
        return add_adapter(net, {"r": 4}, 0, "SEQ_2_SEQ_LM")

    args = {"max_steps": 2, "learning_rate": 1e-2}
    trainer, _ = made(tmp_path, model, held=HELD, adapt=adapt, args=args)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trainable and all(p.dtype == torch.float32 for p in trainable)
    assert trainer.evaluate()["eval_loss"] < before


def bart(vocabulary, **more):
    settings = {
        "vocab_size": vocabulary, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "max_position_embeddings": 16, "pad_token_id": PAD,
        "eos_token_id": END, "bos_token_id": None, "forced_eos_token_id": None,
    }  # fmt: skip
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**settings | more))


def test_sources_and_targets_longer_than_the_model(tmp_path):
    model = saved(tmp_path / "bart", bart, unigram(), decoder_start_token_id=END)
    long = {"source": "a lute", "target": "a lute and a lute and a lute and a lute and a lute"}
    with pytest.raises(UserError, match=r"longest row has \d+ tokens, and the model has 16 pos"):
        made(tmp_path, model, [*ROWS[:1], long])
    trainer, _ = made(tmp_path, model, [*ROWS[:1], long], chat={"max_length": 16})
    batch = next(iter(trainer.get_train_dataloader()))
    # The cut target has no end.
    assert sorted((batch["labels"] == END).sum(dim=1).tolist()) == [0, 1]


def m2m100(vocabulary, **more):
    settings = {
        "vocab_size": vocabulary, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END,
        "decoder_start_token_id": PAD, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**settings | more))


def test_a_model_that_shifts_labels_only_by_itself(tmp_path):
    model = saved(tmp_path / "m2m100", m2m100, unigram())
    args = {"per_device_eval_batch_size": 3}
    trainer, _ = made(tmp_path, model, held=HELD, args=args)
    expected = float(plain_loss(trainer.model, unigram(), HELD))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_models_that_do_not_do_in_words(tmp_path):
    model = saved(tmp_path / "bert", bert, wordpiece())
    with pytest.raises(UserError, match=r"needs an encoder-decoder model.*none of the type bert"):
        built(config_of("seq2seq", tmp_path, model, ROWS), unigram())
    model = saved(tmp_path / "bart", bart, unigram(), decoder_start_token_id=None)
    with pytest.raises(UserError, match=r"model\.kwargs\.decoder_start_token_id=ID"):
        built(config_of("seq2seq", tmp_path, model, ROWS), unigram())


def test_settings_that_are_not_for_it_in_words():
    trainer = {"method": "seq2seq", "args": {"predict_with_generate": True}}
    resolved = {"trainer": trainer, "dataset": {"streaming": True, "eval": {"count": 3}}}
    (mistake,) = check_passthrough(resolved)
    assert mistake.key == "trainer.args.predict_with_generate"
    assert "use trainer.evaluation.metrics" in mistake.text
    (mistake,) = check_combinations(resolved)
    assert (mistake.key, "needs all rows" in mistake.text) == ("dataset.streaming", True)
    trainer = {"method": "classify", "evaluation": {"metrics": ["exact_match"]}}
    (mistake,) = check_combinations({"trainer": trainer, "dataset": {"eval": {"count": 3}}})
    assert "trains a model that writes none" in mistake.text


@pytest.mark.train
@pytest.mark.long
@pytest.mark.skipif(not ASSETS, reason="LUTHIER_ASSETS is not set")
def test_disfl_qa_trains(tmp_path):
    data = ASSETS / "datasets" / "seq2seq"
    lines = (data / "disfl_qa_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["target"] for line in lines]
    model = saved(tmp_path / "t5", t5, unigram(texts, 1000), size=64)
    _, results = run(
        tmp_path, "trainer=seq2seq", "model=hub", f"model.path={model}", "model.device=cpu",
        "model.dtype=float32", "dataset=files", f"dataset.path={data}/disfl_qa_train.jsonl",
        "dataset.eval.share=null", f"dataset.eval.path={data}/disfl_qa_dev.jsonl",
        "trainer.args.learning_rate=5e-3", "trainer.args.max_steps=100",
        "trainer.evaluation.rows=16", "trainer.evaluation.max_new_tokens=24",
        "trainer.evaluation.metrics=[rouge1]",
        "trainer.args.per_device_train_batch_size=32",
    )  # fmt: skip
    loss = results["eval_loss"]
    assert loss["after"] < loss["before"] - 2
    assert results["rouge1"]["after"] > results["rouge1"]["before"] + 0.1
