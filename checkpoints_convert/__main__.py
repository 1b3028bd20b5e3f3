"""The command: `python -m checkpoints_convert convert | inspect | verify | export | list`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import jax

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.conversion import convert, destination_path
from checkpoints_convert.detection import is_source
from checkpoints_convert.hub import local_directory
from checkpoints_convert.hugging_face_export import export
from checkpoints_convert.library import as_json, library, table
from checkpoints_convert.paths import is_cloud
from checkpoints_convert.report import as_text, describe
from checkpoints_convert.store import is_converted, open_checkpoint
from checkpoints_convert.tokenizer_check import padding
from checkpoints_convert.verify import LOGIT_TOLERANCE, damage, differences, logit_difference
from checkpoints_convert.workplace import workplace_of
from pipedec_jax.command_line.output import discard_output, in_words


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Its exit status: 0 done, 1 verified to be wrong, 2 bad input, 130 interrupted, 141 its output was closed,
        143 terminated.
    """
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        discard_output()
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: there is not enough memory; are the sizes in the model's configuration right?", file=sys.stderr)
        return 2
    except Exception as error:
        # What object stores are reached with raises errors of many kinds, such as for missing credentials.
        if not any(isinstance(value, str) and is_cloud(value) for value in vars(options).values()):
            raise
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as error:
        print(f"interrupted{_what_is_kept(options)}", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130


def _what_is_kept(options: argparse.Namespace) -> str:
    """What to say after an interrupt: where an unfinished conversion lies, and what becomes of it."""
    if options.run is not _convert:
        return ""
    target = destination_path(options.destination)
    kept = workplace_of(target)
    if not kept.exists():
        return " before anything was written"
    place = target if is_cloud(target) else kept
    return (
        f"; what is done is kept in {place}: the same command again goes on where it was (to give up, remove that "
        "directory)"
    )


def _convert(options: argparse.Namespace) -> int:
    destination = convert(
        options.source, options.destination, options.dtype, int8=options.int8, overwrite=options.overwrite
    )
    print(f"converted {options.source} to {destination}")
    facts = describe(destination)
    if line := padding(facts["model"]["vocab_size"], facts["tokens"]):
        print(line)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    facts = describe(local_directory(options.checkpoint))
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0


def _verify(options: argparse.Namespace) -> int:
    alone = options.destination is None
    source = options.source if alone else local_directory(options.source)
    found = damage(source) if alone else differences(source, options.destination)
    wrong = 0
    for difference in found:
        wrong += 1
        print(f"wrong: {difference}", file=sys.stderr)
    if wrong:
        return 1
    print(f"config, tokenizer files and all tensors are as in the {'manifest' if alone else 'source'}")
    if options.no_logits or alone:
        return 0
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"passed WITHOUT the logits: {' and '.join(missing)} not installed (pip install 'pipedec_jax[torch]', and "
            "run the same command again)"
        )
        return 0
    difference = logit_difference(source, options.destination)
    rounded = open_checkpoint(options.destination).config.int8
    limit = "int8 rounds: no limit" if rounded else f"allowed: {LOGIT_TOLERANCE:g}"
    print(f"logits, float32: max|difference| / max|logit| = {difference:.2g} ({limit})")
    # Written so that NaN fails.
    return 0 if difference <= (math.inf if rounded else LOGIT_TOLERANCE) else 1


def _export(options: argparse.Namespace) -> int:
    print(f"exported {options.checkpoint} to {export(options.checkpoint, options.directory)}")
    return 0


def _list(options: argparse.Namespace) -> int:
    entries = library(options.directory)
    if entries or options.json:
        print(json.dumps(as_json(entries), indent=2) if options.json else table(entries))
        return 0
    itself = is_converted(options.directory) or is_source(options.directory)
    hint = " (it is one itself: see `inspect`)" if itself else ""
    print(f"{options.directory} holds no checkpoints{hint}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_convert",
        description="Convert LLaMA checkpoints; inspect, verify, export and list what was converted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    source = "a model's directory, in Hugging Face's or Meta's format, or a hub repository (org/name)"

    command = commands.add_parser("convert", help="convert a LLaMA model; started again, it goes on where it was")
    command.add_argument("source", metavar="SRC", help=source)
    command.add_argument("destination", metavar="DST", help="directory to create (gs://... too)")
    command.add_argument("--dtype", choices=list(DTYPES), help="stored dtype (default: the source's)")
    command.add_argument(
        "--int8", action="store_true", help="store the layers' matrices as int8 with a scale per output channel"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace a converted checkpoint at DST, if there is nothing else in it"
    )
    command.set_defaults(run=_convert)

    command = commands.add_parser("inspect", help="print geometry, parameters, dtype and size")
    command.add_argument("checkpoint", metavar="DIR", help=f"converted checkpoint, or {source}")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="prove that DST is whole, or that it is SRC converted")
    command.add_argument("source", metavar="[SRC] DST", help="DST alone is compared with its manifest's checksums")
    command.add_argument("destination", metavar="", nargs="?", help=argparse.SUPPRESS)
    command.add_argument("--no-logits", action="store_true", help="do not compare logits with the source's own model")
    command.set_defaults(run=_verify)

    command = commands.add_parser("export", help="write DST back as Hugging Face safetensors")
    command.add_argument("checkpoint", metavar="DST")
    command.add_argument("directory", metavar="HF_DIR", help="directory to create")
    command.set_defaults(run=_export)

    command = commands.add_parser("list", help="show the checkpoints in a directory")
    command.add_argument("directory", metavar="DIR")
    command.add_argument("--json", action="store_true", help="print one JSON list")
    command.set_defaults(run=_list)
    return parser


def _terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise Terminated


if __name__ == "__main__":
    # Files need no accelerator, and JAX would reserve most of its memory.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
