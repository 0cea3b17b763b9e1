"""transformers, imported when needed, quiet and offline."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.zoo.torchvision_ops import define


def transformers() -> Any:
    """The module; it never asks the network and prints no progress bars of its own."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    define()
    import transformers as module

    module.utils.logging.disable_progress_bar()
    module.utils.logging.set_verbosity_error()
    return module
