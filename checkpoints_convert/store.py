"""The converted checkpoint on disk: an Orbax tree with one stored array per layer and tensor, and a config file.

    DST/pipedec_jax.json    format version, geometry, dtype, special tokens, source; written last
    DST/parameters/         Orbax checkpoint of the Flax parameter tree; `layers/3/query` is the Zarr array
                            `layers.3.query`, uncompressed, in chunks of at most 16 MiB
    DST/tokenizer.json ...  tokenizer and generation files of the source, unchanged

Orbax restores `parameters/` by itself, also straight onto a mesh. Reading one array takes TensorStore alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from checkpoints_convert.checkpoint import DTYPES, Checkpoint, check_dtype
from checkpoints_convert.config_json import Json, read_json, token_ids
from checkpoints_convert.source import is_hugging_face
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import nest, parameter_shapes

CONFIG_FILE = "pipedec_jax.json"
ARRAYS = "parameters"
VERSION = 1
"""Version of the layout above; a reader refuses any other."""

CHUNK_BYTES = 16 * 2**20
"""Bounds what is in flight while an array is written, and what a reader of a part of an array reads besides."""


class ConvertedCheckpoint(Checkpoint):
    """A checkpoint that `write_arrays` and `write_config` wrote."""

    def _read(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = tensorstore.open(_spec(self.directory / ARRAYS / _array_name(path)), open=True).result()
            if array.shape != shape or array.dtype.numpy_dtype != DTYPES[self.dtype]:
                raise ValueError(f"it is {array.dtype.name} {array.shape}, {CONFIG_FILE} says {self.dtype} {shape}")
            return array.read().result()
        except ValueError as error:
            # TensorStore appends its whole specification to some messages.
            reason = str(error).split(" [tensorstore_spec=")[0]
            raise ValueError(f"cannot read array {path!r} of {self.directory}: {reason}") from error


def is_converted(path: str | Path) -> bool:
    """Whether `path` is a complete converted checkpoint (one that is being written has no config file yet)."""
    return (Path(path) / CONFIG_FILE).is_file()


def open_checkpoint(path: str | Path) -> ConvertedCheckpoint:
    """Open a converted checkpoint; reads its config file only.

    Raises:
        FileNotFoundError: when `path` is no converted checkpoint.
        ValueError: when its config file is damaged or of another version.
    """
    directory = Path(path)
    if not is_converted(directory):
        what = "is a Hugging Face directory" if is_hugging_face(directory) else f"has no {CONFIG_FILE}"
        raise FileNotFoundError(
            f"{directory} is no converted checkpoint, it {what}; convert a Hugging Face directory with "
            "`python -m checkpoints_convert convert SRC DST` and give DST"
        )
    values = read_json(directory / CONFIG_FILE)
    try:
        if values.get("version") != VERSION:
            raise ValueError(f"version {values.get('version')!r} is not {VERSION}; convert the source again")
        config = LlamaConfig.from_dict(_member(values, "model", dict))
        dtype = check_dtype(_member(values, "dtype", str))
        bos, eos = token_ids(values, "bos_token_id"), token_ids(values, "eos_token_ids")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from error
    return ConvertedCheckpoint(directory, config, dtype, bos[0] if bos else None, eos)


def write_config(directory: Path, checkpoint: Checkpoint, dtype: str, source: Json) -> None:
    """Write the config file, which makes `directory` a converted checkpoint; everything else must be there."""
    values = {
        "version": VERSION,
        "model": checkpoint.config.to_dict(),
        "dtype": dtype,
        "bos_token_id": checkpoint.bos_token_id,
        "eos_token_ids": checkpoint.eos_token_ids,
        "source": source,
    }
    with (directory / CONFIG_FILE).open("w") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_arrays(
    directory: Path, config: LlamaConfig, read: Callable[[str], np.ndarray], done: Callable[[int], object]
) -> None:
    """Write all arrays as an Orbax checkpoint; at most one is in memory at a time.

    Args:
        directory: where `parameters/` is created.
        config: geometry, which gives paths and shapes.
        read: returns the array of a path in the stored dtype; called once per path.
        done: told the bytes of every array once it is on disk.
    """
    # Orbax takes a second or two to import, and readers do without.
    import orbax.checkpoint as ocp

    class Handler(ocp.type_handlers.NumpyHandler):
        """Lets Orbax write a tree of arrays that do not exist yet; read back, they are ordinary NumPy leaves."""

        async def serialize(
            self,
            values: Sequence[Any],
            infos: Sequence[Any],
            args: Sequence[Any] | None = None,  # noqa: ARG002
        ) -> Sequence[Any]:
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                array = read(value.path)
                _write_array(Path(info.parent_dir) / info.name, array)
                done(array.nbytes)
            return []

        def memory_size(self, values: Sequence[Any]) -> Sequence[tuple[int, int]]:
            # Asked by Orbax before 0.12.4, for its log only; ours are still unread.
            return [(0, 0)] * len(values)

    tree = nest({path: _Unread(path) for path in parameter_shapes(config)})
    # Conversion is a matter of one process, also where others belong to the same JAX cluster.
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    registry = ocp.type_handlers.create_type_handler_registry((_Unread, Handler()))
    with _quiet_orbax():
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(directory.absolute() / ARRAYS, args=ocp.args.PyTreeSave(tree))


@dataclasses.dataclass(frozen=True)
class _Unread:
    """Stands in the tree for an array until its turn to be written comes."""

    path: str


def _array_name(path: str) -> str:
    """The directory of an array inside `parameters/`, as Orbax names it."""
    return path.replace("/", ".")


def _write_array(directory: Path, array: np.ndarray) -> None:
    """Write one Zarr array; returns, or raises, only when nothing of it is under way any more."""
    chunks = list(array.shape)
    while np.prod(chunks) * array.itemsize > CHUNK_BYTES:
        longest = int(np.argmax(chunks))
        chunks[longest] = -(-chunks[longest] // 2)
    spec = _spec(directory) | {
        "dtype": array.dtype.name,
        "metadata": {"shape": list(array.shape), "chunks": chunks, "compressor": None},
        # Chunks of zeros are stored too, so that a missing chunk is always an error.
        "store_data_equal_to_fill_value": True,
    }
    written = tensorstore.open(spec, create=True).result().write(array)
    try:
        written.result()
    except KeyboardInterrupt:
        # Whoever cleans up must not find new files while doing so.
        written.exception()
        raise


def _spec(directory: Path) -> Json:
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "fill_missing_data_reads": False,
    }


def _member(values: Json, key: str, kind: type) -> Any:
    found = values.get(key)
    if not isinstance(found, kind):
        raise ValueError(f"{key!r} must be of type {kind.__name__}, not {found!r}")
    return found


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Hide warnings about features that are left out here on purpose (OCDBT, metadata of `jax.Array`)."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
