"""FP8 as formulas: formats, scaling, matrix products."""
