"""d1lit: post-training of masked diffusion language models by masked SFT and diffu-GRPO."""

__version__ = "0.1.0"
