"""Early-exit heads: the target's next token guessed from the hidden rows after its first E layers (PPSD, section 3).

A head is a small model without an embedding. What of it exists depends on its variant:

    map_norm [D]   map [D, R]     a narrower (or tied) head's way in: norm and linear map
    layers/0/...                  `block`: one decoder layer, the arrays of `model.parameters.layer_shapes`
    final_norm [R]   head [R, V]  norm and linear map to the vocabulary; a tied head uses the target's own LM head

The untrained `target` variant has no arrays: it is the target's own final norm and LM head (LayerSkip,
arXiv 2404.16710, section 4.3). Letters as in `model.llama`; R is the head's own width, D unless it was made narrower.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipedec_jax.config import LlamaConfig, check_exit, check_keys
from pipedec_jax.model import llama
from pipedec_jax.model.parameters import Parameters, layer_shapes, nest

VARIANTS = ("target", "norm-linear", "block")
"""Untrained; norm and linear map; one transformer block, norm and linear map."""


@dataclasses.dataclass(frozen=True)
class ExitHeadConfig:
    """What one exit head is made of. The sizes it does not name are the target's."""

    exit_layer: int
    """Layers of the target that the exit path runs (E), fewer than all."""
    variant: str = "norm-linear"
    """One of `VARIANTS`."""
    width: int | None = None
    """The head's own width (R): hidden rows are first mapped to it. The target's, without a map, when not given."""
    feed_forward: int | None = None
    """Feed-forward width of the block; the target's when not given."""
    tied: bool = False
    """Whether the vocabulary's matrix is the target's LM head, so that one read of it serves target and exit."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"exit head {self.variant!r} is not known; choose one of {', '.join(VARIANTS)}")
        for name in ("exit_layer", "width", "feed_forward"):
            value = getattr(self, name)
            if value is None and name != "exit_layer":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} of an exit head must be a positive whole number, not {value!r}")
        if self.variant == "target" and (self.width or self.feed_forward or self.tied):
            raise ValueError("the untrained 'target' head has no sizes: leave width, feed_forward and tied out")
        if self.feed_forward and self.variant != "block":
            raise ValueError(f"feed_forward is the block's; a {self.variant!r} head has none: leave it out")
        if self.tied and self.width:
            raise ValueError("a tied head has the target's width: leave width out, or tied")

    @property
    def name(self) -> str:
        """A short name that tells heads of one target apart, such as `4-block-64`; also the folder it is stored in."""
        return f"{self.exit_layer}-{self.kind}"

    @property
    def kind(self) -> str:
        """The name without the exit layer, such as `block-64`."""
        parts = [self.variant]
        parts += [str(self.width)] if self.width else []
        parts += [f"ff{self.feed_forward}"] if self.feed_forward else []
        return "-".join([*parts, *(["tied"] if self.tied else [])])

    @property
    def mapped(self) -> bool:
        """Whether the head begins with a norm and a linear map."""
        # A tied head of norm and linear map alone could learn nothing but a norm's weights.
        return self.width is not None or (self.tied and self.variant == "norm-linear")

    @property
    def shares_vocabulary(self) -> bool:
        """Whether the vocabulary's matrix is the target's LM head."""
        return self.variant == "target" or self.tied

    def model(self, target: LlamaConfig) -> LlamaConfig:
        """The geometry behind the map as that of a one-layer model: block, final norm, linear map.

        The block's cache is thus one more layer of the target's cache: heads and head size are the target's. Its
        matrices are never int8 and have no biases, whatever the target's are.
        """
        return dataclasses.replace(
            target,
            width=self.width or target.width,
            feed_forward=self.feed_forward or target.feed_forward,
            layers=1,
            int8=False,
            attention_bias=False,
            feed_forward_bias=False,
            tied_embeddings=self.shares_vocabulary,
        )

    def check(self, target: LlamaConfig) -> None:
        """Raise `ValueError` unless a target of this geometry has the exit."""
        check_exit(self.exit_layer, target.layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` reads back, without what the head leaves to the target."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, False)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExitHeadConfig:
        """Build from a dictionary; unknown and missing keys and bad values raise `ValueError`."""
        check_keys(values, cls, "exit head")
        return cls(**values)


@dataclasses.dataclass(frozen=True, eq=False)
class ExitHead:
    """An exit head in memory."""

    config: ExitHeadConfig
    params: Parameters
    """NumPy arrays in the stored dtype; empty for the untrained `target` variant."""
    agreement: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Measured after training: share of positions whose token is among the head's best 1, 2, 4, 8 (the keys) along
    the target's own greedy text after held-out prompts; empty when it was not measured."""


