"""Several kinds of input."""

from __future__ import annotations

import torch

from benchmarks.zoo.huggingface.common import (
    CLIP,
    TEXT,
    VIT,
    VOCABULARY,
    Line,
    boxed_text,
    clip,
    pixels,
    text,
)

LINES: tuple[Line, ...] = (
    ("clip", "CLIPModel", CLIP, clip),
    ("siglip", "SiglipModel", {"text_config": TEXT, "vision_config": VIT}, clip),
    ("chinese-clip", "ChineseCLIPModel", CLIP, clip),
    ("altclip", "AltCLIPModel", {**CLIP, "text_config": {**TEXT, "project_dim": 16}}, clip),
    (
        "groupvit",
        "GroupViTModel",
        {
            **CLIP,
            "vision_config": {
                **VIT,
                "depths": [1, 1, 1],
                "num_group_tokens": [4, 2, 0],
                "num_output_groups": [4, 2, 2],
            },
            "projection_intermediate_dim": 16,
        },
        clip,
    ),
    (
        "blip-text-vision",
        "BlipModel",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 32, "bos_token_id": 1},
            "vision_config": VIT,
            "projection_dim": 16,
            "image_text_hidden_size": 16,
        },
        clip,
    ),
    ("flava-image", "FlavaImageModel", VIT, pixels),
    (
        "vilt",
        "ViltForMaskedLM",
        {**TEXT, **VIT, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
        clip,
    ),
    (
        "visual-bert",
        "VisualBertModel",
        {**TEXT, "visual_embedding_dim": 16},
        lambda: {**text(), "visual_embeds": torch.randn(2, 4, 16)},
    ),
    (
        "bridgetower",
        "BridgeTowerModel",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "text_config": {**TEXT, "hidden_size": 64},
            "vision_config": {**VIT, "hidden_size": 64},
            "share_link_tower_layers": False,
            "link_tower_type": "add",
        },
        clip,
    ),
    ("owlvit", "OwlViTModel", CLIP, clip),
    ("clipseg", "CLIPSegModel", CLIP, clip),
    ("x-clip-text", "XCLIPTextModel", TEXT, text),
    (
        "layoutlmv3",
        "LayoutLMv3ForSequenceClassification",
        {
            **TEXT,
            "max_2d_position_embeddings": 1024,
            "coordinate_size": 4,
            "shape_size": 8,
            "input_size": 32,
            "patch_size": 8,
            "visual_embed": False,
            "max_position_embeddings": 64,
        },
        boxed_text,
    ),
    ("git-vision", "GitVisionModel", VIT, pixels),
    ("kosmos-text", "BlipTextModel", {**TEXT, "encoder_hidden_size": 32, "bos_token_id": 1}, text),
)
