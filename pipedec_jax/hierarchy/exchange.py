"""What a model publishes, to the devices of all models: for hierarchies that are spread over several processes.

Only the processes that have devices of a model can read what it gives, and every one of them has to follow the text. So
after each step all devices take part in one sum, to which a model's first device contributes what that model published.
The host waits for nothing in here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from pipedec_jax.exchange import AXES
from pipedec_jax.hierarchy.pipe import State
from pipedec_jax.pipeline.placement import OWN, SAME, only_described

TOLD = ("length", "read", "passes", "rollbacks", "undone", "stuck", "stuck_pass")
"""Numbers of a model's state that the host wants to know."""


class BufferExchange:
    """Shares int32 vectors of the models.

    Args:
        meshes: of the models, the smallest one's first.
    """

    def __init__(self, meshes: Sequence[Mesh]) -> None:
        devices = [device for mesh in meshes for device in mesh.devices.flat]
        self._model = {device: index for index, mesh in enumerate(meshes) for device in mesh.devices.flat}
        self._models = len(meshes)
        self._first = tuple(int(device == meshes[self._model[device]].devices.flat[0]) for device in devices)
        self._of = tuple(self._model[device] for device in devices)
        self.mesh = Mesh(np.asarray(devices).reshape(-1, 1), AXES, axis_types=(AxisType.Auto,) * 2)
        self._share = jax.jit(jax.shard_map(self._sum, mesh=self.mesh, in_specs=(OWN,), out_specs=SAME))

    @property
    def needed(self) -> bool:
        """Whether the devices belong to several processes."""
        return len({device.process_index for device in self._model}) > 1

    def share(self, published: Sequence[jax.Array | np.ndarray | None], length: int) -> list[jax.Array]:
        """Everybody's vectors `[length]`, on all devices; `None` for zeros, and for models of other processes."""
        local = []
        for device in self.mesh.local_devices:
            found = published[self._model[device]]
            local.append(_on(device, found) if found is not None else _zeros(length, device))
        whole = (length * self.mesh.size,)
        return list(self._share(jax.make_array_from_single_device_arrays(whole, NamedSharding(self.mesh, OWN), local)))

    def _sum(self, mine: jax.Array) -> tuple[jax.Array, ...]:
        place = lax.axis_index(AXES)
        model, first = jnp.asarray(self._of, jnp.int32)[place], jnp.asarray(self._first, jnp.int32)[place]
        here = (jnp.arange(self._models, dtype=jnp.int32) == model) & (first > 0)
        return tuple(lax.psum(jnp.where(here[:, None], mine[None, :], 0), AXES))


def put(mesh: Mesh, value: jax.Array) -> jax.Array:
    """A replicated array on a model's devices: as it lies there already, or brought from others; does not wait."""
    held = {shard.device: shard.data for shard in value.addressable_shards}
    if all(device in held for device in mesh.local_devices):
        local = [held[device] for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(value.shape, NamedSharding(mesh, SAME), local)
    return jax.device_put(value, NamedSharding(mesh, SAME))


def _on(device: jax.Device, value: jax.Array | np.ndarray) -> jax.Array:
    if isinstance(value, np.ndarray):
        return jax.device_put(value, device)
    return next(shard.data for shard in value.addressable_shards if shard.device == device)


@functools.lru_cache(maxsize=64)
def _zeros(length: int, device: jax.Device) -> jax.Array:
    return jax.device_put(np.zeros(length, np.int32), device)


def is_here(mesh: Mesh) -> bool:
    """Whether this process has devices of a mesh, or they are only described; others cannot run its programs."""
    return only_described(mesh) or bool(mesh.local_devices)


@dataclasses.dataclass(frozen=True)
class Told:
    """What the host wants to know of a model's state. T is the capacity."""

    figures: np.ndarray
    """`[len(TOLD)]` int32"""
    token: np.ndarray
    """[T] int32"""
    tick: np.ndarray
    """[T] int32"""
    delay: np.ndarray
    """[T] int32"""
    log_prob: np.ndarray
    """[T] float32"""

    def __getattr__(self, name: str) -> int:
        """A figure by its name."""
        if name not in TOLD:
            raise AttributeError(name)
        return int(self.figures[TOLD.index(name)])


def told(state: State) -> Told:
    """What the devices hold; waits for them."""
    own, arrays = state.own, (state.tick, state.delay, state.log_prob)
    figures = (own.length, *(getattr(state, name) for name in TOLD[1:]))
    host, token, *rest = jax.device_get((figures, own.token, *arrays))
    return Told(np.asarray(host, np.int32), token, *rest)


def pack_told(told: Told) -> np.ndarray:
    """As one int32 vector."""
    return np.concatenate((told.figures, told.token, told.tick, told.delay, told.log_prob.view(np.int32)))


def unpack_told(packed: np.ndarray) -> Told:
    """What `pack_told` gave."""
    figures, rest = packed[: len(TOLD)], packed[len(TOLD) :].reshape(4, -1)
    return Told(figures, rest[0], rest[1], rest[2], rest[3].view(np.float32))
