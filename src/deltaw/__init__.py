"""deltaw: adapt pretrained PyTorch models by a small low-rank change beside frozen weights, W' = W + (α/r)·B·A."""

__version__ = "0.1.0"
