"""The familiar Flax object around the pure functions: for notebooks and for libraries that expect a module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.llama import forward
from pipedec_jax.model.parameters import Parameters, initialize, parameter_shapes


class Llama(nn.Module):
    """LLaMA as a Flax module: `Llama(config).apply({"params": tree}, token_BT)` gives logits `[B, T, V]`.

    Its parameters are the tree of `pipedec_jax.model.parameters`, the one that converted checkpoints hold: all of it is
    `checkpoints_convert.open_any(DIRECTORY).read_all()`.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, token_BT: jax.Array) -> jax.Array:
        """Logits of whole sequences, computed by `pipedec_jax.model.llama.forward`.

        Raises:
            ValueError: for tokens that are no array of whole numbers, or empty.
        """
        an_array = isinstance(token_BT, jax.Array | np.ndarray)
        if not an_array or not jnp.issubdtype(token_BT.dtype, jnp.integer) or not token_BT.ndim or not token_BT.size:
            found = f"{token_BT.dtype} {list(token_BT.shape)}" if an_array else repr(token_BT)
            raise ValueError(f"Llama takes an array of whole token ids [B, T], not {found}")

        def part(name: str) -> Parameters:
            # Flax would compare given parameters with new ones, which int8 models have not.
            if self.config.int8 and self.has_variable("params", name):
                found = self.get_variable("params", name)
            else:
                found = self.param(name, lambda key: initialize(self.config, key, self.dtype, only=name)[name])
            # A checkpoint's arrays are NumPy's, which traced tokens cannot index.
            return jax.tree.map(jnp.asarray, found)

        names = dict.fromkeys(path.split("/")[0] for path in parameter_shapes(self.config))
        return forward(self.config, {name: part(name) for name in names}, token_BT)
