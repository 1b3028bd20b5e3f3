"""The command: `python -m checkpoints_convert convert | inspect | verify`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence

import jax

from checkpoints_convert.checkpoint import DTYPES
from checkpoints_convert.conversion import convert
from checkpoints_convert.report import as_text, describe
from checkpoints_convert.verify import LOGIT_TOLERANCE, differences, logit_difference


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 verified to be wrong, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130


def _convert(options: argparse.Namespace) -> int:
    destination = convert(options.source, options.destination, options.dtype, overwrite=options.overwrite)
    print(f"converted {options.source} to {destination}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    facts = describe(options.checkpoint)
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0


def _verify(options: argparse.Namespace) -> int:
    wrong = 0
    for difference in differences(options.source, options.destination):
        wrong += 1
        print(f"wrong: {difference}", file=sys.stderr)
    if wrong:
        return 1
    print("config, tokenizer files and all tensors are as in the source")
    if options.no_logits:
        return 0
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"logits not compared: {' and '.join(missing)} not installed")
        return 0
    found = logit_difference(options.source, options.destination)
    print(f"logits, float32: max|difference| / max|logit| = {found:.2g} (allowed: {LOGIT_TOLERANCE:g})")
    # Written so that NaN fails.
    return 0 if found <= LOGIT_TOLERANCE else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m checkpoints_convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("convert", help="convert a Hugging Face LLaMA directory")
    command.add_argument("source", metavar="SRC", help="directory with config.json, safetensors and tokenizer files")
    command.add_argument("destination", metavar="DST", help="directory to create")
    command.add_argument("--dtype", choices=list(DTYPES), help="stored dtype (default: the source's)")
    command.add_argument("--overwrite", action="store_true", help="replace a converted checkpoint at DST")
    command.set_defaults(run=_convert)

    command = commands.add_parser("inspect", help="print geometry, parameters, dtype and size")
    command.add_argument("checkpoint", metavar="DIR", help="converted checkpoint or Hugging Face directory")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="prove that DST is SRC converted")
    command.add_argument("source", metavar="SRC")
    command.add_argument("destination", metavar="DST")
    command.add_argument("--no-logits", action="store_true", help="do not compare logits with Hugging Face's model")
    command.set_defaults(run=_verify)
    return parser


if __name__ == "__main__":
    # Files need no accelerator, and JAX would reserve most of its memory.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
