"""Files that are as hostile as the limits allow: what a process takes for them stays under 1 GB, all else included."""

import base64
import json
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from pipedec_jax import small_files


def index(source):
    (source / "model.safetensors").unlink()
    entries = ",".join(f'"{i:x}":"a"' for i in range(small_files.JSON_KEYS - 9))
    (source / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{entries}}}}}')


def config(source):
    (source / "config.json").write_text(f"[{','.join(['{}'] * (small_files.JSON_VALUES // 2 - 9))}]")


def header(source):
    entries = ",".join(f'"{i:x}":"ab"' for i in range(small_files.JSON_KEYS - 9))
    text = f'{{"__metadata__":{{{entries}}}}}'.encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def tokenizer_json(source):
    values = json.loads((source / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {f"x{i:x}": i for i in range(6, small_files.JSON_KEYS - 100)}
    values["model"]["merges"] += [["a", "b"]] * ((small_files.JSON_VALUES - small_files.JSON_KEYS) // 3 - 100)
    (source / "tokenizer.json").write_text(json.dumps(values, separators=(",", ":")))


def tokenizer_model(source):
    (source / "tokenizer.json").unlink()
    tokens = [*(bytes([byte]) for byte in range(256)), *(f"{i:x}".encode() for i in range(256, 10**6))]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (source / "tokenizer.model").write_bytes(lines[: lines[: small_files.MOST_BYTES["tokenizer.model"]].rfind(b"\n")])


def pickled(source):
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    torch.save({"a": torch.ones(1)}, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            # A byte makes a set.
            archive.writestr(name, b"\x80\x04(" + b"\x8f" * (2**21 - 2000) + b"l." if name.endswith(".pkl") else data)


@pytest.mark.slow
@pytest.mark.parametrize("make", [index, config, header, tokenizer_json, tokenizer_model, pickled])
def test_a_hostile_file_takes_less_than_a_gigabyte(make, source, tmp_path):
    make(source)
    code = (
        "from checkpoints_convert.__main__ import main\n"
        f"status = main(['convert', {str(source)!r}, {str(tmp_path / 'converted')!r}])\n"
        "print(status, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, peak = map(int, done.stdout.split())
    assert status == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert peak * 1024 < 10**9
