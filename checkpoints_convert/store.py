"""The converted checkpoint on disk: an Orbax tree with one stored array per layer and tensor, and a manifest.

    DST/pipedec_jax.json    the manifest (see `manifest`); written last, so that without it nothing is a checkpoint
    DST/parameters/         Orbax checkpoint of the Flax parameter tree; `layers/3/query` is the Zarr array
                            `layers.3.query`, uncompressed, in chunks of at most 16 MiB along the axis that is
                            split over devices
    DST/tokenizer.json ...  tokenizer and generation files of the source, unchanged

Orbax restores `parameters/` by itself, also straight onto a mesh. Here TensorStore reads the chunks, and each is
checked against its checksum before it is used.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
import xxhash

from checkpoints_convert import manifest
from checkpoints_convert.checkpoint import STORED, Checkpoint
from checkpoints_convert.config_json import Json
from checkpoints_convert.manifest import FileFacts, Manifest, StoredArray
from checkpoints_convert.paths import any_path, is_cloud, key_value_store
from checkpoints_convert.workplace import workplace_of
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import Part, device_axis, nest, parameter_shapes
from pipedec_jax.small_files import read_small

ARRAYS = "parameters"

CHUNK_BYTES = 16 * 2**20
"""What a reader of a part of an array reads besides it, at most, on either side."""
IN_FLIGHT = 4
"""Chunks that are read or written at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class ConvertedCheckpoint(Checkpoint):
    """A converted checkpoint. Whatever is read of it has been checked against its checksum."""

    manifest: Manifest = dataclasses.field(repr=False)

    def _read(self, path: str, part: Part) -> np.ndarray:
        stored = self.manifest.arrays[path]
        try:
            self._check_layout(path)
            self._check_chunks(path, stored, part)
            array = _open_array(self.directory / ARRAYS, path, stored)
            return _read_part(array, stored, part)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read array {path!r} of {self.directory}: {_short(error)}") from error

    def check_files(self) -> None:
        """Compare tokenizer and generation files with the manifest.

        Raises:
            ValueError: when one is missing or differs, or is too large to be read.
        """
        for name, facts in self.manifest.files.items():
            file = self.directory / name
            state = "is missing"
            if file.is_file():
                state = "" if FileFacts.of(read_small(file)) == facts else "differs from what was converted"
            if state:
                raise ValueError(
                    f"file {name} of {self.directory} {state}; put the original back, or convert the source again "
                    "(--overwrite)"
                )

    def _check_chunks(self, path: str, stored: StoredArray, part: Part) -> None:
        """Raise `ValueError` unless all chunks that `part` touches are files of the right size. Local only.

        Reading a pipe would never end, and of a size that the manifest alone states memory may not hold a chunk.
        """
        if is_cloud(self.directory):
            return
        for chunk in stored.touched(part):
            file = self.directory / ARRAYS / chunk_file(path, stored, chunk)
            if not file.is_file():
                raise ValueError(f"chunk {chunk} of {stored.chunks} is {'no file' if file.exists() else 'missing'}")
            if file.stat().st_size != stored.chunk_bytes:
                raise ValueError(
                    f"chunk {chunk} of {stored.chunks} has {file.stat().st_size} bytes, not {stored.chunk_bytes}"
                )

    def _check_layout(self, path: str) -> None:
        """Raise `ValueError` unless an array's `.zarray` is as it was written.

        TensorStore would believe it, also sizes that no memory holds, and end the process.
        """
        name = f"{ARRAYS}/{path.replace('/', '.')}/.zarray"
        file = self.directory / name
        facts = self.manifest.metadata.get(name)
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if facts is None or FileFacts.of(read_small(file)) != facts:
            raise ValueError(f"{name} differs from what was converted")


def is_converted(path: str | Path) -> bool:
    """Whether `path` is a complete converted checkpoint (one that is being written has no manifest yet)."""
    return (any_path(path) / manifest.FILE).is_file()


def open_checkpoint(path: str | Path) -> ConvertedCheckpoint:
    """Open a converted checkpoint; reads its manifest only.

    Raises:
        FileNotFoundError: when `path` is no converted checkpoint.
        ValueError: when its manifest is damaged or of another version.
    """
    directory = any_path(path)
    if not is_converted(directory):
        is_source = any((directory / name).is_file() for name in ("config.json", "params.json"))
        what = "is a source" if is_source else f"has no {manifest.FILE}"
        if workplace_of(directory).is_dir():
            raise FileNotFoundError(
                f"{directory} is not complete: its conversion was interrupted or is still running; the same "
                "`python -m checkpoints_convert convert` goes on where it was"
            )
        raise FileNotFoundError(
            f"{directory} is no converted checkpoint, it {what}; convert a model's directory with "
            "`python -m checkpoints_convert convert SRC DST` and give DST"
        )
    found = Manifest.read(directory / manifest.FILE)
    return ConvertedCheckpoint(directory, found.model, found.dtype, found.bos_token_id, found.eos_token_ids, found)


