"""What pruning costs in accuracy on real models: ``make bench-accuracy``."""
