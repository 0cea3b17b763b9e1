"""Time series."""

from __future__ import annotations

import torch

from benchmarks.zoo.huggingface.common import Line, gpt, text

LINES: tuple[Line, ...] = (
    (
        "patchtst",
        "PatchTSTForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "prediction_length": 4,
        },
        lambda: {"past_values": torch.randn(2, 16, 2)},
    ),
    (
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_layers": 2,
            "prediction_length": 4,
        },
        lambda: {"past_values": torch.randn(2, 16, 2)},
    ),
    ("decision-transformer", "DecisionTransformerGPT2Model", gpt(), text),
)
