"""What is tried on which model, one shot."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.accuracy.sensitivity import shares


@dataclass(frozen=True)
class Experiment:
    """One recipe on one model; ``batches`` of calibration data (0: none).

    ``steps`` of training on the dense model's logits follow, one batch of calibration data each.
    """

    model: str
    title: str
    recipe: str
    saliency: str = "l2"
    batches: int = 0
    steps: int = 0

    @property
    def key(self) -> str:
        """Its name among the results."""
        steps = f"/{self.steps} steps" if self.steps else ""
        return f"{self.model}/{self.recipe}/{self.saliency}/{self.batches}{steps}"


_HEAD = "exclude=('*lm_head*',)"
_FFN = "ChannelPruning(sparsity=0.25, include=('*gate_proj*',), residual=False)"
_FFN_BY_SENSITIVITY = f"ChannelPruning(allocation={shares(0.25)!r}, include=('*gate_proj*',), residual=False)"
_CHANNELS = "ChannelPruning(sparsity={}, residual=False)"
_BY_KL = "ChannelPruning(sparsity={}, allocation='sensitivity:kl', residual=False)"
_BY_ERROR = "ChannelPruning(sparsity={}, allocation='sensitivity', residual=False)"
_INNER = _CHANNELS.format(0.25)
#: the fixed Fourier basis of the voice detector
_BASIS = "exclude=('stft',)"

# what least squares were before their damping was found and rows counted relatively
_LS = "Reconstruction(rows='equal', damping=0.01)"
_LS_ALL = "Reconstruction(layers='all', rows='equal', damping=0.01)"
_LS_OWN = "Reconstruction(towards='own', rows='equal', damping=0.01)"

EXPERIMENTS: tuple[Experiment, ...] = (
    # -- ResNet-20
    Experiment("resnet20", "2:4, magnitude", "NMPattern()"),
    Experiment("resnet20", "2:4, permuted", "NMPattern(permute=True)"),
    Experiment("resnet20", "2:4, Wanda", "Wanda(pattern='2:4')", batches=4),
    Experiment("resnet20", "2:4, SparseGPT", "SparseGPT(pattern='2:4')", batches=4),
    Experiment(
        "resnet20", "2:4, SparseGPT, norms re-estimated",
        "SparseGPT(pattern='2:4'); BatchNormReestimation()", batches=4,
    ),
    Experiment(
        "resnet20", "2:4, SparseGPT, permuted, norms re-estimated",
        "SparseGPT(pattern='2:4', permute=True); BatchNormReestimation()", "wanda", 4,
    ),
    Experiment("resnet20", "50 %, magnitude", "ElementPruning(sparsity=0.5)"),
    Experiment(
        "resnet20", "50 %, SparseGPT, norms re-estimated",
        "SparseGPT(sparsity=0.5); BatchNormReestimation()", batches=4,
    ),
    Experiment("resnet20", "70 %, magnitude", "ElementPruning(sparsity=0.7)"),
    Experiment("resnet20", "70 %, SparseGPT", "SparseGPT(sparsity=0.7)", batches=4),
    Experiment(
        "resnet20", "70 %, SparseGPT, norms re-estimated",
        "SparseGPT(sparsity=0.7); BatchNormReestimation()", batches=4,
    ),
    Experiment("resnet20", "90 %, magnitude", "ElementPruning(sparsity=0.9)"),
    Experiment(
        "resnet20", "90 %, SparseGPT, norms re-estimated",
        "SparseGPT(sparsity=0.9); BatchNormReestimation()", batches=4,
    ),
    Experiment("resnet20", "25 % of inner channels, L2", _INNER),
    Experiment("resnet20", "25 % of inner channels, Wanda", _INNER, "wanda", 4),
    Experiment("resnet20", "25 % of inner channels, OBS", _INNER, "obs", 4),
    Experiment("resnet20", "25 % of inner channels, Taylor", _INNER, "taylor", 4),
    Experiment("resnet20", "25 % of inner channels, FPGM", _INNER, "fpgm"),
    Experiment("resnet20", "25 % of inner channels, gamma", _INNER, "bn"),
    Experiment("resnet20", "the same, OBS, norms", f"{_INNER}; BatchNormReestimation()", "obs", 4),
    Experiment("resnet20", "the same, OBS, biases", f"{_INNER}; BiasCorrection()", "obs", 4),
    Experiment("resnet20", "the same, OBS, least squares", f"{_INNER}; {_LS}", "obs", 4),
    Experiment(
        "resnet20", "the same, OBS, least squares, relative rows, found damping",
        f"{_INNER}; Reconstruction()", "obs", 4,
    ),
    Experiment("resnet20", "the same, OBS, distillation", f"{_INNER}; Distillation()", "obs", 4),
    Experiment(
        "resnet20", "the same, OBS, least squares, norms",
        f"{_INNER}; {_LS_ALL}; BatchNormReestimation()", "obs", 4,
    ),
    Experiment("resnet20", "10 % of inner channels, L2", _CHANNELS.format(0.1)),
    Experiment(
        "resnet20", "10 % of inner channels, OBS, least squares",
        f"{_CHANNELS.format(0.1)}; {_LS}", "obs", 4,
    ),
    Experiment("resnet20", "50 % of inner channels, L2", _CHANNELS.format(0.5)),
    Experiment(
        "resnet20", "50 % of inner channels, OBS, least squares",
        f"{_CHANNELS.format(0.5)}; {_LS}", "obs", 4,
    ),
    Experiment(
        "resnet20", "25 % of inner channels by measured sensitivity, OBS, least squares",
        f"{_BY_KL.format(0.25)}; {_LS}", "obs", 4,
    ),
    Experiment(
        "resnet20", "50 % of inner channels by measured sensitivity, OBS, least squares",
        f"{_BY_KL.format(0.5)}; {_LS}", "obs", 4,
    ),
    # -- VGG
    Experiment("vgg", "2:4, magnitude", "NMPattern()"),
    Experiment(
        "vgg", "2:4, SparseGPT, norms re-estimated",
        "SparseGPT(pattern='2:4'); BatchNormReestimation()", batches=4,
    ),
    Experiment("vgg", "25 % of channels, L2", _CHANNELS.format(0.25)),
    Experiment("vgg", "25 % of channels, OBS", _CHANNELS.format(0.25), "obs", 4),
    Experiment(
        "vgg", "25 % of channels, OBS, least squares",
        f"{_CHANNELS.format(0.25)}; {_LS}", "obs", 4,
    ),
    Experiment("vgg", "50 % of channels, L2", _CHANNELS.format(0.5)),
    Experiment("vgg", "50 % of channels, OBS", _CHANNELS.format(0.5), "obs", 4),
    Experiment(
        "vgg", "50 % of channels, OBS, least squares",
        f"{_CHANNELS.format(0.5)}; {_LS}", "obs", 4,
    ),
    Experiment("vgg", "25 % of channels by measured sensitivity, OBS", _BY_KL.format(0.25), "obs", 4),
    Experiment(
        "vgg", "50 % of channels by measured sensitivity, OBS, least squares",
        f"{_BY_KL.format(0.5)}; {_LS}", "obs", 4,
    ),
    # -- EfficientNet-Lite0
    Experiment("efficientnet_lite0", "30 %, magnitude", "ElementPruning(sparsity=0.3)"),
    Experiment("efficientnet_lite0", "30 %, SparseGPT", "SparseGPT(sparsity=0.3)", batches=8),
    Experiment("efficientnet_lite0", "2:4, SparseGPT", "SparseGPT(pattern='2:4')", batches=8),
    Experiment(
        "efficientnet_lite0", "2:4, SparseGPT, norms re-estimated",
        "SparseGPT(pattern='2:4'); BatchNormReestimation()", batches=8,
    ),
    Experiment("efficientnet_lite0", "10 % of inner channels, L2", _CHANNELS.format(0.1)),
    Experiment(
        "efficientnet_lite0", "10 % of inner channels, OBS, least squares",
        f"{_CHANNELS.format(0.1)}; {_LS}", "obs", 8,
    ),
    # -- MiniLM
    Experiment("minilm", "2:4, magnitude", "NMPattern()"),
    Experiment("minilm", "2:4, magnitude, permuted", "NMPattern(permute=True)"),
    Experiment("minilm", "2:4, Wanda", "Wanda(pattern='2:4')", batches=16),
    Experiment("minilm", "2:4, SparseGPT", "SparseGPT(pattern='2:4')", batches=16),
    Experiment(
        "minilm", "2:4, SparseGPT, permuted", "SparseGPT(pattern='2:4', permute=True)", "wanda", 16
    ),
    Experiment("minilm", "50 %, magnitude", "ElementPruning(sparsity=0.5)"),
    Experiment("minilm", "50 %, Wanda", "Wanda(sparsity=0.5)", batches=16),
    Experiment("minilm", "50 %, SparseGPT", "SparseGPT(sparsity=0.5)", batches=16),
    Experiment("minilm", "25 % of neurons, L2", _INNER),
    Experiment("minilm", "25 % of neurons, Wanda", _INNER, "wanda", 16),
    Experiment("minilm", "25 % of neurons, OBS, least squares", f"{_INNER}; {_LS}", "obs", 16),
    Experiment(
        "minilm", "25 % of neurons, OBS, least squares, relative rows, found damping",
        f"{_INNER}; Reconstruction()", "obs", 16,
    ),
    Experiment(
        "minilm", "25 % of neurons, OBS, least squares, distillation",
        f"{_INNER}; Reconstruction(); Distillation(epochs=5, rate=0.005)", "obs", 16,
    ),
    Experiment(
        "minilm", "25 % of neurons, OBS, least squares without a refit, distillation",
        f"{_INNER}; Reconstruction(refit=False); Distillation(epochs=5, rate=0.005)", "obs", 16,
    ),
    Experiment(
        "minilm", "50 % of neurons, OBS, least squares",
        f"{_CHANNELS.format(0.5)}; {_LS}", "obs", 16,
    ),
    Experiment(
        "minilm", "25 % of neurons by measured sensitivity, OBS, least squares, found damping",
        f"{_BY_ERROR.format(0.25)}; Reconstruction()", "obs", 16,
    ),
    # -- PP-OCR
    Experiment("ppocr_rec", "30 %, magnitude", "ElementPruning(sparsity=0.3)"),
    Experiment("ppocr_rec", "30 %, Wanda", "Wanda(sparsity=0.3)", batches=32),
    Experiment("ppocr_rec", "30 %, SparseGPT", "SparseGPT(sparsity=0.3)", batches=32),
    Experiment("ppocr_rec", "2:4, magnitude", "NMPattern()"),
    Experiment("ppocr_rec", "2:4, SparseGPT", "SparseGPT(pattern='2:4')", batches=32),
    # -- Silero VAD
    Experiment("silero_vad", "50 %, magnitude", f"ElementPruning(sparsity=0.5, {_BASIS})"),
    Experiment("silero_vad", "50 %, SparseGPT", f"SparseGPT(sparsity=0.5, {_BASIS})", batches=4),
    Experiment("silero_vad", "2:4, SparseGPT", f"SparseGPT(pattern='2:4', {_BASIS})", batches=4),
    Experiment("silero_vad", "25 % of channels, L2", f"ChannelPruning(sparsity=0.25, {_BASIS})"),
    Experiment(
        "silero_vad", "25 % of channels, OBS, least squares",
        f"ChannelPruning(sparsity=0.25, {_BASIS}); {_LS}", "obs", 4,
    ),
    Experiment(
        "silero_vad", "50 % of channels, OBS, least squares",
        f"ChannelPruning(sparsity=0.5, {_BASIS}); {_LS}", "obs", 4,
    ),
    # -- SmolLM2
    Experiment("smollm2", "50 %, magnitude", f"ElementPruning(sparsity=0.5, {_HEAD})"),
    Experiment("smollm2", "50 %, Wanda", f"Wanda(sparsity=0.5, {_HEAD})", batches=16),
    Experiment("smollm2", "50 %, SparseGPT", f"SparseGPT(sparsity=0.5, {_HEAD})", batches=16),
    Experiment("smollm2", "2:4, magnitude", f"NMPattern({_HEAD})"),
    Experiment("smollm2", "2:4, Wanda", f"Wanda(pattern='2:4', {_HEAD})", batches=16),
    Experiment("smollm2", "2:4, SparseGPT", f"SparseGPT(pattern='2:4', {_HEAD})", batches=16),
    Experiment(
        "smollm2", "2:4, SparseGPT, permuted",
        f"SparseGPT(pattern='2:4', permute=True, {_HEAD})", "wanda", 16,
    ),
    Experiment("smollm2", "25 % of FFN neurons, Wanda", _FFN, "wanda", 16),
    Experiment("smollm2", "25 % of FFN neurons, OBS", _FFN, "obs", 16),
    Experiment("smollm2", "the same, Wanda, least squares", f"{_FFN}; {_LS}", "wanda", 16),
    Experiment(
        "smollm2", "the same, least squares on its own stream",
        f"{_FFN}; {_LS_OWN}", "wanda", 16,
    ),
    Experiment(
        "smollm2", "the same, OBS, relative rows, found damping, 128 chunks",
        f"{_FFN}; Reconstruction(towards='own')", "obs", 128,
    ),
    Experiment(
        "smollm2", "the same, Wanda, found damping, 128 steps of training on the dense logits",
        f"{_FFN}; Reconstruction(towards='own')", "wanda", 32, steps=128,
    ),
    Experiment(
        "smollm2", "25 % of all FFN neurons by measured sensitivity, OBS, found damping, 128 chunks",
        f"{_FFN_BY_SENSITIVITY}; Reconstruction(towards='own')", "obs", 128,
    ),
    Experiment("smollm2", "2 of 60 blocks", "DepthPruning(sparsity=0.034, rank='influence')", batches=8),
)  # fmt: skip
