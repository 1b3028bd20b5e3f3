"""Shared by all tests: many virtual CPU devices, strict promotion, and small tokenizers."""

import functools
import gc
import json
import os
import re
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

# All of this must be said before JAX starts. A collective that hangs shall fail instead.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share an accelerator's memory
# Most of the tests' time is compiling, of which LLVM's optimisation is a third; what XLA itself does is left as it is.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=120"
    " --xla_backend_optimization_level=0"
)
# Programs that several tests, or processes that they start, need alike are compiled once.
COMPILED = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="pipedec_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import hypothesis
import jax
import numpy as np
import pytest

DEVICES = 17
"""16 stages and a draft."""

jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Times vary on shared cores, so no deadline.
hypothesis.settings.register_profile("light", deadline=None, max_examples=30)
hypothesis.settings.load_profile("light")

CORPUS = [
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "for index, value in enumerate(values):\n    print(index, value, sep=', ')\n",
    "The quick brown fox jumps over the lazy dog. Größe, naïve, 日本語, 中文, emoji 🎉🚀.\n",
    "import os\nimport sys\n\nif __name__ == '__main__':\n    sys.exit(main(sys.argv[1:]))\n",
]


TOO_FEW_DEVICES = re.compile(r"needs (\d+|two) devices|\d+ devices are needed|Number of devices 1 must be")


def pytest_configure(config: pytest.Config) -> None:
    """On an accelerator what takes more devices than it has is decoded on virtual CPU devices, and says so."""
    config.addinivalue_line("filterwarnings", "ignore:decoding on virtual CPU devices")


def skip_where_there_are_too_few_devices() -> Generator[None, Any, Any]:
    """On an accelerator (JAX_PLATFORMS=cuda,cpu), skip what takes more devices than it has."""
    try:
        return (yield)
    except BaseException as error:  # pytest's own failures are not `Exception`s
        # Also where another message was expected: what a test is about comes after the devices are counted.
        found = TOO_FEW_DEVICES.search(f"{error} {error.__context__}")
        if found and jax.default_backend() != "cpu":
            pytest.skip(f"too few devices here: {found[0]}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from skip_where_there_are_too_few_devices())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from skip_where_there_are_too_few_devices())


def pytest_unconfigure() -> None:
    """Remove the compiled programs."""
    if COMPILED is not None:
        COMPILED.cleanup()


MOST_MAPS = 20_000
"""Of a process's memory; Linux allows 65,530, each compiled program takes some, and LLVM dies where none is left."""


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Forget compiled programs after a module, and what tests keep with them, where a process has very many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        for module in [module for name, module in sys.modules.items() if name.startswith("tests.")]:
            for kept in vars(module).values():
                if isinstance(kept, functools._lru_cache_wrapper):
                    kept.cache_clear()
        jax.clear_caches()
        gc.collect()


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def x64():
    """Run a test with 64-bit types."""
    with jax.enable_x64(True):
        yield


def write_byte_level(directory: Path, vocab_size: int = 400, extra: tuple[str, ...] = (), chat: bool = True) -> Path:
    """Write a byte-level BPE tokenizer as LLaMA 3 has it; `extra` special tokens change its token map."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": "<|end_of_text|>",
        "clean_up_tokenization_spaces": True,  # As LLaMA 3 has it; our text must not be cleaned up.
    }
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    return _write(directory, tokenizer, settings)


def write_byte_fallback(directory: Path) -> Path:
    """Write a sentencepiece-like tokenizer with byte fallback as LLaMA 2 has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_and_control = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=bytes_and_control, limit_alphabet=70, max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    description = json.loads(tokenizer.to_str())
    # The trainer makes the byte tokens special; in a LLaMA tokenizer only the control tokens are.
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _write(directory, tokenizer, settings)


def _write(directory: Path, tokenizer, settings: dict) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory) -> Path:
    """A directory with a byte-level tokenizer and a chat template."""
    return write_byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def byte_fallback_dir(tmp_path_factory) -> Path:
    """A directory with a byte-fallback tokenizer and no chat template."""
    return write_byte_fallback(tmp_path_factory.mktemp("byte_fallback"))


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face directories of a tiny `target` (4 layers, a chat template) and `draft`, with random weights.

    The draft's embedding has more padding rows than the target's.
    """
    from checkpoints_convert import export_hugging_face
    from pipedec_jax.config import LlamaConfig
    from pipedec_jax.model.parameters import nest, parameter_shapes

    root = tmp_path_factory.mktemp("family")
    shape = {"feed_forward": 48, "heads": 2, "kv_heads": 1, "head_size": 16, "context": 128}
    for index, (name, vocab_size, width, layers) in enumerate((("target", 416, 32, 4), ("draft", 448, 16, 1))):
        config = LlamaConfig(vocab_size=vocab_size, width=width, layers=layers, tied_embeddings=True, **shape)
        directory = write_byte_level(root / name)
        noise = np.random.default_rng(index)
        arrays = {
            path: noise.normal(0, 0.3, shape).astype(np.float32) for path, shape in parameter_shapes(config).items()
        }
        export_hugging_face(config, nest(arrays), directory, bos_token_id=0, eos_token_id=[1, 2])
    return {name: root / name for name in ("target", "draft")}


def copy_target(family: dict[str, Path], folder: Path) -> Path:
    """A copy of the tiny target in a folder, without exit heads."""
    import shutil

    return Path(shutil.copytree(family["target"], folder / "target", ignore=shutil.ignore_patterns("exits")))


def store_head(directory: Path, head, agreement=None, dtype: str = "float32"):
    """Store a random exit head beside the target in `directory`; returns its arrays."""
    from pipedec_jax.exit_store import fingerprint, save_exit_head
    from pipedec_jax.loading import load
    from pipedec_jax.model.exit_head import head_shapes
    from pipedec_jax.model.parameters import nest

    target, noise = load(directory), np.random.default_rng(0)
    shapes = head_shapes(head, target.config)
    tree = nest({path: noise.normal(size=shape).astype(np.float32) for path, shape in shapes.items()})
    save_exit_head(directory, head, target.config, tree, fingerprint(target.source), dtype, {}, agreement)
    return tree


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keep conversions out of the user's cache."""
    before = os.environ.get("PIPEDEC_JAX_CACHE")
    os.environ["PIPEDEC_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield Path(os.environ["PIPEDEC_JAX_CACHE"])
    if before is None:
        del os.environ["PIPEDEC_JAX_CACHE"]
    else:
        os.environ["PIPEDEC_JAX_CACHE"] = before
