"""Encoder-decoders."""

from __future__ import annotations

from benchmarks.zoo.huggingface.common import PAIR, T5, VOCABULARY, Line, pairs

LINES: tuple[Line, ...] = (
    ("t5", "T5ForConditionalGeneration", T5, pairs),
    (
        "t5-gated",
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        pairs,
    ),
    ("mt5", "MT5ForConditionalGeneration", T5, pairs),
    ("umt5", "UMT5ForConditionalGeneration", T5, pairs),
    (
        "longt5",
        "LongT5ForConditionalGeneration",
        {**T5, "local_radius": 4, "encoder_attention_type": "local"},
        pairs,
    ),
    (
        "switch-transformers",
        "SwitchTransformersForConditionalGeneration",
        {
            **T5,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
            "expert_capacity": 8,
        },
        pairs,
    ),
    ("bart", "BartForConditionalGeneration", PAIR, pairs),
    ("mbart", "MBartForConditionalGeneration", PAIR, pairs),
    ("pegasus", "PegasusForConditionalGeneration", PAIR, pairs),
    ("marian", "MarianMTModel", PAIR, pairs),
    ("m2m-100", "M2M100ForConditionalGeneration", PAIR, pairs),
    ("blenderbot", "BlenderbotForConditionalGeneration", PAIR, pairs),
    ("plbart", "PLBartForConditionalGeneration", PAIR, pairs),
    (
        "fsmt",
        "FSMTForConditionalGeneration",
        {**PAIR, "langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
        pairs,
    ),
    (
        "prophetnet",
        "ProphetNetModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
        },
        pairs,
    ),
)
