"""Conversion of PyTorch LLaMA checkpoints: Hugging Face directories in, an Orbax checkpoint of the Flax tree out."""
