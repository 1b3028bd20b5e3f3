"""The KV cache with slots: committing and pruning are flags, and nothing in the cache is ever moved.

A node that was sent or drafted owns a slot until it is pruned; a committed token is a slot whose `committed` flag is
set. A row attends to the committed slots and to those of its own path through the tree. Giving a dead node's slot to a
new node at once is safe because the pipe is first in, first out: at every stage the new owner's write comes after the
old one's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.llama import Attend, attention, attention_over_rows
from pipedec_jax.tree import NO_SLOT, PredictionTree, at, select

LEAST_READ = 512
"""Slots that attention reads at least; then twice as many, and so on, as far as they are in use (four times as many on
GPUs, see `GpuCache`). Rows of a `RowCache` are read by so many."""
MANY_ROWS = 64
"""Rows whose attention takes time in proportion to the slots, as in prefill: they read a quarter of that at least.
What few rows take hardly depends on it."""


class Rows(struct.PyTreeNode):
    """What a model needs to know of the W rows it is fed, beside their embeddings."""

    position: jax.Array
    """[W] int32: absolute positions."""
    slot: jax.Array
    """[W] int32: where keys and values are written; NO_SLOT for rows that write nothing."""
    mask: jax.Array
    """[W, S] bool: the slots each row attends to, its own included."""
    read: int | None = struct.field(pytree_node=False, default=None)
    """Slots that attention reads, where that is chosen for several layers at once (`over_layers`)."""


def at_least(least: int, rows: Rows, x: jax.Array) -> tuple[Rows, jax.Array]:
    """Rows and their `x [W, ...]`, with more that see nothing and write nothing where there are fewer than `least`."""
    missing = least - x.shape[0]
    if missing <= 0:
        return rows, x

    def pad(array: jax.Array, fill: bool | int) -> jax.Array:
        return jnp.pad(array, ((0, missing), *((0, 0) for _ in array.shape[1:])), constant_values=fill)

    more = Rows(position=pad(rows.position, 0), slot=pad(rows.slot, NO_SLOT), mask=pad(rows.mask, False))
    return more, pad(x, 0)


class LayerCache(struct.PyTreeNode):
    """Keys and values of one layer, as CPUs and GPUs read them best."""

    key: jax.Array
    """[G, A, S]: the layout in which attention reads it without a transpose."""
    value: jax.Array
    """[G, S, A]"""

    def attend(self, rows: Rows) -> Attend:
        """Attention of `rows` that first writes their keys and values to their slots.

        A row whose own query, keys or values are not finite gets NaN where they are not.
        """

        def run(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, LayerCache]:
            # A masked slot has weight 0, but 0 times NaN is NaN: a guess or an old answer that overflowed would
            # reach the text through a slot that nobody attends to. The row itself must not seem sound for it.
            cache = self.write(rows.slot, jnp.nan_to_num(key), jnp.nan_to_num(value))
            # Element by element: a reduction over the row would be a kernel more.
            sound = jnp.isfinite(key) & jnp.isfinite(value)
            mixed = cache.mix(query, rows)
            sound = jnp.repeat(sound, mixed.shape[1] // key.shape[1], axis=1)
            # Scores of minus infinity are less than those of slots that nobody sees, which would be read instead.
            sound &= jnp.isfinite(query)
            return jnp.where(sound, mixed, jnp.asarray(jnp.nan, mixed.dtype)), cache

        return run

    def write(self, slot_W: jax.Array, key: jax.Array, value: jax.Array) -> LayerCache:
        """The cache with keys and values `[W, G, A]` in these slots."""
        return self.replace(
            key=self.key.at[:, :, slot_W].set(jnp.moveaxis(key, 0, 2), mode="drop"),
            value=self.value.at[:, slot_W].set(jnp.swapaxes(value, 0, 1), mode="drop"),
        )

    def mix(self, query: jax.Array, rows: Rows) -> jax.Array:
        """Attention of `query [W, H, A]` over the slots up to the last one that any row sees, rounded up."""
        if rows.read is not None:
            return self.read(query, rows.read, rows.mask)
        count, slots = rows.mask.shape
        sizes = read_sizes(slots, count)
        if len(sizes) == 1:
            return self.read(query, slots, rows.mask)

        def read(size: int) -> Callable[[jax.Array], jax.Array]:
            return lambda query: self.read(query, size, rows.mask)

        return lax.switch(size_in_use(rows.mask, sizes), [read(size) for size in sizes], query)

    def read(self, query: jax.Array, size: int, mask_WS: jax.Array) -> jax.Array:
        """Attention of `query [W, H, A]` over the first `size` slots."""
        return attention(query, self.key[:, :, :size], self.value[:, :size], mask_WS[:, :size])


class RowCache(LayerCache):
    """The same for TPUs: a slot is a row.

    Rows are written in their place, and read without a copy, as the compiler's reports show (`scripts/compile_for.py`);
    a TPU keeps the last two axes of an array in tiles of 8 x 128, so that heads of 64 in an axis of their own would
    take twice their bytes. They are read a block at a time: the compiler takes several times as long for a branch per
    size.
    """

    key: jax.Array
    """[S, G A]"""
    value: jax.Array
    """[S, G A]"""

    def write(self, slot_W: jax.Array, key: jax.Array, value: jax.Array) -> RowCache:
        """The cache with keys and values `[W, G, A]` in these slots."""
        key, value = (new.reshape(new.shape[0], -1) for new in (key, value))
        return self.replace(
            key=self.key.at[slot_W].set(key, mode="drop"), value=self.value.at[slot_W].set(value, mode="drop")
        )

    def mix(self, query: jax.Array, rows: Rows) -> jax.Array:
        """Attention of `query [W, H, A]` over the slots up to the last one that any row sees, rounded up."""
        return attention_over_rows(query, self.key, self.value, rows.mask, LEAST_READ)


class GpuCache(LayerCache):
    """The same for GPUs, where every choice takes a kernel or a wait for the host, and the compiler long.

    How many slots are read is chosen once for all layers of a stage or draft, among fewer numbers: each is a program of
    all these layers.
    """


TILED_PLATFORMS = ("tpu",)
"""Platforms that keep the last two axes of an array in tiles."""


def tiled(platform: str) -> bool:
    """Whether devices of a platform hold caches as rows."""
    return platform in TILED_PLATFORMS


def for_platform(state: Any, platform: str) -> Any:
    """A pytree with its empty caches laid out as devices of a platform want them."""

    def lay_out(cache: LayerCache) -> LayerCache:
        if not tiled(platform):
            return GpuCache(key=cache.key, value=cache.value)
        G, S, A = cache.value.shape
        return RowCache(*(jnp.zeros((S, G * A), array.dtype) for array in (cache.key, cache.value)))

    if not tiled(platform) and platform != "gpu":
        return state
    return jax.tree.map(
        lambda leaf: lay_out(leaf) if isinstance(leaf, LayerCache) else leaf,
        state,
        is_leaf=lambda leaf: isinstance(leaf, LayerCache),
    )


def over_layers(
    cache: tuple[LayerCache, ...],
    rows: Rows,
    step: Callable[[int, LayerCache, Rows, jax.Array], tuple[LayerCache, jax.Array]],
    x: jax.Array,
) -> tuple[tuple[LayerCache, ...], jax.Array]:
    """The new caches, and `x` after all layers, of which `step(index, cache, rows, x)` is one: its new cache and `x`.

    Where the caches want it, the number of slots to read is chosen once for all layers.
    """

    def read(size: int | None) -> Callable[[tuple[LayerCache, ...], jax.Array], Any]:
        def layers(cache: tuple[LayerCache, ...], x: jax.Array) -> tuple[tuple[LayerCache, ...], jax.Array]:
            caches = []
            for index, one in enumerate(cache):
                one, x = step(index, one, rows.replace(read=size), x)
                caches.append(one)
            return tuple(caches), x

        return layers

    if not isinstance(cache[0], GpuCache):
        return read(None)(cache, x)
    sizes = _growing(LEAST_READ, 4, rows.mask.shape[1])
    if len(sizes) == 1:
        return read(sizes[0])(cache, x)
    return lax.switch(size_in_use(rows.mask, sizes), [read(size) for size in sizes], cache, x)


def size_in_use(mask_WS: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Which of these rising numbers of slots is the first that has all that any row sees."""
    used = jnp.max(jnp.where(jnp.any(mask_WS, axis=0), jnp.arange(1, mask_WS.shape[1] + 1, dtype=jnp.int32), 0))
    return jnp.sum(used > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)


