"""From the start of a process to its first token: how long, and in what.

`python -m pipedec_jax.analysis.startup BEGUN` is what `measure_startup` runs in a process of its own: the demo's
default decoding of `scripts/generate.py` up to the first tokens, with a clock between its steps.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pipedec_jax.disk_cache import CACHE_VARIABLE

STEPS = ("imports", "models", "weights", "caches", "tracing", "compiling", "first token")
"""In order: the interpreter, JAX and this package; configs and tokenizers; weights onto the devices; empty caches;
programs traced and lowered; compiled, or read from the disk; prefill and ticks to the first token."""
PROMPT = "def quicksort(items):\n"


def measure_startup(cache: Path) -> dict[str, float]:
    """Seconds of each of `STEPS` in a new process that keeps, and finds, compiled programs under `cache`.

    Raises:
        RuntimeError: when the process fails.
    """
    command = [sys.executable, "-m", "pipedec_jax.analysis.startup", repr(time.time())]
    done = subprocess.run(
        command, env=os.environ | {CACHE_VARIABLE: str(cache)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that was measured failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Decode up to the first token; print the seconds of each step as JSON."""
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
