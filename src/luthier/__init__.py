"""luthier: config-driven fine-tuning with exact chat tokenization."""

__version__ = "0.1.0"
