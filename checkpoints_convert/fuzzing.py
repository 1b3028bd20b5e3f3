"""Corrupted checkpoints by the thousand: each must end in a clear error or a correct result, nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.checkpoint import Checkpoint
from checkpoints_convert.conversion import convert
from checkpoints_convert.hugging_face import export_hugging_face, tensor_name, to_hugging_face
from checkpoints_convert.meta import NAMES
from checkpoints_convert.source import same_bits
from checkpoints_convert.store import is_converted, open_checkpoint
from checkpoints_convert.verify import damage, differences
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.parameters import flatten, nest, parameter_shapes

CONFIG = LlamaConfig(
    vocab_size=16, width=8, feed_forward=12, layers=1, heads=2, kv_heads=2, head_size=4, context=32, rope_theta=10000.0
)
SECONDS = 60
"""After which an input counts as one that hangs."""
MEMORY = 2 * 10**9
"""Bytes of address space beyond those in use at the start."""

EXPECTED = (ValueError, OSError, ImportError)
"""What a bad input may raise: what the command turns into one line."""

Kind = str
Corrupt = Callable[[Path, random.Random], str]
"""Corrupts a directory in place, and says what it did."""


class Hang(BaseException):
    """An input took longer than `SECONDS`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    seed: int
    what: str
    """Which input, and what was done to it."""
    error: str | None
    """The message it ended in; None where it ended in a correct result."""


class Fuzzer:
    """Makes corrupted inputs from a few good ones, and tries them.

    Args:
        directory: to work in; everything in it but the good inputs is removed after each try.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.good = directory / "good"
        self.elsewhere = directory / "elsewhere"
        self.trial = directory / "trial"
        self.elsewhere.mkdir(parents=True)
        self.kinds = sorted(_write_good(self.good, self.elsewhere))
        self._arrays = dict(flatten(_tree()))

    def run(self, seed: int) -> Outcome:
        """Make input number `seed` and try it.

        Raises:
            AssertionError: when it ends in anything but a clear error or a correct result.
        """
        rng = random.Random(seed)
        kind = rng.choice(self.kinds)
        self.trial.mkdir()
        before = _contents(self.elsewhere)
        try:
            shutil.copytree(self.good / kind, self.trial / kind, symlinks=True)
            place = next((self.trial / kind).rglob("snapshots/*"), self.trial / kind)
            full = kind != "converted" and rng.random() < 0.05
            limit = rng.randrange(4000) if full else None
            what = f"{kind}: " + (
                f"no file may exceed {limit} bytes" if full else _corrupt(place, kind, self.elsewhere, rng)
            )
            error = self._try(kind, place, limit, what)
            assert _contents(self.elsewhere) == before, f"{what}: something outside was written"
            return Outcome(seed, what, error)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            shutil.rmtree(self.trial)

    def _try(self, kind: Kind, place: Path, limit: int | None, what: str) -> str | None:
        destination = self.trial / "out"
        try:
            with _time_limit(), _file_limit(limit):
                if kind == "converted":
                    self._read(place)
                else:
                    convert(place, destination)
        except EXPECTED as error:
            if not str(error).strip():
                raise AssertionError(f"{what}: {type(error).__name__} without a message") from error
            left = sorted(path.name for path in self.trial.iterdir() if path.name != kind)
            if left:
                raise AssertionError(f"{what}: {left} left behind after {error}") from error
            return f"{type(error).__name__}: {error}"
        except (Exception, Hang) as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        if kind != "converted":
            assert is_converted(destination), what
            assert list(damage(destination)) == [], what
            assert list(differences(place, destination)) == [], what
        return None

    def _read(self, place: Path) -> None:
        """Read a converted checkpoint: what it gives must be what was stored."""
        checkpoint: Checkpoint = open_checkpoint(place)
        if checkpoint.config != CONFIG:
            # Arrays of the right shapes under another RoPE or epsilon: no checksum covers the manifest itself.
            return
        for path, array in self._arrays.items():
            found = checkpoint.read(path)
            expected = array.astype(found.dtype)
            assert same_bits(found, expected), f"{path} was read wrong"


def limit_memory() -> None:
    """Let no input take more than `MEMORY` beyond what the process has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


def _tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return nest({path: rng.normal(size=shape).astype(np.float32) for path, shape in parameter_shapes(CONFIG).items()})


