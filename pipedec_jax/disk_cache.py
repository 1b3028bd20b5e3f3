"""Where what took time to make is kept from one process to the next: conversions, and compiled programs beside them."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "PIPEDEC_JAX_CACHE"
"""Environment variable that names the directory."""
COMPILATION_VARIABLE = "PIPEDEC_JAX_COMPILATION_CACHE"
"""Environment variable that switches the keeping of compiled programs off: `0`, `off`, `false` or `no`."""
OFF = ("0", "off", "false", "no")
LEAST_SECONDS = 0.1
"""Programs that compile in less time are not kept."""


def cache_directory(directory: str | Path | None = None) -> Path:
    """The directory given, else `$PIPEDEC_JAX_CACHE`, else `~/.cache/pipedec_jax`."""
    return Path(directory or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "pipedec_jax")


def use_compilation_cache() -> Path | None:
    """Make this process keep compiled programs in `compiled` below the cache directory, and find them there.

    For programs, such as `scripts/generate.py`, to call before anything is compiled: it changes JAX's configuration.
    What was set by JAX's own variables (`JAX_COMPILATION_CACHE_DIR`, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`,
    `JAX_ENABLE_COMPILATION_CACHE`) stays. JAX's keys hold the program, the versions of JAX and XLA, the flags and the
    kind of device, so nothing stale is found. An entry that a kill left half written is not used: JAX warns
    at every start and compiles. The directory only grows, and may be removed at any time.

    Returns:
        The directory; `None` when switched off.

    Raises:
        ValueError: for a switch that says neither.
    """
    import jax

    switch = os.environ.get(COMPILATION_VARIABLE, "").strip().lower()
    if switch in OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if switch not in ("", "1", "on", "true", "yes"):
        raise ValueError(f"{COMPILATION_VARIABLE} must be on or off, not {switch!r}; {CACHE_VARIABLE} names the place")
    place = getattr(jax.config, "jax_compilation_cache_dir", None)
    if place is None:
        place = cache_directory() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(place))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return Path(place)
