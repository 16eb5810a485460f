"""What one GPU does with our models: `python -m benchmarks.gpu --out FILE`.

Needs PyTorch, Megatron-Core, NumPy and Pillow; Transformer Engine and transformers where they are
installed, and says where they are not. `--tiny` takes every part through on a CPU.
"""
