"""Fused operations of video diffusion transformers, each beside its plain-torch reference.

A leaf: it imports torch, and triton or flash-attn inside the functions that need them, and nothing of sgmd_dist,
diffusers or transformers. The folder above, `kernels/`, is no package and has no `__init__.py`.
"""
