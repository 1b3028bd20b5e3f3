"""Questions of the benchmark's tests, and the names of the decoders that answer them (`decoders` in conftest.py)."""

from pipedec_jax.analysis.questions import Question

LONG = "while True:\n" * 40
QUESTIONS = [
    Question(81, "writing", ("def quicksort(items):", "class Stack:"), 1),
    Question(82, "writing", (LONG, "never asked"), 2),
    Question("qa/1", "qa", ("x = 1", LONG), 3),
    Question(83, "qa", ("for x in", "return", "y ="), 4),
]
NAMES = ("pp-2", "best-first-2x4")
