"""Tiny random models of the families that people fine-tune, saved as their checkpoints are.

Each has the config class of the family, the class that its checkpoints name in `architectures`, and
as many layers as its pattern needs; `save_pretrained` writes the names that files on the hub have.
The weights are drawn so that every part matters: inputs of a layer have a length of about one, and
so has what it adds.
"""

import functools
import json
from dataclasses import dataclass, field

import torch
import transformers

from helpers import task_models
from helpers.chatml import SPECIAL, byte_tokenizer

IMAGE, VIDEO, VISION_START, VISION_END = 259, 260, 261, 262
"""Ids of the tokens that stand for images."""
VOCABULARY = 272
"""Rows of the embeddings, a few more than the tokenizer has tokens, as in real models."""
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_IMAGES = {
    "image_token_id": IMAGE, "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16,
    "out_hidden_size": 64, "num_position_embeddings": 16,
}  # fmt: skip
PIXEL_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
SWITCHED = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
"""Gated linear attention in one layer, and attention in the other."""
MROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 8,
}  # fmt: skip
FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
CHUNKS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 16}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 16}
GEMMA_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class ModelFamily:
    """A family has its classes and their settings; `text` are those of a wrapper's text part."""

    architecture: str
    """The class that checkpoints of the family name."""
    config: str
    """The class of its configuration."""
    settings: dict = field(default_factory=dict)
    """Settings beside `SIZES`, or beside those of the text part where there is one."""
    text: dict | None = None
    """Settings of a wrapper's text part beside `SIZES`; None for a model without images."""
    tower: dict = field(default_factory=dict)
    """Settings of a wrapper's vision tower."""
    processor: str | None = None
    """The class of the image processor whose file the checkpoint has."""
    method: str = "sft"
    """The training method that its checkpoints are for."""
    removed: tuple[str, ...] = ()
    """Entries of `SIZES` that the configuration does not know."""


def _wrapper(architecture, config, text, tower, processor=None, **settings):
    return ModelFamily(architecture, config, settings, text, tower, processor)


