"""Layer 4: what happens in one step. One module a DVC stage."""
