"""State spaces and other recurrences."""

from __future__ import annotations

from benchmarks.zoo.huggingface.common import LLAMA, MOE, SSM, VOCABULARY, Line, text

LINES: tuple[Line, ...] = (
    ("mamba", "MambaForCausalLM", {**SSM, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}, text),
    (
        "mamba2",
        "Mamba2ForCausalLM",
        {**SSM, "expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
        text,
    ),
    (
        "falcon-mamba",
        "FalconMambaForCausalLM",
        {**SSM, "expand": 2, "conv_kernel": 4, "time_step_rank": 4},
        text,
    ),
    (
        "rwkv",
        "RwkvForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "num_hidden_layers": 2,
            "context_length": 64,
            "intermediate_size": 64,
        },
        text,
    ),
    (
        "recurrent-gemma",
        "RecurrentGemmaForCausalLM",
        {**LLAMA, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        text,
    ),
    (
        "jamba",
        "JambaForCausalLM",
        {
            **MOE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        text,
    ),
    (
        "bamba",
        "BambaForCausalLM",
        {
            **LLAMA,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 4,
            "mamba_n_groups": 1,
        },
        text,
    ),
    (
        "qwen3-next",
        "Qwen3NextForCausalLM",
        {
            **MOE,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
        },
        text,
    ),
    (
        "xlstm",
        "xLSTMForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "chunk_size": 4,
            "mode": "train",
        },
        text,
    ),
)
