"""What is read of a process that another one's fault has ended."""

from pipedec_jax.hosts import faults


def test_the_answers_header_is_no_answer(tmp_path):
    out = tmp_path / "answers.jsonl"
    assert faults.answers(out) == 0
    out.write_bytes(b"")
    assert faults.answers(out) == 0
    out.write_bytes(b"header\n")
    assert faults.answers(out) == 0
    out.write_bytes(b"header\none\ntorn")
    assert faults.answers(out) == 1


def test_our_own_word_is_taken_before_jax_s_and_that_before_any_other():
    jax = "E1127 client.h:80] Terminating process because the JAX distributed service detected fatal errors."
    assert faults._message(f"warning\n{jax}\nerror: process 1 is gone\nlast\n") == "error: process 1 is gone"
    assert faults._message(f"warning\n{jax}\n").startswith("Terminating process because")
    assert faults._message("\nwarning\nlast\n") == "warning"
    assert faults._message("") == ""
