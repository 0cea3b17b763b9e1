"""Sound."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.zoo.huggingface.common import (
    PAIR,
    TEXT,
    VIT,
    VOCABULARY,
    WAVE,
    Line,
    frames,
    spectrum,
    text,
    transcribed,
    wave,
)

LINES: tuple[Line, ...] = (
    ("wav2vec2", "Wav2Vec2ForCTC", WAVE, wave),
    (
        "wav2vec2-layer-norm",
        "Wav2Vec2ForSequenceClassification",
        {**WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        wave,
    ),
    (
        "wav2vec2-conformer",
        "Wav2Vec2ConformerForSequenceClassification",
        {**WAVE, "position_embeddings_type": "relative"},
        wave,
    ),
    (
        "wav2vec2-bert",
        "Wav2Vec2BertForSequenceClassification",
        {**WAVE, "feature_projection_input_dim": 16, "add_adapter": False},
        frames,
    ),
    ("hubert", "HubertForSequenceClassification", WAVE, wave),
    ("wavlm", "WavLMForSequenceClassification", WAVE, wave),
    ("sew", "SEWForSequenceClassification", {**WAVE, "squeeze_factor": 2}, wave),
    ("unispeech", "UniSpeechForSequenceClassification", WAVE, wave),
    (
        "data2vec-audio",
        "Data2VecAudioForSequenceClassification",
        {**WAVE, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5},
        wave,
    ),
    (
        "whisper",
        "WhisperForConditionalGeneration",
        {**PAIR, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32},
        lambda: transcribed(spectrum()),
    ),
    (
        "speech-to-text",
        "Speech2TextForConditionalGeneration",
        {
            **PAIR,
            "num_mel_bins": 16,
            "input_feat_per_channel": 16,
            "input_channels": 1,
            "conv_channels": 16,
            "max_source_positions": 64,
            "max_target_positions": 32,
        },
        lambda: transcribed(frames()),
    ),
    (
        "moonshine",
        "MoonshineForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "pad_token_id": 0,
            "max_position_embeddings": 64,
        },
        lambda: transcribed(wave()),
    ),
    (
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        {
            **VIT,
            "num_mel_bins": 16,
            "max_length": 40,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
        },
        partial(frames, name="input_values"),
    ),
    (
        "encodec",
        "EncodecModel",
        {
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_dim": 16,
            "codebook_size": 16,
            "upsampling_ratios": [4, 2],
            "num_lstm_layers": 1,
        },
        lambda: {"input_values": torch.randn(2, 1, 320)},
    ),
    (
        "univnet",
        "UnivNetModel",
        {
            "model_in_channels": 8,
            "model_hidden_channels": 8,
            "num_mel_bins": 8,
            "resblock_stride_sizes": [2, 2],
            "resblock_kernel_sizes": [3, 3],
            "resblock_dilation_sizes": [[1, 3], [1, 3]],
            "kernel_predictor_hidden_channels": 8,
            "kernel_predictor_num_blocks": 1,
        },
        lambda: {"input_features": torch.randn(2, 6, 8), "noise_sequence": torch.randn(2, 6, 8)},
    ),
    (
        "speecht5-hifigan",
        "SpeechT5HifiGan",
        {
            "model_in_dim": 8,
            "upsample_initial_channel": 32,
            "upsample_rates": [2, 2],
            "upsample_kernel_sizes": [4, 4],
            "resblock_kernel_sizes": [3, 5],
            "resblock_dilation_sizes": [[1, 3], [1, 3]],
        },
        lambda: {"spectrogram": torch.randn(2, 10, 8)},
    ),
    ("clap-audio", "ClapTextModel", {**TEXT, "projection_dim": 16}, text),
)
