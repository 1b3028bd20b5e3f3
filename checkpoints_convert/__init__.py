"""Conversion of PyTorch LLaMA checkpoints: Hugging Face's or Meta's files in, an Orbax checkpoint of the Flax tree out.

Knows files and the model's parameter tree, nothing of pipelines. torch is imported to read pickled files only, and of
transformers the tokenizers only; `verify.logit_difference` takes both.
"""

from checkpoints_convert.cache import convert_cached
from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.conversion import convert
from checkpoints_convert.detection import is_source, open_any, open_source
from checkpoints_convert.hub import local_directory
from checkpoints_convert.hugging_face import export_hugging_face
from checkpoints_convert.hugging_face_export import export
from checkpoints_convert.hugging_face_source import is_hugging_face, open_hugging_face
from checkpoints_convert.store import is_converted, open_checkpoint

__all__ = [
    "Checkpoint",
    "convert",
    "convert_cached",
    "export",
    "export_hugging_face",
    "is_converted",
    "is_hugging_face",
    "is_source",
    "local_directory",
    "open_any",
    "open_checkpoint",
    "open_hugging_face",
    "open_source",
]
