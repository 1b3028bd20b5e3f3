"""One run of `scripts/generate.py`: a prompt, or a file of them, decoded as the options say."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

from pipedec_jax.command_line.opening import open_decoder
from pipedec_jax.command_line.options import fail, parse, paths_as_text, read_prompt, request_options
from pipedec_jax.command_line.printing import show
from pipedec_jax.decoding import batch

NO_SETTINGS = ("prompt", "prompt_file", "prompts", "out", "json", "memory")
"""What may change when a file of prompts is gone on with."""


def main(arguments: list[str] | None = None) -> None:
    """Run, and end quietly when interrupted (status 130) or when nobody reads the output any more."""
    try:
        run(parse(arguments))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes standard output at exit and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(options: argparse.Namespace) -> None:
    """Do what the options say."""
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    if options.prompts or options.out:
        run_batch(options)
        return
    try:
        prompt = read_prompt(options)
        if not prompt:
            raise ValueError("the prompt is empty; give some text")
        decoder = open_decoder(options)
        given = request_options(options)
        tokens = decoder.target.chat(prompt) if options.chat else prompt
        decoder.request(tokens, **given)
        decoder.prepare()  # only now that all else is well
    except (ValueError, OSError) as error:
        fail(error)
    if not options.chat and not options.json:
        print(prompt, end="", flush=True)
    if sys.stderr.isatty():
        print("compiling (some seconds to a minute) ...", file=sys.stderr)
    stream, shown, error = None, 0, None
    try:
        stream = decoder.stream(tokens, chunk=16 if options.json else 4, **given)
        for piece in stream:
            if not options.json:
                print(piece, end="", flush=True)
                shown += len(piece)
    except (KeyboardInterrupt, FloatingPointError) as stopped:
        error = stopped
    result = stream.partial() if stream else None
    if not options.json:
        print((result.text[shown:] if result else "") + "\n")
    show(options, decoder, prompt, result)
    if isinstance(error, FloatingPointError):
        fail(error)
    if error is not None:
        raise error


def run_batch(options: argparse.Namespace) -> None:
    """Decode the prompts of a file."""
    if options.prompts is None or options.out is None:
        fail("--prompts FILE and --out FILE need each other")
    if options.memory:
        fail("--memory is for one prompt")
    try:
        decoder = open_decoder(options)
        given = {**paths_as_text(vars(options)), "target": decoder.target.name, "dtype": decoder.dtype.name}
        settings = {name: given[name] for name in given if name not in NO_SETTINGS}
        done = batch.decode_file(
            decoder, options.prompts, options.out, settings=settings, chat=options.chat, **request_options(options)
        )
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"\n{options.out} has every answer that was finished; the same command goes on", file=sys.stderr)
        raise
    print(json.dumps(dataclasses.asdict(done)) if options.json else done)
