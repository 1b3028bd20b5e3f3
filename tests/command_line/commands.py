"""What tests of `scripts/generate.py` share."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"
SIZES = ["--stages", "2", "--width", "4", "--children", "2", "--max-new-tokens", "20"]
OPTIONS = {
    *(
        "prompt",
        "prompt_file",
        "prompts",
        "out",
        "chat",
        "target",
        "draft",
        "method",
        "stages",
        "tensor_parallel",
        "idle_ranks",
        "width",
        "children",
        "max_new_tokens",
    ),
    *("temperature", "top_k", "top_p", "seed", "stop", "dtype", "memory", "json"),
    *("calibration", "drafter", "draft_steps", "depth", "pool", "sharpness", "noise", "int8"),
    *("exit_layer", "exit_head", "exit_stages", "draft_length", "models", "passes", "form"),
    *("coordinator", "num_processes", "process_id", "hosts", "patience", "start_patience"),
}


def expect_error(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
