"""The losses and gradients of TokenTrainer against plain arithmetic on a tiny random model."""

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig

from luthier.errors import UserError
from luthier.train.methods.sft import TokenTrainer

VOCABULARY = 64
# Lengths and prompts differ from row to row, so that any mean of means shows.
SHAPES = [(4, 1), (9, 5), (17, 3), (6, 5), (12, 1), (5, 2), (30, 20), (8, 2)]


def tokenizer():
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="1", eos_token="2")


def rows(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    out = {"input_ids": [], "labels": []}
    for length, prompt in shapes:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        out["input_ids"].append(ids)
        out["labels"].append([-100] * prompt + ids[prompt:])
    return out


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def reference_loss(net, data):
    """The mean over all trained tokens, row by row, with logits and cross entropy."""
    total, count = torch.zeros(()), 0
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        logits = net(torch.tensor([ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
        )
        count += sum(label != -100 for label in labels[1:])
    return total / count


def trainer(net, folder, data, **args):
    settings = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False,
        "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "max_steps": 1,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "prediction_loss_only": True, "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip
    made = TokenTrainer(
        net,
        args=SFTConfig(**(settings | args)),
        train_dataset=Dataset.from_dict(data),
        eval_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
    )
    made.remove_callback(PrinterCallback)
    made.remove_callback(ProgressCallback)
    return made


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
def test_one_step_is_the_same_for_any_split_of_the_batch(tmp_path, batch, accumulation):
    net, data = model(), rows()
    before = copy.deepcopy(net)
    loss = reference_loss(before, data)
    loss.backward()
    made = trainer(net, tmp_path, data, per_device_train_batch_size=batch,
                   gradient_accumulation_steps=accumulation)  # fmt: skip
    made.train()
    logged = next(row for row in made.state.log_history if "loss" in row)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    # With SGD at rate 1 the step is the gradient.
    for (name, old), new in zip(before.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(old.data - new.data, old.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_class_that_takes_no_loss_arguments_gets_the_same_step(tmp_path):
    class Bare(LlamaForCausalLM):
        accepts_loss_kwargs = False

    torch.manual_seed(0)
    net, data = Bare(model().config), rows()
    loss = reference_loss(net, data).item()
    made = trainer(net, tmp_path, data, per_device_train_batch_size=1,
                   gradient_accumulation_steps=8)  # fmt: skip
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_loss_does_not_depend_on_the_batch_size(tmp_path, batch):
    net, data = model(), rows()
    expected = reference_loss(net, data).item()
    made = trainer(net, tmp_path, data, per_device_eval_batch_size=batch)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


SCALED = {
    # what the class does with its logits, and not in its output layer
    "granite": ("GraniteConfig", {"logits_scaling": 0.25}),
    "cohere": ("CohereConfig", {"logit_scale": 4.0}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 0.5, "head_dim": 8}),
    "falcon_h1": ("FalconH1Config", {"lm_head_multiplier": 4.0, "mamba_d_ssm": 32,
                                     "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_the_loss_is_that_of_the_models_own_logits(name, tmp_path):
    config, settings = SCALED[name]
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=1, eos_token_id=2,
            bos_token_id=1, **settings,
        )
    )  # fmt: skip
    net.get_output_embeddings().weight.data.mul_(30)
    data = rows()
    with torch.no_grad():
        expected = reference_loss(net.eval(), data).item()
        # The setting matters: with the output layer's own logits the loss is another one.
        hidden = net.base_model(torch.tensor([data["input_ids"][1]])).last_hidden_state
        logits = net(torch.tensor([data["input_ids"][1]])).logits
        assert (net.get_output_embeddings()(hidden) - logits).abs().max() > 0.1
    made = trainer(net, tmp_path, data, per_device_eval_batch_size=3)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_accuracy_counts_the_positions_of_the_loss(tmp_path):
    net, data = model(), rows()
    right = count = 0
    for ids, labels in zip(data["input_ids"], data["labels"], strict=True):
        guesses = net(torch.tensor([ids])).logits[0, :-1].argmax(-1).tolist()
        pairs = [(g, y) for g, y in zip(guesses, labels[1:], strict=True) if y != -100]
        right, count = right + sum(g == y for g, y in pairs), count + len(pairs)
    metrics = trainer(net, tmp_path, data, per_device_eval_batch_size=3).evaluate()
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(right / count)


def test_a_batch_with_nothing_to_train_is_a_loss_of_zero(tmp_path):
    data = rows([(6, 6), (4, 4)])
    made = trainer(model(), tmp_path, data, per_device_train_batch_size=2)
    made.train()
    assert made.state.log_history[0]["loss"] == 0


def test_a_broken_loss_stops_the_run_with_its_step(tmp_path):
    net = model()
    net.lm_head.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="loss is nan at step 1"):
        trainer(net, tmp_path, rows(), logging_nan_inf_filter=False).train()


def test_adapters_of_a_quantized_model_stay_float32_and_learn_at_small_rates(tmp_path):
    from luthier.model.adapters import add_adapter

    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model().save_pretrained(tmp_path / "base")
    quantized = LlamaForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"},
    )
    net = add_adapter(quantized, {"r": 4, "target_modules": "all-linear"}, seed=0)
    start = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    made = trainer(net, tmp_path, rows(), optim="adamw_torch", learning_rate=1e-5, max_steps=3)
    made.train()
    after = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert {p.dtype for p in after.values()} == {torch.float32}
    assert all(not torch.equal(start[n], after[n]) for n in after)