def chunked(path: str, shape: tuple[int, ...], dtype: str) -> StoredArray:
    """How a new array is stored; its checksums are still to come."""
    axis = device_axis(path)
    row = int(np.prod(shape, dtype=object)) // shape[axis] * STORED[dtype].itemsize
    chunks = -(-shape[axis] // max(CHUNK_BYTES // row, 1))
    # As even as can be: the last is stored in full too.
    return StoredArray(shape, dtype, axis, -(-shape[axis] // chunks), ())


def write_array(
    parameters: Path, path: str, stored: StoredArray, read: Callable[[Part], np.ndarray], done: Callable[[int], object]
) -> StoredArray:
    """Write one array chunk by chunk; returns, or raises, only when nothing of it is under way any more.

    Args:
        parameters: the directory `parameters/`.
        path: of the array in the parameter tree.
        stored: its layout, as `chunked` gives it.
        read: returns the elements of a part in the stored dtype, in C order.
        done: told the bytes of every chunk once it is on disk.

    Returns:
        `stored` with checksums.

    Raises:
        OSError: when it cannot be written, for example because the disk is full.
    """
    chunks = list(stored.shape)
    chunks[stored.axis] = stored.length
    spec = _spec(parameters, path) | {
        "dtype": stored.dtype,
        "metadata": {"shape": list(stored.shape), "chunks": chunks, "compressor": None},
        # One sync at the end of the conversion does for all files; one for every chunk takes as long as writing it.
        "context": {"file_io_sync": False},
        # Chunks of zeros are stored too, so that a missing chunk is always an error.
        "store_data_equal_to_fill_value": True,
    }
    pending: collections.deque[tuple[Any, int]] = collections.deque()
    checksums = []

    def finish() -> None:
        written, size = pending.popleft()
        written.result()
        done(size)

    try:
        array = tensorstore.open(spec, create=True, delete_existing=True).result()
        for index in range(stored.chunks):
            elements = read(stored.part(index))
            checksums.append(_checksum(elements))
            write = array[stored.part(index)].write(elements, can_reference_source_data_indefinitely=True)
            pending.append((write, elements.nbytes))
            if len(pending) == IN_FLIGHT:
                finish()
        while pending:
            finish()
    except ValueError as error:
        raise _as_os_error(error, path) from error
    finally:
        for write, _ in pending:
            # Whoever cleans up must not find new files while doing so.
            write.exception()
    return dataclasses.replace(stored, checksums=tuple(checksums))


def write_tree_metadata(parameters: Path, config: LlamaConfig) -> None:
    """Write the file that makes the arrays in `parameters` an Orbax checkpoint of a tree."""
    # Orbax takes a second or two to import, and readers do without.
    import orbax.checkpoint as ocp

    class Handler(ocp.type_handlers.NumpyHandler):
        """Leaves the arrays themselves out; read back, they are ordinary NumPy leaves."""

        async def serialize(
            self,
            values: Sequence[Any],  # noqa: ARG002
            infos: Sequence[Any],
            args: Sequence[Any] | None = None,  # noqa: ARG002
        ) -> Sequence[Any]:
            for info in infos:
                await info.await_path_creation()
            return []

        def memory_size(self, values: Sequence[Any]) -> Sequence[tuple[int, int]]:
            # Asked by Orbax before 0.12.4, for its log only.
            return [(0, 0)] * len(values)

    tree = nest({path: _Elsewhere() for path in parameter_shapes(config)})
    # Conversion is a matter of one process, also where others belong to the same JAX cluster.
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    registry = ocp.type_handlers.create_type_handler_registry((_Elsewhere, Handler()))
    with _quiet_orbax(), tempfile.TemporaryDirectory() as scratch:
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(Path(scratch).absolute() / ARRAYS, args=ocp.args.PyTreeSave(tree))
        # Its other files hold times, and are not needed to restore.
        data = (Path(scratch) / ARRAYS / "_METADATA").read_bytes()
    (parameters / "_METADATA").write_bytes(data)


def array_directory(parameters: Path, path: str) -> Path:
    """Where an array lies, named as Orbax names it."""
    return parameters / path.replace("/", ".")


def chunk_file(path: str, stored: StoredArray, chunk: int) -> str:
    """Where a chunk of an array lies in `parameters/`, named as Zarr names it."""
    place = ["0"] * len(stored.shape)
    place[stored.axis] = str(chunk)
    return f"{path.replace('/', '.')}/{'.'.join(place)}"


def metadata_files(config: LlamaConfig) -> list[str]:
    """The files in `parameters/` that are no chunks of arrays."""
    return ["_METADATA", *(f"{path.replace('/', '.')}/.zarray" for path in parameter_shapes(config))]


def first_missing(checkpoint: ConvertedCheckpoint) -> str | None:
    """The first file of a converted checkpoint that is not there in its full length, in words; reads no array.

    Local checkpoints only.
    """
    for name, facts in (checkpoint.manifest.files | checkpoint.manifest.metadata).items():
        if not _has_size(checkpoint.directory / name, facts.bytes):
            return f"file {name} is missing or cut short"
    for path, stored in checkpoint.manifest.arrays.items():
        for chunk in range(stored.chunks):
            file = checkpoint.directory / ARRAYS / chunk_file(path, stored, chunk)
            if not _has_size(file, stored.chunk_bytes):
                return f"chunk {chunk} of {stored.chunks} of array {path!r} is missing or cut short"
    return None


@dataclasses.dataclass(frozen=True)
class _Elsewhere:
    """Stands in Orbax's tree for an array that is written by other means."""


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _spec(parameters: Path, path: str) -> Json:
    return {
        "driver": "zarr",
        "kvstore": key_value_store(array_directory(parameters, path)),
        "fill_missing_data_reads": False,
    }


def _open_array(parameters: Path, path: str, stored: StoredArray) -> Any:
    array = tensorstore.open(_spec(parameters, path), open=True).result()
    if array.shape != stored.shape or array.dtype.name != stored.dtype:
        raise ValueError(f"it is {array.dtype.name} {array.shape}, {manifest.FILE} says {stored.dtype} {stored.shape}")
    chunk = array.chunk_layout.read_chunk.shape or stored.shape
    if chunk[stored.axis] != stored.length:
        raise ValueError(f"its chunks have length {chunk[stored.axis]}, {manifest.FILE} says {stored.length}")
    return array


def _read_part(array: Any, stored: StoredArray, part: Part) -> np.ndarray:
    """Read the chunks that `part` touches, check them, and cut them."""
    wanted = part[stored.axis]
    if not stored.touched(part):
        return np.empty([max(index.stop - index.start, 0) for index in part], STORED[stored.dtype])
    whole = part == tuple(slice(0, size) for size in stored.shape)
    result = None
    pending: collections.deque[tuple[int, Any]] = collections.deque()
    following = iter(stored.touched(part))

    def start() -> None:
        for chunk in following:
            pending.append((chunk, array[stored.part(chunk)].read()))
            if len(pending) == IN_FLIGHT:
                return

    start()
    while pending:
        chunk, reading = pending.popleft()
        elements = reading.result()
        if _checksum(elements) != stored.checksums[chunk]:
            raise ValueError(f"chunk {chunk} of {stored.chunks} does not have the checksum that {manifest.FILE} says")
        if whole and stored.chunks == 1:
            return elements
        if result is None:
            result = np.empty([index.stop - index.start for index in part], elements.dtype)
        first = stored.part(chunk)[stored.axis].start
        cut, place = list(part), [slice(None)] * len(part)
        low, high = max(wanted.start, first), min(wanted.stop, first + elements.shape[stored.axis])
        cut[stored.axis] = slice(low - first, high - first)
        place[stored.axis] = slice(low - wanted.start, high - wanted.start)
        result[tuple(place)] = elements[tuple(cut)]
        start()
    assert result is not None
    return result


def _checksum(elements: np.ndarray) -> str:
    elements = np.ascontiguousarray(elements)
    return xxhash.xxh3_128_hexdigest(elements.reshape(-1).view(np.uint8).data)


def _short(error: Exception) -> str:
    """TensorStore's message without the whole specification that it appends to some."""
    return str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]


def _as_os_error(error: ValueError, path: str) -> OSError | ValueError:
    """TensorStore reports what the file system says as `ValueError`."""
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    if code is None:
        return error
    if int(code[1]) == errno.ENOSPC:
        return OSError(errno.ENOSPC, f"no space left on the disk while writing array {path!r}")
    return OSError(int(code[1]), f"cannot write array {path!r}: {os.strerror(int(code[1]))}")


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Hide warnings about features that are left out here on purpose (OCDBT, metadata of `jax.Array`).

    Errors too: they are raised as well, and logged with a traceback.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
