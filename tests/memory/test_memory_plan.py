"""Plans and the choices that are made from them."""

import pytest

from helpers.memory_configs import LLAMA_8B, NF4, TINY
from luthier.errors import UserError
from luthier.memory import choose_checkpointing, fits_in_memory, plan_memory, workload
from luthier.memory.advice import advise
from luthier.memory.sharding import Sharding

WIDE = TINY | {"hidden_size": 256, "intermediate_size": 1024}


@pytest.fixture(scope="module")
def wide(shapes):
    return shapes("wide", WIDE)


def parts(estimate):
    return {part.name: part.bytes for part in estimate.parts}


def gpu(gib, count=1):
    return workload.hypothetical_gpus(int(gib * 2**30), count)


@pytest.mark.parametrize("packing", [False, True], ids=["single rows", "packed rows"])
def test_padding_of_documents_that_is_not_counted_is_named(shapes, wide, configured, packing):
    lfm2 = shapes("lfm2", TINY | {"layer_types": ["conv", "full_attention"]}, "Lfm2Config")
    for folder, is_named in ((lfm2, packing), (wide, False)):
        plan = plan_memory(configured(folder, packing=packing), gpu(24))
        assert ("carry a state" in " ".join(plan.workload.assumptions)) == is_named


def test_parts_add_up(wide, configured):
    found = plan_memory(configured(wide, max_length=256), gpu(24))
    named = parts(found.best)
    assert found.best.total == sum(named.values())
    assert named["CUDA context"] == workload.CUDA_CONTEXT
    assert named["adapters float32"] == 4 * found.trained
    assert named["optimizer"] == 2 * 4 * found.trained
    assert found.fits and found.best.room == int(24 * 2**30 * 0.95)


def test_the_process_of_a_cpu_counts_its_libraries(wide, configured):
    named = parts(plan_memory(configured(wide)).best)
    assert named["libraries"] == workload.PROCESS_OVERHEAD
    assert "heap overhead" not in named