def _write_good(root: Path, elsewhere: Path) -> list[Kind]:
    """One good input of each kind."""
    import torch
    from safetensors.numpy import load_file, save_file

    single = root / "single"
    export_hugging_face(CONFIG, _tree(), single, bos_token_id=1, eos_token_id=[2, 3])
    (single / "tokenizer.json").write_text("{}")
    (single / "generation_config.json").write_text('{"eos_token_id": [2]}')
    tensors = load_file(single / "model.safetensors")
    names = sorted(tensors)
    torch_tensors = {name: torch.from_numpy(value) for name, value in tensors.items()}

    for kind, ending in (("sharded", "model{}.safetensors"), ("pickled shards", "pytorch_model{}.bin")):
        shutil.copytree(single, root / kind)
        (root / kind / "model.safetensors").unlink()
        weight_map = {}
        for shard in range(2):
            file = ending.format(f"-{shard + 1:05d}-of-00002")
            part = names[shard::2]
            if kind == "sharded":
                save_file({name: tensors[name] for name in part}, root / kind / file)
            else:
                torch.save({name: torch_tensors[name] for name in part}, root / kind / file)
            weight_map |= dict.fromkeys(part, file)
        (root / kind / (ending.format("") + ".index.json")).write_text(json.dumps({"weight_map": weight_map}))
    shutil.copytree(single, root / "pickled")
    (root / "pickled" / "model.safetensors").unlink()
    torch.save(torch_tensors, root / "pickled" / "pytorch_model.bin")

    meta = root / "meta"
    meta.mkdir()
    ranks: list[dict[str, Any]] = [{}, {}]
    for path, array in flatten(_tree()):
        *parents, leaf = path.split("/")
        name, axis = NAMES[leaf]
        theirs = torch.from_numpy(np.ascontiguousarray(to_hugging_face(path, array)))
        parts = [theirs] * 2 if theirs.ndim == 1 else theirs.chunk(2, dim=axis or 0)
        for rank, part in zip(ranks, parts, strict=True):
            rank[".".join([*parents, name])] = part.clone()
    for number, rank in enumerate(ranks):
        torch.save(rank, meta / f"consolidated.{number:02d}.pth")
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (meta / "params.json").write_text(json.dumps(params))
    (meta / "tokenizer.model").write_bytes(b"\n\x0e")

    snapshot = root / "cache" / "models--a--b" / "snapshots" / "0123"
    blobs = root / "cache" / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in single.iterdir():
        shutil.copyfile(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    convert(single, root / "converted")
    assert tensor_name("embedding") in tensors
    shutil.copytree(single, elsewhere / "model")
    return [path.name for path in root.iterdir()]


def _corrupt(place: Path, kind: Kind, elsewhere: Path, rng: random.Random) -> str:
    """Do one to three things to a directory."""
    ways: list[Corrupt] = [_flip, _flip, _truncate, _hostile_json, _hostile_json, _remove]
    if kind in ("single", "sharded", "cache"):
        ways += [_hostile_header, _hostile_header, _hostile_length]
    if kind in ("pickled", "pickled shards", "meta"):
        ways += [_harmful_pickle(elsewhere), _rewritten_pickle]
    if kind != "converted":
        ways.append(_pipe)
    link = _link_out(elsewhere)
    ways.append(link)
    chosen = [rng.choice(ways) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    # Last, so that nothing here writes through a link.
    chosen.sort(key=lambda way: way is link)
    return "; ".join(way(place, rng) for way in chosen)


def _pick(place: Path, rng: random.Random, *endings: str) -> Path | None:
    """A regular file of a directory, through links."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    files = [path for path in files if not endings or path.name.endswith(endings)]
    return rng.choice(files) if files else None


def _flip(place: Path, rng: random.Random) -> str:
    """Change some bytes, more often near the beginning, where headers are."""
    file = _pick(place, rng)
    if file is None or not (data := bytearray(file.read_bytes())):
        return "nothing"
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
        data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    file.write_bytes(data)
    return f"bytes changed in {file.name}"


def _truncate(place: Path, rng: random.Random) -> str:
    file = _pick(place, rng)
    if file is None:
        return "nothing"
    data = file.read_bytes()
    longer = rng.random() < 0.2
    file.write_bytes(data + rng.randbytes(rng.randrange(1, 99)) if longer else data[: rng.randrange(len(data) + 1)])
    return f"{file.name} {'extended' if longer else 'cut short'}"


def _remove(place: Path, rng: random.Random) -> str:
    file = _pick(place, rng)
    if file is None:
        return "nothing"
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
        return f"{file.name} replaced by a directory"
    return f"{file.name} removed"


def _pipe(place: Path, rng: random.Random) -> str:
    file = _pick(place, rng)
    if file is None:
        return "nothing"
    file.unlink()
    os.mkfifo(file)
    return f"{file.name} replaced by a pipe nobody writes to"


def _link_out(elsewhere: Path) -> Corrupt:
    def link(place: Path, rng: random.Random) -> str:
        file = _pick(place, rng)
        if file is None:
            return "nothing"
        twin = elsewhere / "model" / file.name
        target = rng.choice([twin if twin.exists() else elsewhere, Path("/etc/passwd"), Path("/dev/zero"), file])
        file.unlink()
        file.symlink_to(target)
        return f"{file.name} replaced by a link to {target}"

    return link


HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2, 7, 2**31, 2**62, 2**64, 10**30, -(2**63), 0.5, 1e308, float("inf"), float("nan"), "", "x",
    "../../elsewhere/x", "/etc/passwd", "a\0b", "\ud800", "x" * 10**5, [], [[]], {}, {"": {}}, [0, 2**62], [-1, 3], [8],
    "llama", "float32", "BF16",
]  # fmt: skip


def _hostile_json(place: Path, rng: random.Random) -> str:
    """Set, add or remove one value anywhere in a JSON file; or nest it deeply."""
    file = _pick(place, rng, ".json", ".zarray", "_METADATA")
    if file is None:
        return "nothing"
    if rng.random() < 0.05:
        file.write_text("[" * 10**5 if rng.random() < 0.5 else '{"a":' * 10**5)
        return f"{file.name} nested deeply"
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return "nothing"
    nodes = [node for node in _nodes(values) if node]
    if not nodes:
        return "nothing"
    node = rng.choice(nodes)
    key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
    value = rng.choice(HOSTILE)
    way = rng.random()
    if way < 0.15:
        del node[key]
    elif way < 0.25 and isinstance(node, dict):
        node[rng.choice(["../x", "/x", "extra", "\0"])] = node[key]
    else:
        node[key] = value
    file.write_text(json.dumps(values), errors="surrogatepass")
    return f"{file.name}: {str(key)[:40]!r} set to {str(value)[:40]!r}, removed or renamed"


def _nodes(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _nodes(inner)


def _hostile_header(place: Path, rng: random.Random) -> str:
    """Change the header of a safetensors file, its length kept right."""
    file = _pick(place, rng, ".safetensors")
    if file is None or len(data := file.read_bytes()) < 8:
        return "nothing"
    (size,) = struct.unpack("<Q", data[:8])
    try:
        header = json.loads(data[8 : 8 + size])
        tensors = [entry for entry in header.values() if isinstance(entry, dict) and "shape" in entry]
        entry = rng.choice(tensors)
    except (ValueError, IndexError, AttributeError, RecursionError):
        return "nothing"
    key = rng.choice(["shape", "dtype", "data_offsets"])
    value = rng.choice([*HOSTILE, "F16", "I8", "F64", [0, 0], [16, 8], [8, 16], [128], [2**32, 2**32], [1] * 99])
    if key == "data_offsets" and rng.random() < 0.5:
        value = [rng.choice((0, 8, 2**40, -8)) + number for number in entry[key]]
    entry[key] = value
    with contextlib.suppress(UnicodeEncodeError):
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return f"{file.name}: {key} set to {str(value)[:40]}"


def _hostile_length(place: Path, rng: random.Random) -> str:
    file = _pick(place, rng, ".safetensors")
    if file is None:
        return "nothing"
    data = file.read_bytes()
    length = rng.choice([0, 1, 8, 2**31, 2**40, 2**63, 2**64 - 1, len(data), rng.randrange(len(data) + 9)])
    file.write_bytes(struct.pack("<Q", length) + data[8:])
    return f"{file.name}: header length {length}"


class _Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _harmful_pickle(elsewhere: Path) -> Corrupt:
    """Put a pickle that would write a file into an archive, or in its stead."""

    def harm(place: Path, rng: random.Random) -> str:
        file = _pick(place, rng, ".bin", ".pth")
        if file is None:
            return "nothing"
        data = pickle.dumps({"model.norm.weight": _Harm(elsewhere / "ran")}, protocol=2)
        if rng.random() < 0.3:
            file.write_bytes(data)
        else:
            _rewrite(file, lambda name, old: data if name.endswith("data.pkl") else old)
        return f"{file.name} would run code"

    return harm


def _rewritten_pickle(place: Path, rng: random.Random) -> str:
    """Change some bytes of an archive's entry, its checksum kept right."""
    file = _pick(place, rng, ".bin", ".pth")
    if file is None:
        return "nothing"
    ending = rng.choice(("data.pkl", "data.pkl", "byteorder", "version", "/0"))

    def change(name: str, old: bytes) -> bytes:
        if not name.endswith(ending) or not old:
            return old
        new = bytearray(old)
        for _ in range(rng.choice((1, 2, 5))):
            new[rng.randrange(len(new))] = rng.randrange(256)
        return bytes(new[: rng.randrange(len(new)) + 1]) if rng.random() < 0.1 else bytes(new)

    _rewrite(file, change)
    return f"{file.name}: {ending} changed"


def _rewrite(file: Path, change: Callable[[str, bytes], bytes]) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError):
        return
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _file_limit(limit: int | None) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, as on a disk that is full."""
    if limit is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
