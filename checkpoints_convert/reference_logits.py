"""A source's logits by code that is not ours: Hugging Face's model, or for Meta's files Meta's own computation.

The one module that imports model classes of transformers. Meta's is written here in torch, after the model that comes
with the release (github.com/meta-llama/llama3, `llama/model.py`): neighbouring pairs of a head are rotated as complex
numbers, so nothing of its weights is permuted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.hugging_face_source import HARMLESS, HuggingFaceCheckpoint
from checkpoints_convert.meta import MetaCheckpoint
from checkpoints_convert.source import SourceCheckpoint
from pipedec_jax.config import Llama3Scaling, LlamaConfig

if TYPE_CHECKING:
    import torch


def reference_logits(source: SourceCheckpoint, prompt: np.ndarray, dtype: str) -> np.ndarray:
    """Logits `[1, T, V]` of the token ids `prompt` `[1, T]`, computed in float32 with weights rounded to `dtype`.

    Holds a Hugging Face model in memory, of Meta's a matrix at a time.

    Raises:
        ImportError: when torch, or transformers with its model classes, is not installed.
    """
    if isinstance(source, MetaCheckpoint):
        return _meta_logits(source, prompt, dtype)
    if not isinstance(source, HuggingFaceCheckpoint):
        raise TypeError(f"there is no other model of the format {source.format}")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # From the tensors themselves: from a directory, the library reads some indexes not that we (and older ones) do.
    weights = {
        name: _tensor(source.weights.view(name), dtype)
        for name, info in source.weights.tensors.items()
        if info.dtype in DTYPES and not HARMLESS.fullmatch(name)
    }
    theirs: Any = getattr(transformers, source.family.architecture)
    found: Any = theirs.from_pretrained(
        None,
        config=theirs.config_class.from_pretrained(source.directory),
        state_dict=weights,
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, loaded = found
    if unlike := {kind: sorted(names) for kind, names in loaded.items() if names}:
        raise ValueError(f"Hugging Face's model takes other tensors than {source.directory} has: {unlike}")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(prompt).long()).logits.numpy()


def _meta_logits(source: MetaCheckpoint, prompt: np.ndarray, dtype: str) -> np.ndarray:
    import torch
    from torch.nn.functional import silu

    config, tokens = source.config, torch.from_numpy(prompt[0]).long()

    def weight(path: str) -> torch.Tensor:
        return _tensor(source.merged(path), dtype)

    def norm(x_TD: torch.Tensor, path: str) -> torch.Tensor:
        return x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True) + config.norm_eps) * weight(path)

    def heads(x_TD: torch.Tensor, path: str) -> torch.Tensor:
        return (x_TD @ weight(path).T).view(len(tokens), -1, config.head_size)

    with torch.no_grad():
        turns_TA = _turns(config, len(tokens))
        mask_TT = torch.full((len(tokens), len(tokens)), -math.inf).triu(1)
        h_TD = weight("embedding")[tokens]
        for layer in (f"layers/{index}" for index in range(config.layers)):
            x_TD = norm(h_TD, f"{layer}/attention_norm")
            q_THA, k_TGA = (_rotated(heads(x_TD, f"{layer}/{name}"), turns_TA) for name in ("query", "key"))
            v_TGA = heads(x_TD, f"{layer}/value")
            k_THA, v_THA = (kv.repeat_interleave(config.heads // config.kv_heads, 1) for kv in (k_TGA, v_TGA))
            scores_HTT = torch.einsum("thd,shd->hts", q_THA, k_THA) / math.sqrt(config.head_size) + mask_TT
            mixed_THA = torch.einsum("hts,shd->thd", scores_HTT.softmax(-1), v_THA)
            h_TD = h_TD + mixed_THA.reshape(len(tokens), -1) @ weight(f"{layer}/output").T
            x_TD = norm(h_TD, f"{layer}/feed_forward_norm")
            gate_TF = silu(x_TD @ weight(f"{layer}/gate").T)
            h_TD = h_TD + (gate_TF * (x_TD @ weight(f"{layer}/up").T)) @ weight(f"{layer}/down").T
        head = "embedding" if config.tied_embeddings else "head"
        return (norm(h_TD, "final_norm") @ weight(head).T)[None].numpy()


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A copy rounded to `dtype`, in float32."""
    import torch

    # torch takes no bfloat16 of NumPy's; float32 holds every value.
    return torch.from_numpy(np.array(array, np.float32)).to(getattr(torch, dtype)).float()


def _turns(config: LlamaConfig, length: int) -> torch.Tensor:
    """The complex number by which each pair of a head is multiplied at each position: `[T, A / 2]`."""
    import torch

    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_size, 2).float() / config.head_size)
    scaling = config.rope_scaling
    if isinstance(scaling, Llama3Scaling):  # Meta's files have no other.
        wavelengths = 2 * math.pi / frequencies
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = ((scaling.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _rotated(heads_THA: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    import torch

    pairs = torch.view_as_complex(heads_THA.reshape(*heads_THA.shape[:2], -1, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(2)