def test_the_heap_of_a_cpu_keeps_some_where_nothing_else_was_said(wide, configured, monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    named = parts(plan_memory(configured(wide)).best)
    # On a CPU no logits are left at the peak: the output layer drops them in its forward.
    assert "output layer" not in named
    passing = named["activations"]
    assert named["heap overhead"] == pytest.approx(0.3 * passing, rel=0.01)


def test_checkpoints_keep_the_inputs_of_layers(shapes, configured):
    """Quantized weights with an adapter, as in recipes/qlora_llama."""
    folder = shapes("llama", LLAMA_8B | {"num_hidden_layers": 4})
    config = configured(
        folder, lora={"r": 16}, quantization=NF4, max_length=2048, dtype="bfloat16",
        activation_checkpointing=True,
    )  # fmt: skip
    found = plan_memory(config, gpu(24))
    named = parts(found.best)
    # Each of four layers keeps its input: 2 rows of 2,048 tokens of 4,096 numbers in 16 bits.
    assert named["activations"] > 4 * 2 * 2048 * 4096 * 2
    assert named["activations"] < 3 * 4 * 2 * 2048 * 4096 * 2
    assert "weights nf4" in named and named["weights bfloat16"] > 2 * 2 * 128256 * 4096


def test_checkpointing_is_chosen_only_where_memory_is_short(wide, configured):
    config = configured(wide, max_length=256, per_device_train_batch_size=16)
    kept = plan_memory(config, gpu(80)).best.total
    short = (kept / 0.95 - 2**20) / 2**30
    assert choose_checkpointing(config, gpu(short)) is True
    assert choose_checkpointing(config, gpu(short + 0.1)) is False
    assert not fits_in_memory(config, gpu(short))
    asked = configured(
        wide, max_length=256, per_device_train_batch_size=16, activation_checkpointing="auto"
    )
    assert plan_memory(asked, gpu(short)).workload.checkpointing is not None
    assert fits_in_memory(asked, gpu(short))


@pytest.mark.parametrize(
    ("settings", "longest", "bound"),
    [
        ({}, 97, 97),
        ({}, 0, 512),
        ({}, 600, 512),
        ({"max_length": None}, 97, 97),
        ({"max_length": None}, 0, None),
        ({"pad_to_multiple_of": 64}, 97, 128),
        ({"packing": True}, 97, 512),
        ({"method": "dpo"}, 97, 97),
        ({"method": "grpo"}, 97, 512),
        ({"method": "seq2seq"}, 97, 512),
    ],
    ids=str,
)
def test_rows_that_are_known_bound_the_length(wide, configured, settings, longest, bound):
    config = configured(wide, **{"max_length": 512} | settings)
    assert workload.bound_by_rows(config, longest).chat.max_length == bound


def test_rows_filled_up_to_the_bound_are_as_long_as_it(wide, configured):
    config = configured(wide, max_length=512)
    trainer = config.trainer.model_copy(update={"padding": "max_length"})
    config = config.model_copy(update={"trainer": trainer})
    assert workload.bound_by_rows(config, 97).chat.max_length == 512


def test_short_rows_keep_activations_where_the_bound_would_not(wide, configured):
    config = configured(
        wide, max_length=2048, per_device_train_batch_size=16, activation_checkpointing="auto"
    )
    small = gpu(2)
    assert choose_checkpointing(config, small) is True
    assert choose_checkpointing(workload.bound_by_rows(config, 40), small) is False


def test_advice_names_what_helps_with_its_number(wide, configured):
    config = configured(wide, max_length=256, per_device_train_batch_size=16)
    found = plan_memory(config, gpu(80))
    short = gpu((found.best.total / 0.95 - 2**20) / 2**30)
    given = advise(config, plan_memory(config, short))
    on = next(a for a in given if a.change == "trainer.args.activation_checkpointing=true")
    changed = configured(
        wide, max_length=256, per_device_train_batch_size=16, activation_checkpointing=True
    )
    assert on.fits and on.total == plan_memory(changed, short).best.total
    assert [a.fits for a in given] == sorted((a.fits for a in given), reverse=True)
    words = " ".join(a.change for a in given)
    assert "per_device_train_batch_size=8 trainer.args.gradient_accumulation_steps=2" in words
    assert "quantization=nf4" in words and "chat.max_length=128" in words
    assert "lora.lora_dropout=0" in words


def test_advice_takes_all_together_where_one_is_not_enough(wide, configured):
    config = configured(wide, lora={}, max_length=256, per_device_train_batch_size=16)
    given = advise(config, plan_memory(config, gpu(0.75)))
    assert not any(a.fits for a in given)
    together = [
        a for a in given if "activation_checkpointing=true" in a.change and "optim" in a.change
    ]
    assert "per_device_train_batch_size=1" in together[0].change


def test_a_run_with_room_is_told_that_it_could_be_faster(wide, configured):
    config = configured(wide, activation_checkpointing=True)
    assert [a.change for a in advise(config, plan_memory(config, gpu(24)))] == [
        "trainer.args.activation_checkpointing=false"
    ]
    config = configured(wide)
    assert advise(config, plan_memory(config, gpu(24))) == []


def test_sharding_leaves_each_process_less(wide, configured):
    config = configured(wide, lora={}, dtype="bfloat16")
    kinds = [Sharding(), Sharding("ddp", 4), Sharding("fsdp2", 4), Sharding("fsdp2", 8)]
    one, ddp, four, eight = plan_memory(config, gpu(24, 4), kinds).estimates
    assert parts(ddp)["gradient buckets"] == parts(one)["trained float32"]
    assert parts(four)["optimizer"] == parts(one)["optimizer"] // 4
    assert one.total < ddp.total
    assert eight.total < four.total < one.total


def test_processes_on_a_cpu_share_its_memory():
    one, four = (workload.Hardware("cpu", "memory", 2**34, count) for count in (1, 4))
    assert four.room == one.room // 4


def test_an_open_length_is_assumed_and_said(wide, configured):
    found = plan_memory(configured(wide, max_length=None), gpu(24))
    assert found.workload.length == workload.ASSUMED_LENGTH
    assert "chat.max_length is null" in found.workload.assumptions[0]


SIZES = {
    "24GB": 24 * 2**30,
    "24GiB": 24 * 2**30,
    "1.5 T": 3 * 2**39,
    "512MB": 2**29,
    "80": 80 * 2**30,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_read(text):
    assert workload.parse_size(text, "--memory") == SIZES[text]


@pytest.mark.parametrize("text", ["much", "0GB", "-4GB", "24 XB", "100K"])
def test_what_is_no_size_is_refused_in_words(text):
    with pytest.raises(UserError, match="write the memory of one GPU, such as --memory 24GB"):
        workload.parse_size(text, "--memory")


def test_a_model_that_comes_quantized_by_others_is_refused(shapes, configured):
    made = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UserError, match="the model comes quantized"):
        plan_memory(configured(shapes("gptq", TINY | made)), gpu(24))


def test_a_model_that_comes_packed_by_bitsandbytes_is_as_if_packed_here(shapes, configured):
    made = {"quantization_config": {"quant_method": "bitsandbytes"} | NF4}
    comes = plan_memory(configured(shapes("packed", TINY | made)), gpu(24))
    here = plan_memory(configured(shapes("whole", TINY), quantization=NF4), gpu(24))
    assert parts(comes.best) == parts(here.best)


def test_a_model_that_comes_quantized_can_be_unpacked(shapes, configured):
    made = {"quantization_config": {"quant_method": "fp8"}}
    config = configured(shapes("fp8", TINY | made), quantization={"dequantize": True})
    whole = plan_memory(configured(shapes("whole", TINY)), gpu(24))
    assert parts(plan_memory(config, gpu(24)).best) == parts(whole.best)


def test_dora_on_quantized_weights_is_refused(wide, configured):
    with pytest.raises(UserError, match="use_dora=true on quantized weights"):
        plan_memory(configured(wide, lora={"use_dora": True}, quantization=NF4), gpu(24))


BERT = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
T5 = {"vocab_size": 320, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16}
BART = {
    "vocab_size": 320, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}  # fmt: skip
METHODS = {
    "classes of BERT": ("classify", "BertConfig", BERT),
    "classes of Llama": ("classify", "LlamaConfig", TINY),
    "tags of BERT": ("tag", "BertConfig", BERT),
    "targets of T5": ("seq2seq", "T5Config", T5),
    "targets of BART": ("seq2seq", "BartConfig", BART),
    "rewards of Llama": ("reward", "LlamaConfig", TINY),
    "pairs": ("dpo", "LlamaConfig", TINY),
    "odds of pairs": ("orpo", "LlamaConfig", TINY),
    "verdicts": ("kto", "LlamaConfig", TINY),
    "rewarded replies": ("grpo", "LlamaConfig", TINY),
    "plain texts": ("pretrain", "LlamaConfig", TINY),
}


@pytest.mark.parametrize("lora", [{}, {"r": 4}], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("method, kind, made", METHODS.values(), ids=METHODS)
def test_each_method_is_planned(method, kind, made, lora, shapes, configured):
    config = configured(shapes(method, made, kind), lora=lora, method=method)
    found = plan_memory(config, gpu(24))
    named = parts(found.best)
    assert found.workload.rows == (4 if method in ("dpo", "orpo", "reward") else 2)
    assert named["activations"] > 0
    assert ("reference" in named) == (not lora and method in ("dpo", "kto"))


def test_a_reference_is_a_copy_in_float32(wide, configured):
    named = parts(plan_memory(configured(wide, lora={}, method="dpo"), gpu(24)).best)
    assert named["reference"] == named["trained float32"]


def test_a_teacher_is_counted_by_its_own_config(wide, shapes, configured):
    teacher = shapes("teacher", TINY | {"num_hidden_layers": 4, "tie_word_embeddings": False})
    config = configured(wide, method="distill", teacher=str(teacher), dtype="bfloat16")
    layer = 64 * (64 + 2 * 32 + 64 + 3 * 128) + 2 * 64
    assert parts(plan_memory(config, gpu(24)).best)["teacher"] == 2 * (
        4 * layer + 64 + 2 * 320 * 64
    )


@pytest.mark.parametrize(
    ("quantization", "linear_bits"), [("none", 16), ("nf4", 4)], ids=["as it is", "in 4 bits"]
)
def test_a_reward_model_is_counted_by_its_own_config(
    wide, shapes, configured, quantization, linear_bits
):
    sizes = TINY | {"num_hidden_layers": 4, "id2label": {"0": "score"}}
    folder = shapes("scorer", sizes | {"architectures": ["LlamaForSequenceClassification"]})
    rewards = [{"model": str(folder), "quantization": quantization}, "exact_match"]
    config = configured(wide, method="grpo", rewards=rewards, dtype="bfloat16", num_generations=2)
    linear = 4 * 64 * (64 + 2 * 32 + 64 + 3 * 128)
    others = 4 * 2 * 64 + 64 + 320 * 64 + 64  # norms, the table, the head of one number
    counted = parts(plan_memory(config, gpu(24)).best)["reward models"]
    assert counted == linear * linear_bits // 8 + 2 * others


def test_frozen_weights_need_no_optimizer(wide, configured):
    config = configured(wide, lora={}, model={"freeze": ["embed_tokens", "lm_head"]})
    found = plan_memory(config, gpu(24))
    assert found.trained == found.parameters - 2 * 320 * 256
    assert parts(found.best)["optimizer"] == 8 * found.trained


@pytest.mark.parametrize("lora", [{}, {"r": 4}], ids=["all weights", "LoRA"])
def test_experts_are_planned(lora, shapes, configured):
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    folder = shapes("moe", TINY | experts | {"head_dim": 16}, "Qwen3MoeConfig")
    found = plan_memory(configured(folder, lora=lora, dtype="bfloat16"), gpu(24))
    assert found.parameters > 2 * 4 * 3 * 64 * 32


def test_a_step_that_depends_on_values_is_refused_in_words(shapes, configured, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def depends(self, *args, input_ids=None, **kwargs):
        assert int(input_ids.sum()) == 0
        return forward(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "base_model", property(lambda self: depends_on(self)))

    def depends_on(model):
        return lambda *args, **kwargs: depends(model, *args, **kwargs)

    with pytest.raises(UserError, match="cannot be tried without its weights"):
        plan_memory(configured(shapes("odd", TINY), lora={}), gpu(24))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
FLAT = {
    "bloom": ("BloomConfig", SMALL | {"n_head": 2}),
    "falcon": ("FalconConfig", SMALL | {"num_attention_heads": 2, "alibi": True}),
    "mamba": ("MambaConfig", SMALL | {"state_size": 8}),
}


@pytest.mark.parametrize(("kind", "sizes"), FLAT.values(), ids=FLAT)
def test_models_without_a_mask_for_each_query_are_planned(kind, sizes, shapes, configured):
    folder = shapes(kind, sizes, kind)
    found = plan_memory(configured(folder, model={"attention": "eager"}), gpu(24))
    assert found.workload.masked and found.fits


REFUSED = {
    "Blip2Config": "Blip2 cannot be trained on text alone",
    "Florence2Config": "this is a florence2 model, and transformers has no class",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_plan_refuses_what_a_run_refuses(kind, shapes, configured):
    with pytest.raises(UserError, match=REFUSED[kind]):
        plan_memory(configured(shapes(kind, {}, kind)), gpu(24))


def test_whatever_a_plan_raises_is_told_and_stops_no_run(shapes, configured, monkeypatch, capsys):
    from luthier.memory import plan
    from luthier.train.activation_checkpointing import resolve_auto_checkpointing

    def fails(*args, **kwargs):
        raise KeyError("a layer")

    monkeypatch.setattr(plan, "simulate_step", fails)
    config = configured(shapes("failing", TINY | {"rms_norm_eps": 2e-6}))
    with pytest.raises(
        UserError, match="cannot try a step of this model: KeyError: 'a layer'"
    ) as raised:
        plan_memory(config, gpu(24))
    assert "does not mean that it cannot train" in str(raised.value)
    chosen = resolve_auto_checkpointing(config.with_trainer_args(activation_checkpointing="auto"))
    assert chosen.trainer.args.activation_checkpointing is True
    assert "not planned" in capsys.readouterr().out


def test_packed_rows_keep_no_mask_but_with_attention_that_was_typed(wide, configured):
    settings = {"max_length": 256, "dtype": "bfloat16", "packing": True}
    masked = plan_memory(configured(wide, model={"attention": "sdpa"}, **settings), gpu(24))
    plan = plan_memory(configured(wide, **settings), gpu(24))
    assert (masked.attention, plan.attention) == ("sdpa", "varlen")
    assert masked.workload.masked and not plan.workload.masked
    saved = parts(masked.best)["activations"] - parts(plan.best)["activations"]
    assert saved >= 2 * 2 * 256 * 256 * 2
    typed = configured(wide, model={"attention": "varlen"}, **settings | {"packing": False})
    assert plan_memory(typed, gpu(24)).workload.masked


def test_flash_attention_keeps_no_mask(wide, configured):
    masked = plan_memory(configured(wide, max_length=256, dtype="bfloat16"), gpu(24))
    flash = {"attention": "flash_attention_2"}
    found = plan_memory(configured(wide, max_length=256, dtype="bfloat16", model=flash), gpu(24))
    assert masked.workload.masked and not found.workload.masked
    # Each of two layers keeps a mask of (rows, length, length) in 16 bits with torch's own.
    saved = parts(masked.best)["activations"] - parts(found.best)["activations"]
    assert saved >= 2 * 2 * 256 * 256 * 2
