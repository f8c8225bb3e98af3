"""FSDP2-native distillation of video diffusion models to a few steps by Score Gradient Matching."""

__version__ = "0.1.0"
