"""Models whose weights stay on disk: read one by one, pruned layer by layer, written one by one."""

from sparsecc.checkpoint.load import load_checkpoint
from sparsecc.checkpoint.meta import parameters_on_meta
from sparsecc.checkpoint.prune import PrunedCheckpoint, prune_checkpoint
from sparsecc.checkpoint.shards import Shards

__all__ = ["PrunedCheckpoint", "Shards", "load_checkpoint", "parameters_on_meta", "prune_checkpoint"]
