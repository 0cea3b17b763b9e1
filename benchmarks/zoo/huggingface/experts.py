"""Decoders with experts."""

from __future__ import annotations

from benchmarks.zoo.huggingface.common import MOE, Line, text

LINES: tuple[Line, ...] = (
    ("mixtral", "MixtralForCausalLM", MOE, text),
    ("qwen2-moe", "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 24}, text),
    ("qwen3-moe", "Qwen3MoeForCausalLM", MOE, text),
    ("olmoe", "OlmoeForCausalLM", MOE, text),
    ("phimoe", "PhimoeForCausalLM", MOE, text),
    ("granitemoe", "GraniteMoeForCausalLM", MOE, text),
    (
        "deepseek-v2",
        "DeepseekV2ForCausalLM",
        {
            **MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "topk_group": 1,
            "n_group": 1,
            "head_dim": 8,
        },
        text,
    ),
    (
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        {
            **MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "topk_group": 1,
            "n_group": 1,
        },
        text,
    ),
    ("gpt-oss", "GptOssForCausalLM", {**MOE, "sliding_window": 4}, text),
    (
        "ernie4-5-moe",
        "Ernie4_5_MoeForCausalLM",
        {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        text,
    ),
    ("llama4", "Llama4ForCausalLM", {**MOE, "intermediate_size_mlp": 48, "attention_chunk_size": 8}, text),
)
