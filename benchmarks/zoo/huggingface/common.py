"""What the tables of Hugging Face architectures share: inputs and tiny configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.zoo.entry import image

VOCABULARY = 96
LENGTH = 12

Options = Mapping[str, Any]
Inputs = dict[str, torch.Tensor]


# -- inputs --------------------------------------------------------------------------------------


def token_ids(length: int = LENGTH) -> torch.Tensor:
    """Token ids [2, length], without the lowest, which are often special."""
    return torch.randint(5, VOCABULARY, (2, length))


def text() -> Inputs:
    """Token ids."""
    return {"input_ids": token_ids()}


def masked_text() -> Inputs:
    """Token ids with a mask that hides the end of one sequence."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, LENGTH - 4 :] = 0
    return {"input_ids": token_ids(), "attention_mask": mask}


def pairs() -> Inputs:
    """Token ids for an encoder and a decoder."""
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids(8)}


def pixels(size: int = 32, channels: int = 3) -> Inputs:
    """Images."""
    return {"pixel_values": image(size, channels=channels)}


def clip() -> Inputs:
    """Token ids and images."""
    return {"input_ids": token_ids(), "pixel_values": image(32)}


def boxed_text() -> Inputs:
    """Token ids, each with a box on a page."""
    corner = torch.randint(0, 500, (2, LENGTH, 2))
    return {"input_ids": token_ids(), "bbox": torch.cat([corner, corner + 100], -1)}


def wave() -> Inputs:
    """Raw sound."""
    return {"input_values": torch.randn(2, 1600)}


def spectrum(bins: int = 16, frames: int = 40, name: str = "input_features") -> Inputs:
    """Mel spectra [2, bins, frames]."""
    return {name: torch.randn(2, bins, frames)}


def frames(bins: int = 16, count: int = 40, name: str = "input_features") -> Inputs:
    """Mel spectra [2, frames, bins]."""
    return {name: torch.randn(2, count, bins)}


def transcribed(inputs: Inputs) -> Inputs:
    """Inputs of an encoder, and token ids for its decoder."""
    return {**inputs, "decoder_input_ids": token_ids(8)}


# -- configurations ------------------------------------------------------------------------------

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA = {
    **TEXT,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    **LLAMA,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
}
PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 7,
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 7,
}
STAGES = {"num_labels": 7}
WAVE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 8, 8],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3,
}
SSM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "text_config": {**TEXT, "projection_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {**VIT, "projection_dim": 16},
    "projection_dim": 16,
}
BACKBONE = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    },
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
}
DETR = {**PAIR, **BACKBONE, "num_queries": 6, "num_labels": 5}


def gpt(**options: Any) -> Options:
    common = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**common, **options}


#: name, class, options of its configuration, inputs
Line = tuple[str, str, Options, Callable[[], Inputs]]
