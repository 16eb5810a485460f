"""What a training run needs before it is started: bytes and FLOPs by arithmetic, no PyTorch."""
