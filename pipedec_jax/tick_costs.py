"""What a tick costs by the rows that are in it, and computing no more rows than are alive.

On an accelerator that reads weights for most of a tick, dozens of rows cost what one does; on others a batch costs
about as much as it has rows. `TickCosts` says which it is: where it grows, batches of fewer rows get programs of their
own, and best-first sends and drafts only what is worth it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pipedec_jax.exchange import vary


@dataclasses.dataclass(frozen=True)
class Curve:
    """What 0, 1, 2, ... rows cost; more than the last as many as that.

    Raises:
        ValueError: for a cost that is no finite number of at least 0, or less than that of fewer rows.
    """

    cost: tuple[float, ...]

    def __post_init__(self) -> None:
        for value in self.cost:
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
                raise ValueError(f"a cost must be a finite number >= 0, not {value!r}")
        if not self.cost or list(self.cost) != sorted(self.cost):
            raise ValueError(f"costs must not fall with the number of rows, and there must be one: {self.cost}")

    def of(self, rows: jax.Array) -> jax.Array:
        """float32 costs of so many rows."""
        return jnp.asarray(self.cost, jnp.float32)[jnp.minimum(rows, len(self.cost) - 1)]

    def at(self, rows: int) -> float:
        """The cost of so many rows."""
        return self.cost[min(rows, len(self.cost) - 1)]

    def sizes(self, width: int) -> tuple[int, ...]:
        """The most rows, up to `width`, that each of the different costs buys: sizes worth a program of their own."""
        last = len(self.cost) - 1
        return (*(rows for rows in range(1, min(width, last)) if self.cost[rows + 1] > self.cost[rows]), width)


@dataclasses.dataclass(frozen=True)
class TickCosts:
    """Costs of a tick's parts in one unit: its slowest rank, what follows, and what every tick adds."""

    stage: Curve = Curve((1.0,))
    """The longest stage, by the rows of its batch."""
    draft: Curve = Curve((0.0,))
    """A draft step, beside the stages, by the nodes it extends."""
    head: Curve = Curve((0.0,))
    """The slice of the head on a rank, by the rows that leave the last stage."""
    exit_vocabulary: Curve | None = None
    """The slice of an exit head's vocabulary on a rank, by the rows that pass the exit; `None` where it is the target's
    head, which rows that leave and rows that pass the exit then meet together."""
    exchange: float = 0.0

    def of(
        self, widest: jax.Array, drafting: jax.Array, leaving: jax.Array, passing: jax.Array | None = None
    ) -> jax.Array:
        """float32 cost of a tick.

        Args:
            widest: rows of the widest batch in the pipe.
            drafting: sum of the draft steps' costs.
            leaving: rows that leave the last stage.
            passing: rows that pass the exit; `None` without one.
        """
        slices = self._slices(Curve.of, leaving, passing)
        return jnp.maximum(self.stage.of(widest), drafting) + slices + jnp.float32(self.exchange)

    def slices(self, leaving: int, passing: int | None = None) -> float:
        """Cost of a rank's slices of the vocabulary for so many rows; without an exit none pass it (`None`)."""
        return self._slices(Curve.at, leaving, passing)

    def _slices(self, cost: Callable[[Curve, Any], Any], leaving: Any, passing: Any) -> Any:
        if passing is None:
            return cost(self.head, leaving)
        if self.exit_vocabulary is None:
            return cost(self.head, leaving + passing)
        return cost(self.head, leaving) + cost(self.exit_vocabulary, passing)


TICKS = TickCosts()
"""Every tick costs one, whatever is in it."""


def few_rows(width: int) -> tuple[int, ...]:
    """Sizes for `over_live_rows` of work that takes as long as there are rows anywhere, such as drawing tokens."""
    sizes, size = [], 1
    while size < width:
        sizes.append(size)
        size *= 4
    return (*sizes, width)


def over_live_rows(
    sizes: Sequence[int],
    live_W: jax.Array,
    run: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    rows: Any,
) -> tuple[Any, Any]:
    """Run over the rows that live alone, in the least of some sizes that holds them; over none, nothing is run.

    Args:
        sizes: rising, the last one W.
        live_W: which rows live.
        run: takes the carry and arrays of `[size, ...]`, gives a new carry and new arrays of `[size, ...]`.
        carry: handed through; `None` for none.
        rows: a pytree of arrays `[W, ...]`.

    Returns:
        The new carry, and the new arrays as `[W, ...]`; what they hold for dead rows means nothing.
    """
    W = live_W.shape[0]
    run = jax.jit(run)  # traced once, and then known: its shapes are asked for first
    order = jnp.argsort(~live_W, stable=True).astype(jnp.int32)

    def at_size(size: int, carry: Any) -> tuple[Any, Any]:
        if size == W:
            return vary(run(carry, rows))
        index = order[:size]
        carry, found = run(carry, jax.tree.map(lambda array: array[index], rows))
        spread = jax.tree.map(lambda x: jnp.zeros((W, *x.shape[1:]), x.dtype).at[index].set(x), found)
        return vary((carry, spread))

    rows = vary(rows)
    count = jnp.sum(live_W, dtype=jnp.int32)
    shapes = jax.eval_shape(run, carry, rows)[1]
    carry, found = vary((carry, jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)))
    if len(sizes) == 1:
        return lax.cond(count > 0, lambda carry, _: at_size(W, carry), lambda *both: both, carry, found)
    if carry is None:

        def branch(size: int) -> Callable[[Any], Any]:
            return lambda found: at_size(size, None)[1] if size else found

        which = jnp.sum(count > jnp.asarray((0, *sizes[:-1]), jnp.int32))
        return None, lax.switch(which, [branch(size) for size in (0, *sizes)], found)
    # A loop of at most one round for each size, and not a branch: where several branches change a cache, XLA on CPU
    # copies it; what a loop carries it updates in place.
    fewer = 0
    for size in sizes:

        def once(state: Any, size: int = size) -> Any:
            return vary((jnp.zeros((), bool), *at_size(size, state[1])))

        start = vary((count > fewer) & (count <= size))
        _, carry, found = lax.while_loop(lambda state: state[0], once, (start, carry, found))
        fewer = size
    return carry, found