def read_sizes(slots: int, rows: int = 1) -> tuple[int, ...]:
    """How many slots attention of so many rows reads, by how far they are in use."""
    return _growing(LEAST_READ if rows < MANY_ROWS else LEAST_READ // 4, 2, slots)


def _growing(least: int, times: int, slots: int) -> tuple[int, ...]:
    sizes = []
    while least < slots:
        sizes.append(least)
        least *= times
    return (*sizes, slots)


def empty_layers(config: LlamaConfig, layers: int, capacity: int, dtype: Any) -> tuple[LayerCache, ...]:
    """Caches of zeros for `layers` layers."""
    S, G, A = capacity, config.kv_heads, config.head_size
    return tuple(LayerCache(key=jnp.zeros((G, A, S), dtype), value=jnp.zeros((G, S, A), dtype)) for _ in range(layers))


def owners(tree: PredictionTree, slots: int) -> jax.Array:
    """The living node that owns each slot, `[S]` int32, C for slots without one."""
    C = tree.capacity
    node = jnp.arange(C, dtype=jnp.int32)
    slot = jnp.where(tree.alive, tree.slot, NO_SLOT)
    return jnp.full(slots, C, jnp.int32).at[slot].set(node, mode="drop")


def give_slots(tree: PredictionTree, committed_S: jax.Array, node_W: jax.Array) -> tuple[PredictionTree, jax.Array]:
    """Give a slot to each of the nodes that has none; while there are any, in order.

    Returns:
        The new tree, and the nodes with C in place of those that were left without (the engine sizes the cache so that
        there are none).
    """
    S = committed_S.shape[0]
    new = (node_W < tree.capacity) & (at(tree.slot, node_W, 0) == NO_SLOT)
    free = select(~committed_S & (owners(tree, S) == tree.capacity), node_W.shape[0])
    slot = at(free, jnp.cumsum(new, dtype=jnp.int32) - 1, S)
    slot = jnp.where(slot < S, slot, NO_SLOT)
    tree = tree.replace(slot=tree.slot.at[jnp.where(new, node_W, tree.capacity)].set(slot, mode="drop"))
    return tree, jnp.where(at(tree.slot, node_W, NO_SLOT) < NO_SLOT, node_W, tree.capacity)


def tree_rows(tree: PredictionTree, committed_S: jax.Array, node_W: jax.Array) -> Rows:
    """Rows for tree nodes: each sees the committed text and its own path. A "none" node writes nothing."""
    path = at(tree.ancestor, node_W, False)
    path = jnp.pad(path, ((0, 0), (0, 1)))  # column C: slots without an owner
    on_path = jnp.take(path, owners(tree, committed_S.shape[0]), axis=1)
    return Rows(
        position=at(tree.position, node_W, 0),
        slot=at(tree.slot, node_W, NO_SLOT),
        mask=on_path | committed_S[None, :],
    )


def chunk_rows(start: jax.Array, width: int, length: jax.Array, slots: int) -> Rows:
    """Rows for positions `start .. start + width` of a prompt whose first `length` tokens are prefilled.

    Slots are positions and the mask is causal. Rows at `length` and beyond write nothing.
    """
    position = start + jnp.arange(width, dtype=jnp.int32)
    slot = jnp.arange(slots, dtype=jnp.int32)
    return Rows(
        position=position,
        slot=jnp.where(position < length, position, NO_SLOT),
        mask=slot[None, :] <= position[:, None],
    )
