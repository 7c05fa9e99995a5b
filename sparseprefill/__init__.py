"""Training-free sparse attention for the prefill of long-context language models."""

__version__ = "0.1.0"
