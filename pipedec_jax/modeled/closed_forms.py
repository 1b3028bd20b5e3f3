"""Closed forms of the papers: tokens per verification and speedups from an acceptance rate, in pure NumPy.

All arguments may be arrays; they broadcast. Letters: `a` acceptance, the chance that a guess is what its verifier would
have given after the same text, each guess independent of the others; `c` passes of the draft for each pass of the
verifier; `g` guesses that a verification finds. Speedups name their baseline. The formula of a filled pipe (PipeDec,
arXiv 2504.04104) is `pipedec_jax.modeled.cost.speedup_filled_pipe`.

Where a form's assumption fails, the corrected form stands beside it: PipeSpec and classic speculative decoding both
take a verification for as long as a plain step, which the PipeSpec paper's own data contradict (3.5 plain steps with
its 70B target); `pipespec_speedup` and `speculative_speedup` take its cost as an argument. No closed form is known for
more than two models, where what a verification finds varies: `pipedec_jax.modeled.hierarchy` simulates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.float64]


def accepted_run(acceptance: ArrayLike, guesses: ArrayLike) -> Numbers:
    """Tokens of a verification of `g` guesses on right text: those before the first mismatch, and one of its own.

    `(1 - a^(g+1)) / (1 - a)`; `g + 1` at a = 1. Leviathan et al. (arXiv 2211.17192), equation 1.

    Raises:
        ValueError: when an acceptance is not from 0 to 1, or a number of guesses is negative.
    """
    a, g = _rates(acceptance), _at_least(guesses, 0, "guesses")
    sure = a == 1
    safe = np.where(sure, 0.0, a)
    return np.where(sure, g + 1, (1 - safe ** (g + 1)) / (1 - safe))


def pipespec_guesses(passes: ArrayLike) -> Numbers:
    """Guesses that a verification of PipeSpec finds (g) when the draft makes `c` passes in its time: `c - 1`.

    The first guess meets the token that the verifier adds itself. Derived; g = c is off by up to 40 % (2 to 16 passes).
    """
    return _at_least(passes, 1, "passes") - 1


def pipespec_steady_chance(acceptance: ArrayLike, guesses: ArrayLike) -> Numbers:
    """The chance that a pass finds its input still valid, in the long run: `rho = a / (1 - a^(g+1) + a)`.

    The fixed point of `rho(t+1) = rho(t) a^(g+1) + (1 - rho(t)) a`, rho(t) the chance of pass t. PipeSpec (arXiv
    2505.01572), two neighbours.
    """
    a, g = _rates(acceptance), _at_least(guesses, 0, "guesses")
    return a / (1 - a ** (g + 1) + a)


def pipespec_tokens(acceptance: ArrayLike, guesses: ArrayLike) -> Numbers:
    """Tokens per pass of the verifier, in the long run: `(1 - rho) + rho (1 - a^(g+1)) / (1 - a)`.

    Over 1 for 0 < a < 1 and g >= 1. PipeSpec (arXiv 2505.01572), two neighbours. This is the speedup over plain
    decoding where a verification lasts as long as a plain step and the draft keeps up.
    """
    rho = pipespec_steady_chance(acceptance, guesses)
    return (1 - rho) + rho * accepted_run(acceptance, guesses)


def pipespec_speedup(acceptance: ArrayLike, passes: ArrayLike, verification: ArrayLike = 1.0) -> Numbers:
    """Speedup of two free-running models over plain decoding when a verification lasts as long as `v` plain steps.

    The correction of `pipespec_tokens`, which it equals at v = 1. The draft makes c passes beside a plain step and v c
    beside a verification, so a verification finds c - 1 guesses after a plain step and v c - 1 after another one. With
    p the share of plain steps and u, w those of the two kinds of verification:

        u = p a      w = u a^c / (1 - a^(v c))      p + u + w = 1
        speedup = (p + u (1 - a^c) / (1 - a) + w (1 - a^(v c)) / (1 - a)) / (p + v (u + w))

    Derived here. Can be below 1: a gain for every acceptance is lost where verifying costs much and finds little.
    """
    a, c = _rates(acceptance), _at_least(passes, 1, "passes")
    v = _at_least(verification, 1, "verification")
    first, later = pipespec_guesses(c), pipespec_guesses(v * c)
    fails = 1 - a ** (v * c)
    with np.errstate(divide="ignore", invalid="ignore"):
        later_weight = np.where(fails > 0, a * a**c / np.where(fails > 0, fails, 1.0), np.inf)
    # Per plain step; where a = 1 all but the first two passes are verifications of the later kind.
    plain, u = 1.0, a
    tokens = plain + u * accepted_run(a, first) + later_weight * accepted_run(a, later)
    time = plain + v * (u + later_weight)
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(later_weight), accepted_run(a, later) / v, tokens / time)


def pipespec_lockstep_speedup(acceptance: ArrayLike, passes: ArrayLike, verification: ArrayLike = 1.0) -> Numbers:
    """Speedup of two models in lockstep over plain decoding: the draft makes c passes in every tick, and then waits.

    A tick lasts a plain step where there is nothing to verify and v plain steps elsewhere:
    `E[N] / (1 - rho + v rho)`. Derived here.
    """
    g = pipespec_guesses(passes)
    rho, v = pipespec_steady_chance(acceptance, g), _at_least(verification, 1, "verification")
    return pipespec_tokens(acceptance, g) / (1 - rho + v * rho)


def speculative_speedup(
    acceptance: ArrayLike, guesses: ArrayLike, speed: ArrayLike, verification: ArrayLike = 1.0
) -> Numbers:
    """Speedup of classic draft-then-verify over plain decoding: `(1 - a^(g+1)) / ((1 - a) (g / c + v))`.

    Leviathan et al. (arXiv 2211.17192), theorem 3.8, with v = 1, as the PipeSpec paper compares itself with it.

    Args:
        acceptance: a.
        guesses: that the draft makes before each verification (the lookahead, g).
        speed: the draft's speed over the target's, in passes (c).
        verification: the time of a verification over that of a plain step (v).
    """
    c, v = _at_least(speed, 0, "speed"), _at_least(verification, 1, "verification")
    g = _at_least(guesses, 0, "guesses")
    if np.any(c == 0):
        raise ValueError("speed must be over 0")
    return accepted_run(acceptance, g) / (g / c + v)


def ppsd_ticks_per_token(acceptance: ArrayLike, exit_stages: ArrayLike, stages: ArrayLike) -> Numbers:
    """Ticks per token of PPSD (arXiv 2509.19368): `a e + (1 - a) n`, e stages up to the exit of n. Derived.

    PP takes n. The head of the exit is not charged.
    """
    a, e, n = _rates(acceptance), _at_least(exit_stages, 1, "exit_stages"), _at_least(stages, 1, "stages")
    if np.any(e > n):
        raise ValueError("exit_stages must not exceed stages")
    return a * e + (1 - a) * n


def eesd_ticks_per_token(acceptance: ArrayLike, run: ArrayLike, exit_stages: ArrayLike, stages: ArrayLike) -> Numbers:
    """The same of EESD: `k e + n` ticks a round of k drafts, over the `1 + a + .. + a^k` tokens that it gives."""
    k, e, n = _at_least(run, 1, "run"), _at_least(exit_stages, 1, "exit_stages"), _at_least(stages, 1, "stages")
    return (k * e + n) / accepted_run(acceptance, k)


def ppsd_speedup(acceptance: ArrayLike, exit_layers: ArrayLike, layers: ArrayLike) -> Numbers:
    """Speedup of PPSD (arXiv 2509.19368) over plain decoding, in layers: `L / (a E + (1 - a) L)`. Derived."""
    return np.asarray(layers, np.float64) / ppsd_ticks_per_token(acceptance, exit_layers, layers)


def eesd_speedup(acceptance: ArrayLike, run: ArrayLike, exit_layers: ArrayLike, layers: ArrayLike) -> Numbers:
    """Speedup over plain decoding of early-exit speculation that drafts, then verifies (EESD), PPSD's baseline.

    `k` tokens run through the first E layers one after another, then together through the other L - E, whose choices
    are the last word: `L (1 - a^k) / ((1 - a) (k E + L - E))`. 1 at k = 1. Derived.
    """
    k = _at_least(run, 1, "run")
    E, L = _at_least(exit_layers, 1, "exit_layers"), _at_least(layers, 1, "layers")
    if np.any(E > L):
        raise ValueError("exit_layers must not exceed layers")
    return L * accepted_run(acceptance, k - 1) / (k * E + L - E)


def _rates(value: ArrayLike) -> Numbers:
    rates = np.asarray(value, np.float64)
    if not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError(f"an acceptance must be from 0 to 1, not {value!r}")
    return rates


def _at_least(value: ArrayLike, least: float, name: str) -> Numbers:
    numbers = np.asarray(value, np.float64)
    if not np.all((numbers >= least) & np.isfinite(numbers)):
        raise ValueError(f"{name} must be at least {least} and finite, not {value!r}")
    return numbers
