"""Scripts whose dated results are committed beside them, in `results/`."""