FAMILIES = {
    "llama": ModelFamily("LlamaForCausalLM", "LlamaConfig"),
    "llama4": _wrapper(
        "Llama4ForConditionalGeneration", "Llama4Config",
        {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96,
         "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]},
        PIXEL_TOWER | {"vision_output_dim": 32, "projector_input_dim": 32, "intermediate_size": 128,
                       "projector_output_dim": 32},
        image_token_index=IMAGE, boi_token_index=VISION_START, eoi_token_index=VISION_END,
    ),
    "llama4_text": ModelFamily(
        "Llama4ForCausalLM", "Llama4TextConfig",
        {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96,
         "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]},
    ),
    "qwen2": ModelFamily("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ModelFamily("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": ModelFamily("Qwen3MoeForCausalLM", "Qwen3MoeConfig", FOUR | {"head_dim": 16}),
    "qwen3_next": ModelFamily(
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        FOUR | SWITCHED | {"shared_expert_intermediate_size": 32},
    ),
    "qwen3_5": _wrapper(
        "Qwen3_5ForConditionalGeneration", "Qwen3_5Config",
        SWITCHED | {"rope_parameters": MROPE | {"partial_rotary_factor": 0.25,
                                                "mrope_section": [2, 1, 1],
                                                "mrope_interleaved": True}},
        QWEN_TOWER, "Qwen2VLImageProcessorPil", **QWEN_IMAGES,
    ),
    "qwen3_5_moe": _wrapper(
        "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig",
        FOUR | SWITCHED | {"shared_expert_intermediate_size": 32,
                           "rope_parameters": MROPE | {"partial_rotary_factor": 0.25,
                                                       "mrope_section": [2, 1, 1],
                                                       "mrope_interleaved": True}},
        QWEN_TOWER, "Qwen2VLImageProcessorPil", **QWEN_IMAGES,
    ),
    "qwen3_vl": _wrapper(
        "Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
        {"head_dim": 16, "rope_parameters": MROPE | {"mrope_section": [4, 2, 2],
                                                     "mrope_interleaved": True}},
        QWEN_TOWER | {"deepstack_visual_indexes": [0]}, "Qwen2VLImageProcessorPil", **QWEN_IMAGES,
    ),
    "qwen3_vl_moe": _wrapper(
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        FOUR | {"head_dim": 16, "rope_parameters": MROPE | {"mrope_section": [4, 2, 2],
                                                            "mrope_interleaved": True}},
        QWEN_TOWER | {"deepstack_visual_indexes": [0]}, "Qwen2VLImageProcessorPil", **QWEN_IMAGES,
    ),
    "qwen2_5_vl": _wrapper(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        {**QWEN_TOWER, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [0]},
        "Qwen2VLImageProcessorPil", **QWEN_IMAGES,
    ),
    "mistral": ModelFamily("MistralForCausalLM", "MistralConfig", {"sliding_window": 16}),
    "mixtral": ModelFamily("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "mistral3": _wrapper(
        "Mistral3ForConditionalGeneration", "Mistral3Config",
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        PIXEL_TOWER | {"model_type": "pixtral"}, "PixtralImageProcessorPil",
        image_token_index=IMAGE, tie_word_embeddings=False,
    ),
    "ministral3": _wrapper(
        "Mistral3ForConditionalGeneration", "Mistral3Config",
        {"model_type": "ministral3", "head_dim": 16,
         "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
        PIXEL_TOWER | {"model_type": "pixtral"}, "PixtralImageProcessorPil",
        image_token_index=IMAGE, tie_word_embeddings=False,
    ),
    "gpt_oss": ModelFamily(
        "GptOssForCausalLM", "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
         "rope_parameters": YARN},
    ),
    "deepseek_v3": ModelFamily(
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32,
         "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
         "num_key_value_heads": 4},
    ),
    "glm4_moe": ModelFamily(
        "Glm4MoeForCausalLM", "Glm4MoeConfig",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "first_k_dense_replace": 1, "use_qk_norm": True},
    ),
    "gemma2": ModelFamily("Gemma2ForCausalLM", "Gemma2Config", GEMMA | GEMMA_LAYERS
                          | {"query_pre_attn_scalar": 16}),
    "gemma3": _wrapper(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        GEMMA | GEMMA_LAYERS | {"query_pre_attn_scalar": 16},
        PIXEL_TOWER | {"model_type": "siglip_vision_model"}, "Gemma3ImageProcessorPil",
        image_token_index=IMAGE, boi_token_index=VISION_START, eoi_token_index=VISION_END,
        mm_tokens_per_image=4,
    ),
    "gemma3_text": ModelFamily("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA | GEMMA_LAYERS
                               | {"query_pre_attn_scalar": 16}),
    "gemma4": _wrapper(
        "Gemma4ForConditionalGeneration", "Gemma4Config",
        GEMMA | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 32,
                 "layer_types": GEMMA_LAYERS["layer_types"] * 2, "use_double_wide_mlp": True,
                 "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16},
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 2, "position_embedding_size": 64,
         "use_clipped_linears": True},
        "Gemma4ImageProcessorPil", image_token_id=IMAGE, video_token_id=VIDEO,
        boi_token_id=VISION_START, eoi_token_id=VISION_END, boa_token_id=263, eoa_token_index=264,
        audio_token_id=265, audio_config=None,
    ),
    "gemma4_moe": _wrapper(
        "Gemma4ForConditionalGeneration", "Gemma4Config",
        GEMMA | GEMMA_LAYERS | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                "moe_intermediate_size": 32, "attention_k_eq_v": True,
                                "global_head_dim": 32, "num_global_key_value_heads": 1,
                                "hidden_size_per_layer_input": 0},
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 2, "position_embedding_size": 64},
        "Gemma4ImageProcessorPil", image_token_id=IMAGE, video_token_id=VIDEO,
        boi_token_id=VISION_START, eoi_token_id=VISION_END, boa_token_id=263, eoa_token_index=264,
        audio_token_id=265, audio_config=None,
    ),
    "muse_glimmer": _wrapper(
        "MuseGlimmerForConditionalGeneration", "MuseGlimmerConfig",
        {"head_dim": 16, "sliding_window": 16, "output_multiplier": 0.5},
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 2, "pos_emb_height": 4, "pos_emb_width": 4,
         "max_position_embeddings": 16},
        image_token_id=IMAGE, video_token_id=VIDEO, out_hidden_size=128, projector_hidden_size=48,
    ),
    "phi3": ModelFamily("Phi3ForCausalLM", "Phi3Config"),
    "cohere2": ModelFamily("Cohere2ForCausalLM", "Cohere2Config", GEMMA_LAYERS
                           | {"tie_word_embeddings": True, "sliding_window": 16,
                              "logit_scale": 0.5}),
    "olmo3": ModelFamily("Olmo3ForCausalLM", "Olmo3Config", GEMMA_LAYERS | {"sliding_window": 16}),
    "smollm3": ModelFamily("SmolLM3ForCausalLM", "SmolLM3Config",
                           {"tie_word_embeddings": True, "no_rope_layers": [1, 0]}),
    "exaone4": ModelFamily("Exaone4ForCausalLM", "Exaone4Config",
                           GEMMA_LAYERS | {"sliding_window": 16}),
    "granite_moe_hybrid": ModelFamily(
        "GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig",
        MAMBA | CHUNKS | {"num_local_experts": 4, "num_experts_per_tok": 2,
                          "shared_intermediate_size": 32, "intermediate_size": 32,
                          "layer_types": ["linear_attention", "full_attention"]},
    ),
    "falcon": ModelFamily("FalconForCausalLM", "FalconConfig", {"tie_word_embeddings": True},
                          removed=("intermediate_size", "num_key_value_heads")),
    "falcon_h1": ModelFamily("FalconH1ForCausalLM", "FalconH1Config",
                             MAMBA | CHUNKS | {"mamba_d_ssm": 128}),
    "mamba2": ModelFamily(
        "Mamba2ForCausalLM", "Mamba2Config",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
        removed=("intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings"),
    ),
    "nemotron_h": ModelFamily(
        "NemotronHForCausalLM", "NemotronHConfig",
        {"layer_types": ["linear_attention", "moe", "full_attention", "mlp"], "head_dim": 16,
         "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1,
         "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
        removed=("num_hidden_layers",),
    ),
    "lfm2": ModelFamily("Lfm2ForCausalLM", "Lfm2Config",
                        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32,
                         "tie_word_embeddings": True}),
    "lfm2_moe": ModelFamily(
        "Lfm2MoeForCausalLM", "Lfm2MoeConfig",
        FOUR | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1,
                "tie_word_embeddings": True},
    ),
    "jamba": ModelFamily(
        "JambaForCausalLM", "JambaConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2,
         "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
         "mamba_d_state": 8},
    ),
    "gpt2": ModelFamily(
        "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        removed=("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings"),
    ),
    "gpt_neox": ModelFamily("GPTNeoXForCausalLM", "GPTNeoXConfig",
                            removed=("num_key_value_heads",)),
    "bloom": ModelFamily(
        "BloomForCausalLM", "BloomConfig", {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
        removed=("intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings"),
    ),
    "stablelm": ModelFamily("StableLmForCausalLM", "StableLmConfig"),
    "t5": ModelFamily(
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
         "dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": 1,
         "tie_word_embeddings": True},
        method="seq2seq",
        removed=("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "bos_token_id"),
    ),
    "bart": ModelFamily(
        "BartForConditionalGeneration", "BartConfig",
        {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
         "dropout": 0.0, "decoder_start_token_id": 1, "eos_token_id": 1,
         "bos_token_id": 0, "forced_eos_token_id": None,
         "tie_word_embeddings": True},
        method="seq2seq",
        removed=("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads"),
    ),
    "bert": ModelFamily(
        "BertForMaskedLM", "BertConfig",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
         "tie_word_embeddings": True},
        method="classify", removed=("num_key_value_heads", "bos_token_id", "eos_token_id"),
    ),
    "modernbert": ModelFamily(
        "ModernBertForMaskedLM", "ModernBertConfig",
        {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 16,
         "cls_token_id": 1, "sep_token_id": 2, "tie_word_embeddings": True},
        method="classify", removed=("num_key_value_heads",),
    ),
}  # fmt: skip
"""The families by a short name."""


