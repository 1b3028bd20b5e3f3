"""Training of the demo family: corpus, tokenizer, the training loop, distillation, evaluation and export."""

from __future__ import annotations

import importlib.metadata
import os

FAST_PRODUCTS = "--xla_cpu_experimental_ynn_fusion_type="


def prefer_fast_products() -> None:
    """Have XLA's CPU backend use Eigen for matrix products; call it before JAX is first used.

    jaxlib 0.10 sends them to a library that was half as fast for the shapes of training (measured on two cores).
    The flag exists in these versions only, and XLA stops at flags that it does not know.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib").startswith("0.10.") and "ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FAST_PRODUCTS}".strip()