def head_shapes(config: ExitHeadConfig, target: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a head's arrays under their path, such as `layers/0/query`, in the order they are used."""
    model = config.model(target)
    D, R, V = target.width, model.width, target.vocab_size
    shapes: dict[str, tuple[int, ...]] = {}
    if config.mapped:
        shapes |= {"map_norm": (D,), "map": (D, R)}
    if config.variant == "block":
        shapes |= {f"layers/0/{name}": shape for name, shape in layer_shapes(model).items()}
    if config.variant != "target":
        shapes["final_norm"] = (R,)
        if not config.tied:
            shapes["head"] = (R, V)
    return shapes


def step_weights(config: ExitHeadConfig, target: LlamaConfig) -> dict[str, int]:
    """Weights that one step of the head reads: `path` before the vocabulary's matrix, and `vocabulary`, that matrix.

    A tied or untrained head's vocabulary is the target's own, which a pipeline's tick reads once for both.
    """
    path = sum(int(np.prod(shape)) for name, shape in head_shapes(config, target).items() if name != "head")
    if config.variant == "target":
        path = target.width
    return {"path": path, "vocabulary": config.model(target).width * target.vocab_size}


def initialize_head(config: ExitHeadConfig, target: LlamaConfig, params: Parameters, seed: int) -> Parameters:
    """A head to begin training with, float32: the target's norm and vocabulary where sizes allow, else random weights.

    A head of the target's width thus begins as nearly the untrained one: its map is the identity, and a block's output
    is small at first. (In a short trial at exit 2 a block that began as a copy of the target's next layer fell behind
    one of half the width that began at random.)

    Args:
        config: the head.
        target: the target's geometry.
        params: the target's parameters; read are `final_norm` and the LM head.
        seed: of the random weights, which depend on it and on the head's name alone.
    """
    D, R = target.width, config.model(target).width
    known = {"map_norm": params["final_norm"]} if config.mapped else {}
    if R == D:
        known |= {"map": jnp.eye(D), "final_norm": params["final_norm"], "head": llama.head_matrix(params).T}
    noise = np.random.default_rng([seed, zlib.crc32(config.name.encode())])
    flat = {}
    for path, shape in head_shapes(config, target).items():
        if path not in known and len(shape) == 1:
            known[path] = np.ones(shape)
        elif path not in known:
            # A map keeps the size of its rows; the block is small beside the rows that it adds to.
            scale = D**-0.5 if path == "map" else 0.02
            known[path] = noise.normal(0.0, scale * (0.5**0.5 if path.endswith(("output", "down")) else 1.0), shape)
        # Every head needs arrays of its own: training donates them.
        flat[path] = jnp.array(known[path], jnp.float32)
    return nest(flat)


def before_vocabulary(
    config: ExitHeadConfig,
    target: LlamaConfig,
    params: Parameters,
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    attend: llama.Attend | None,
) -> tuple[jax.Array, Any]:
    """The head's path but its last norm and the product with the vocabulary: `[..., W, R]`, and the block's cache.

    Args:
        config: the head.
        target: the target's geometry.
        params: the head's arrays (`head_shapes`), in the dtype of `x`.
        x: the hidden rows `[..., W, D]` after the target's first `exit_layer` layers.
        rope: `llama.rope_tables` of the rows' positions.
        attend: reads and extends the block's own one-layer cache; called once by a block, and `None` will do for
            other variants.

    Returns:
        Rows for `llama.logits(config.model(target), final_norm, head, rows)` (see `vocabulary_part`), and what
        `attend` returned as the new cache (`None` without a block).
    """
    cache = None
    with jax.named_scope("exit_head"):
        if config.mapped:
            x = llama.product("...D,DR->...R", llama.rms_norm(x, params["map_norm"], target.norm_eps), params["map"])
        if config.variant == "block":
            assert attend is not None
            x, cache = llama.forward_layer(config.model(target), params["layers"]["0"], x, rope, attend)
    return x, cache


def vocabulary_part(config: ExitHeadConfig, params: Parameters, final_norm: Any, head_VD: Any) -> tuple[Any, Any]:
    """The head's last norm `[R]` and its vocabulary matrix `[V, R]`, given the target's final norm and LM head."""
    norm = final_norm if config.variant == "target" else params["final_norm"]
    return norm, params["head"].T if "head" in params else head_VD
