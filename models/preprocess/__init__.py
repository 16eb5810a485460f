"""How a model is given images: geometry, tiling, normalisation."""
