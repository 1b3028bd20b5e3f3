"""What was measured and predicted where a hierarchy was chosen, in words."""

from __future__ import annotations

from collections.abc import Sequence

from pipedec_jax.hierarchy.choice import Choice
from pipedec_jax.hierarchy.measure import Measured
from pipedec_jax.hierarchy.race import Entry


def describe(choice: Choice | None, names: Sequence[str], method: str = "pipespec") -> str:
    """A choice among models of these names; `None` is plain decoding."""
    if choice is None:
        return f"{names[-1]} alone, plain decoding"
    used = ", ".join(names[index] for index in choice.models)
    if method == "speculative":
        return f"{used}: lookahead {choice.passes[0]}"
    stages = f", stages {' '.join(map(str, choice.stages))}" if max(choice.stages) > 1 else ""
    return f"{used}: passes {' '.join(map(str, choice.passes))}, width {choice.width}{stages}"


def lines(
    measured: Measured, choice: Choice | None, raced: Sequence[Entry], names: Sequence[str], method: str = "pipespec"
) -> list[str]:
    """A report to print: each figure says what it is."""
    found = ["measured at start: ms a pass, by the rows that it computes; and the share of the target's tokens said"]
    for index, (name, seconds) in enumerate(zip(names, measured.seconds, strict=True)):
        times = ", ".join(f"{rows}: {1e3 * second:.3f}" for rows, second in sorted(seconds.items()))
        share = f"  {measured.agreement(index):.2f}" if index + 1 < len(names) else ""
        found.append(f"  {name:<16} {times}{share}")
    dispatch = f"{1e3 * measured.dispatch:.3f} ms" if measured.dispatch else "less than could be measured"
    found.append(
        f"  plain decoding   {1e3 * measured.plain:.3f} ms a token; a tick's dispatch adds {dispatch} to its passes"
    )
    if measured.shared:
        found.append(f"  bringing buffers to all processes: {1e3 * measured.shared:.3f} ms a tick")
    for name, added in zip(names, measured.exchange, strict=False):
        if added:
            times = ", ".join(f"of {count} stages {1e3 * second:.3f}" for count, second in sorted(added.items()))
            found.append(f"  exchange of {name}, ms a tick: {times}")
    if raced:
        found.append(
            "ms a token: measured in a short race, with all models running; predicted with devices of their own"
        )
        for entry in raced:
            form = "" if entry.choice is None else ", free-running" if entry.form == "free" else ", lockstep"
            predicted = "" if entry.predicted is None else f" (predicted {1e3 * entry.predicted:.2f})"
            line = f"  {1e3 * entry.measured:7.2f}{predicted}  {describe(entry.choice, names, method)}{form}"
            if entry.differs_at is not None:
                line += f"; left out: token {entry.differs_at} of its answer is not plain decoding's (rounding)"
            found.append(line)
        found.append(f"chosen, the fastest measured: {describe(choice, names, method)}")
    elif choice is not None:
        found.append(
            f"chosen, the fastest predicted with devices of their own: {describe(choice, names, method)}; "
            f"{1e3 * choice.seconds:.2f} ms a token, {choice.speedup:.2f} times as fast as plain decoding"
        )
    return found
