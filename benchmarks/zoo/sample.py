"""The models that the tests prune: small, quick, and of every family."""

from __future__ import annotations

from benchmarks.zoo.entry import Path

#: path -> ``SUITE/NAME`` -> the least share of the parameters that must go at 50 %
FLOORS: dict[Path, dict[str, float]] = {
    "torch": {
        "torchvision/efficientnet_b0": 0.66,
        "torchvision/resnet18": 0.72,
        "torchvision/shufflenet_v2_x0_5": 0.54,
        "torchvision/squeezenet1_0": 0.63,
        "timm/convnextv2_atto": 0.70,
        "timm/edgenext_xx_small": 0.70,
        "timm/ghostnet_050": 0.60,
        "timm/mobilenetv3_small_050": 0.56,
        "timm/resnet10t": 0.71,
        "timm/test_vit": 0.39,
        "hf/bart": 0.52,
        "hf/beit": 0.70,
        "hf/bert": 0.71,
        "hf/bloom": 0.70,
        "hf/convbert": 0.66,
        "hf/deberta": 0.62,
        "hf/deepseek-v2": 0.67,
        "hf/falcon": 0.70,
        "hf/fnet": 0.47,
        "hf/gemma3": 0.74,
        "hf/gpt-neox": 0.70,
        "hf/gpt2": 0.72,
        "hf/levit": 0.79,
        "hf/llama": 0.71,
        "hf/mamba2": 0.73,
        "hf/mixtral": 0.73,
        "hf/mobilebert": 0.70,
        "hf/modernbert": 0.74,
        "hf/opt": 0.73,
        "hf/poolformer": 0.71,
        "hf/pvt": 0.72,
        "hf/regnet": 0.82,
        "hf/squeezebert": 0.84,
        "hf/swinv2": 0.62,
        "hf/t5": 0.58,
        "hf/vit": 0.70,
        "hf/xlnet": 0.52,
        "hf/xlstm": 0.72,
    },
    "onnx": {
        "timm/resnet10t": 0.71,
        "timm/test_vit": 0.68,
        "hf/bert": 0.70,
        "hf/gpt2": 0.71,
        "hf/llama": 0.71,
    },
}
