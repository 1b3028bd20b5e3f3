"""Conversion of PyTorch LLaMA checkpoints: Hugging Face directories in, an Orbax checkpoint of the Flax tree out.

Knows files and the model's parameter tree, nothing of pipelines. Neither torch nor transformers is imported, except
by `verify.logit_difference`.
"""

from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.conversion import convert, convert_cached
from checkpoints_convert.hugging_face import export_hugging_face
from checkpoints_convert.report import open_any
from checkpoints_convert.source import is_hugging_face, open_hugging_face
from checkpoints_convert.store import is_converted, open_checkpoint

__all__ = [
    "Checkpoint",
    "convert",
    "convert_cached",
    "export_hugging_face",
    "is_converted",
    "is_hugging_face",
    "open_any",
    "open_checkpoint",
    "open_hugging_face",
]