def family_tokenizer(name):
    """The tokenizer of a family: bytes with ChatML's control tokens, and those of images."""
    kinds = {"seq2seq": task_models.unigram, "classify": task_models.wordpiece}
    return kinds.get(FAMILIES[name].method, _byte_tokenizer)()


@functools.cache
def _byte_tokenizer():
    return byte_tokenizer(
        SPECIAL, ("<|image|>", "<|video|>", "<|vision_start|>", "<|vision_end|>"),
        bos_token="<|im_start|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        cls_token="<|im_start|>", sep_token="<|im_end|>", model_max_length=256,
    )  # fmt: skip


def family_config(name):
    """The configuration of a tiny model of the family."""
    family = FAMILIES[name]
    make = getattr(transformers, family.config)
    if family.text is not None:
        text = SIZES | family.text
        tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
        return make(text_config=text, vision_config=family.tower, **tied | family.settings)
    sizes = {key: value for key, value in SIZES.items() if key not in family.removed}
    if family.method != "sft":
        sizes["vocab_size"] = len(family_tokenizer(name))
    return make(**sizes | family.settings)


def make_family_model(name):
    """A random model of the family in float32, of the class that its checkpoints name."""
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[name].architecture)(family_config(name))
    draw_weights(model)
    return model.eval()


def draw_weights(model):
    """Draw all weights anew, so that each of them changes the logits.

    What the class itself draws is mostly so small that logits are alike, norms all one, and biases
    nothing.
    """
    torch.manual_seed(1)
    embeddings = [model.get_input_embeddings().weight]
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if not weight.is_floating_point() or "inv_freq" in name:
            continue
        if "e_score_correction_bias" in name or "expert_bias" in name:
            weight.data = 0.1 * torch.randn(weight.shape)
        elif isinstance(weight, torch.nn.Parameter):
            # A lone number, a norm or a bias stays near to what the class gives it.
            scale = 0.1 if weight.dim() < 2 else weight.shape[-1] ** -0.5
            is_embedding = any(weight is each for each in embeddings)
            near = weight.data if weight.dim() < 2 or "A_log" in name else 0
            scale = 0.1 if is_embedding else 0.1 if "A_log" in name else scale
            weight.data = near + scale * torch.randn(weight.shape)


def save_family(folder, name):
    """A checkpoint of the family in a folder: weights, configuration, tokenizer, processor."""
    family = FAMILIES[name]
    model = make_family_model(name)
    model.save_pretrained(folder)
    family_tokenizer(name).save_pretrained(folder)
    if family.processor is not None:
        getattr(transformers, family.processor)().save_pretrained(folder)
    elif family.text is not None:
        # Image processors that need torchvision are not made here; their file is carried as it is.
        settings = {"image_processor_type": family.architecture.partition("For")[0]}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
