"""Recovery of a language model by training on what the dense model says (Hinton et al., 2015, section 2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn import functional as F

#: the first steps grow to the full rate: Adam knows nothing yet
WARM = 8


def train(student: nn.Module, teacher: nn.Module, chunks: list[dict[str, Any]], rate: float = 1e-4) -> None:
    """One step of AdamW a chunk, towards the teacher's distribution of every next token.

    ``chunks`` are keyword inputs; the rate falls to zero along a half cosine.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / WARM) * (1 + math.cos(math.pi * step / len(chunks))) / 2

    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    student.eval()  # no dropout: teacher and student see the same
    for chunk in track(chunks, "training on logits"):
        with torch.no_grad():
            wanted = teacher(**chunk).logits.flatten(0, 1).log_softmax(-1)
        got = student(**chunk).logits.flatten(0, 1).log_softmax(-1)
        loss = F.kl_div(got, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        decay.step()
