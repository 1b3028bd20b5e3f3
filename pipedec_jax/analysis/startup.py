"""From the start of a process to its first token: how long, and in what.

`python -m pipedec_jax.analysis.startup BEGUN` is what `measure_startup` runs in a process of its own: the demo's
default decoding of `scripts/generate.py` up to the first tokens, with a clock between its steps. With options as JSON
behind it, it is what `measure_first_text` runs: any method, with a clock at both ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipedec_jax.disk_cache import CACHE_VARIABLE, COMPILATION_VARIABLE

JAX_PLACE = "JAX_COMPILATION_CACHE_DIR"

STEPS = ("imports", "models", "weights", "caches", "tracing", "compiling", "first token")
"""In order: the interpreter, JAX and this package; configs and tokenizers; weights onto the devices; empty caches;
programs traced and lowered; compiled, or read from the disk; prefill and ticks to the first token."""
PROMPT = "def quicksort(items):\n"


def measure_startup(cache: Path) -> dict[str, float]:
    """Seconds of each of `STEPS` in a new process that keeps, and finds, compiled programs under `cache`.

    Raises:
        RuntimeError: when the process fails.
    """
    return _run([repr(time.time())], cache)


def measure_first_text(options: Mapping[str, Any], prompt: str, new_tokens: int, cache: Path) -> float:
    """Seconds from the start of a new process to its first piece of text, compiled programs kept under `cache`.

    Args:
        options: of `scripts/generate.py`, those that differ from its defaults, JSON-ready.
        prompt: to answer.
        new_tokens: that the answer would have.
        cache: directory; an empty one makes the start cold.

    Raises:
        RuntimeError: when the process fails.
    """
    given = json.dumps({"options": dict(options), "prompt": prompt, "new_tokens": new_tokens}, default=str)
    return _run([repr(time.time()), given], cache)


def _run(arguments: Sequence[str], cache: Path) -> Any:
    """What a process of this module prints last."""
    command = [sys.executable, "-m", "pipedec_jax.analysis.startup", *arguments]
    # A place for compiled programs that the user has named would make a cold start warm.
    kept = {name: value for name, value in os.environ.items() if name not in (COMPILATION_VARIABLE, JAX_PLACE)}
    environment = kept | {CACHE_VARIABLE: str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that was measured failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def first_text(begun: float, given: Mapping[str, Any]) -> None:
    """Open what `generate.py` would for these options, decode up to some text, print the seconds since `begun`."""
    from pipedec_jax.disk_cache import use_compilation_cache

    use_compilation_cache()
    from pipedec_jax.command_line.opening import open_decoder
    from pipedec_jax.command_line.options import parse

    options = dict(given["options"])
    if options.get("calibration"):
        options["calibration"] = Path(options["calibration"])
    decoder = open_decoder(argparse.Namespace(**{**vars(parse([])), **options}))
    next(decoder.stream(given["prompt"], max_new_tokens=given["new_tokens"]), "")
    print(json.dumps(time.time() - begun))


def main() -> None:
    """Decode up to the first token; print the seconds of each step as JSON."""
    if len(sys.argv) > 2:
        first_text(float(sys.argv[1]), json.loads(sys.argv[2]))
        return
    marks = [float(sys.argv[1])]
    from pipedec_jax.disk_cache import use_compilation_cache

    use_compilation_cache()
    import jax

    import pipedec_jax
    from pipedec_jax.pipeline.engine import Engine

    opened = pipedec_jax.Decoder
    pipedec_jax.use_cpu_devices(5)
    jax.devices()
    marks.append(time.time())
    decoder = opened(pipedec_jax.load_demo("target"), pipedec_jax.load_demo("draft"))
    request = decoder.request(PROMPT)
    marks.append(time.time())
    engine: Engine = decoder.prepare()
    jax.block_until_ready(engine.weights)
    marks.append(time.time())
    length = len(request.prompt) + request.max_new_tokens
    jax.block_until_ready(engine.new_local(engine.capacity_for(length)))
    marks.append(time.time())
    spent = [0.0]
    compile_lowered = jax.stages.Lowered.compile

    def timed(lowered: jax.stages.Lowered, *arguments: object, **options: object) -> jax.stages.Compiled:
        begun = time.time()
        compiled = compile_lowered(lowered, *arguments, **options)  # pyright: ignore[reportArgumentType]
        spent[0] += time.time() - begun
        return compiled

    jax.stages.Lowered.compile = timed  # pyright: ignore[reportAttributeAccessIssue]
    engine.programs(length)
    marks += [time.time() - spent[0], time.time()]
    engine.start(request.prompt, max_new_tokens=request.max_new_tokens)
    engine.run(1)
    marks.append(time.time())
    seconds = (after - before for before, after in itertools.pairwise(marks))
    print(json.dumps(dict(zip(STEPS, seconds, strict=True))))


if __name__ == "__main__":
    main()
