"""A draft model (or exit head) and n-gram look-up on the same nodes: two sources of guesses, one tree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pipedec_jax.cache import Rows
from pipedec_jax.drafters.base import Drafter, Proposals, View


@dataclasses.dataclass(frozen=True)
class CombinedDrafter(Drafter):
    """Proposes what `model` and `other` do; a token of both has the better of their chances.

    The other's guesses that the model does not share are worth `trust` times their own chance. State, rank and
    parameters are the model's; the other must have none.
    """

    model: Drafter
    other: Drafter
    trust: float = 0.3
    children: int = dataclasses.field(init=False)
    """Those of both."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", self.model.children + self.other.children)

    @property
    def ranks(self) -> int:
        """The model's."""
        return self.model.ranks

    @property
    def at_exit(self) -> bool:
        """The model's."""
        return self.model.at_exit

    def new_state(self, slots: int, dtype: Any) -> Any:
        """The model's."""
        return self.model.new_state(slots, dtype)

    def prefill(self, params: Any, state: Any, chunk: jax.Array, rows: Rows) -> Any:
        """The model's."""
        return self.model.prefill(params, state, chunk, rows)

    def propose(self, params: Any, state: Any, view: View) -> tuple[Any, Proposals]:
        """Both drafters' guesses for the frontier, row by row."""
        state, first = self.model.propose(params, state, view)
        return state, self._together(first, self.other.propose(None, (), view)[1])

    def offer(self, params: Any, state: Any, view: View) -> tuple[Any, tuple[Any, Proposals]]:
        """The model's, and the other's guesses."""
        state, offer = self.model.offer(params, state, view)
        return state, (offer, self.other.propose(None, (), view)[1])

    def head_rows(self, params: Any, offer: tuple[Any, Proposals]) -> tuple[jax.Array, jax.Array] | None:
        """The model's."""
        return self.model.head_rows(params, offer[0])

    def share(self, params: Any, offer: tuple[Any, Proposals], view: View) -> Any:
        """The model's."""
        return self.model.share(params, offer[0], view)

    def settle(self, offer: tuple[Any, Proposals], shares: Any, view: View) -> Proposals:
        """Both drafters' guesses for the frontier, row by row."""
        return self._together(self.model.settle(offer[0], shares, view), offer[1])

    def _together(self, first: Proposals, second: Proposals) -> Proposals:
        both = (first.log_prob > -jnp.inf)[:, :, None] & (second.log_prob > -jnp.inf)[:, None, :]
        same = both & (first.token[:, :, None] == second.token[:, None, :])
        agreed = jnp.max(jnp.where(same, second.log_prob[:, None, :], -jnp.inf), axis=2)
        shared = jnp.any(same, axis=1)
        alone = jnp.where(shared, -jnp.inf, second.log_prob + jnp.log(jnp.float32(self.trust)))
        return Proposals(
            token=jnp.concatenate((first.token, second.token), axis=1),
            log_prob=jnp.concatenate((jnp.maximum(first.log_prob, agreed), alone), axis=1),
        )
