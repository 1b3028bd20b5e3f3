"""One run of `scripts/generate.py`: a prompt, or a file of them, decoded as the options say."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from pipedec_jax.command_line.interrupts import ignore_interrupts
from pipedec_jax.command_line.opening import open_decoder
from pipedec_jax.command_line.options import parse, paths_as_text, read_prompt, request_options
from pipedec_jax.command_line.output import Failed, discard_output, fail, is_output
from pipedec_jax.command_line.printing import show
from pipedec_jax.decoding import batch
from pipedec_jax.decoding.request_options import check_request_options
from pipedec_jax.hosts.group import Alone, Group, join
from pipedec_jax.hosts.watch import STATUS

if TYPE_CHECKING:
    from pipedec_jax.decoding.hierarchy import AnyDecoder

HOSTS = ("coordinator", "num_processes", "process_id", "hosts", "patience", "start_patience")
"""How processes find and watch each other; nothing that an answer depends on."""
NO_SETTINGS = ("prompt", "prompt_file", "prompts", "out", "json", "memory", *HOSTS)
"""What may change when a file of prompts is gone on with."""
OF_A_PLACE = ("target", "draft", "models", "calibration", "prompt", "prompt_file", "prompts", "out", *HOSTS)
"""What may differ between processes: names of files, whose content is compared, as is the prompt's text."""


def main(arguments: list[str] | None = None) -> int:
    """Run, and end quietly when interrupted (status 130) or when nobody reads the output any more.

    Of several processes, one that ends early tells the others why, and they end with status 75.

    Returns:
        The status to end with: 0, or 1 where every prompt of a file is bad.
    """
    options = parse(arguments)
    group = Alone()
    try:
        try:
            group = join_others(options)
            status = run(options, group)
            group.leave()
            return status
        except Failed as error:
            group.stop(error.reason, 2)
            raise
        except BrokenPipeError:
            discard_output()
            group.stop("nobody reads its output any more", 1)
            sys.exit(1)
        except Exception as error:
            lost(group, error)
    except KeyboardInterrupt:  # also one that comes while an error is told
        if group.count > 1:
            ignore_interrupts()  # a second one would leave this process at JAX's own barrier
        print("\ninterrupted", file=sys.stderr)
        group.stop("interrupted", 130)
        sys.exit(130)


def join_others(options: argparse.Namespace) -> Alone:
    """The processes of the options' group."""
    try:
        return join(
            options.coordinator,
            options.num_processes,
            options.process_id,
            hosts=options.hosts,
            patience=options.patience,
            start_patience=options.start_patience,
        )
    except ValueError as error:
        fail(error)


def lost(group: Alone, error: Exception) -> NoReturn:
    """End after an error that another process may be the cause of; on its own, a process raises it."""
    if not isinstance(group, Group):
        raise error
    if not isinstance(error, ValueError | RuntimeError):  # no collective fails so: it is this program's own fault
        traceback.print_exception(error)
    reason = group.explain(error)
    print(f"error: process {group.index} of {group.count}: {reason}", file=sys.stderr)
    group.stop(reason, STATUS)
    sys.exit(STATUS)  # a group's `stop` has ended the process


def run(options: argparse.Namespace, group: Alone) -> int:
    """Do what the options say; the status to end with."""
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        check_request_options(**request_options(options))
    except ValueError as error:
        fail(error)
    if options.prompts or options.out:
        return run_batch(options, group)
    try:
        prompt = read_prompt(options)
        if not prompt:
            raise ValueError("the prompt is empty; give some text")
        decoder = open_with(options, group, {"prompt": prompt})
        given = request_options(options)
        tokens = decoder.target.chat(prompt) if options.chat else prompt
        decoder.request(tokens, **given)
        group.prepare(decoder)  # only now that all else is well
    except (ValueError, OSError, ImportError) as error:  # the last where pickled files need torch
        fail(error)
    shows = group.leads and not options.json
    if not options.chat and shows:
        print(prompt, end="", flush=True)
    if sys.stderr.isatty() and group.leads:
        print("compiling (some seconds to a minute) ...", file=sys.stderr)
    stream, shown, error = None, 0, None
    try:
        # Of several processes each look at the text is a step of all: so it has to come at the same tokens.
        with group.step():
            stream = decoder.stream(tokens, chunk=16 if options.json else 4, **given)
        for piece in group.steps(stream):
            if shows:
                print(piece, end="", flush=True)
                shown += len(piece)
    except (KeyboardInterrupt, FloatingPointError) as stopped:
        error = stopped
    result = stream.partial() if stream else None
    if group.leads:
        if not options.json:
            print((result.text[shown:] if result else "") + "\n")
        show(options, decoder, prompt, result)
    if isinstance(error, FloatingPointError):
        fail(error)
    if error is not None:
        raise error
    return 0


def open_with(options: argparse.Namespace, group: Alone, asked: dict[str, str]) -> AnyDecoder:
    """The decoder, after a look at whether all processes would do the same.

    Args:
        options: of this process.
        group: of all.
        asked: what the prompts are, by their names.

    Raises:
        ValueError: when they would not, or as `open_decoder` does.
    """
    if group.count == 1:
        return open_decoder(options)
    from pipedec_jax.hosts.facts import exit_facts, file_digest, model_facts, versions

    own = {f"--{name.replace('_', '-')}": value for name, value in vars(options).items() if name not in OF_A_PLACE}
    calibration = file_digest(options.calibration) if options.calibration else None
    own["--num-processes"] = group.count
    group.check_same("settings", {**versions(), **own, "calibration": calibration, **asked})
    decoder = open_decoder(options)
    models = getattr(decoder, "models", None) or [decoder.target, getattr(decoder, "draft", None)]
    with group.preparing():  # a pickled model is converted here
        facts = model_facts({f"model {i}": model for i, model in enumerate(models) if model})
        facts |= exit_facts(decoder.target, getattr(decoder, "exit_head_config", None))
        group.check_same("models", facts)
    return decoder


def run_batch(options: argparse.Namespace, group: Alone) -> int:
    """Decode the prompts of a file; the status to end with."""
    if options.prompts is None or options.out is None:
        fail("--prompts FILE and --out FILE need each other")
    if options.memory:
        fail("--memory is for one prompt")
    if is_output(options.out):
        fail(f"--out {options.out} is this command's own output, where its last words go: give another file")
    try:
        content = batch.read_lines(options.prompts)
        decoder = open_with(options, group, {f"line {line.number} of the prompts": line.digest for line in content})
        given: dict[str, Any] = {
            **paths_as_text(vars(options)),
            "target": decoder.target.name,
            "dtype": decoder.dtype.name,
        }
        settings = {name: given[name] for name in given if name not in NO_SETTINGS}
        done = batch.decode_file(
            decoder,
            options.prompts,
            options.out,
            settings=settings,
            chat=options.chat,
            group=group,
            lines=content,
            **request_options(options),
        )
    except (ValueError, OSError, ImportError) as error:  # the last where pickled files need torch
        fail(error)
    except KeyboardInterrupt:
        if group.leads:
            print(f"\n{options.out} has every answer that was finished; the same command goes on", file=sys.stderr)
        raise
    if group.leads:
        if options.json:
            print(json.dumps(dataclasses.asdict(done) | {"chosen": decoder.report()}))
        else:
            print(*decoder.report(), done, sep="\n")
    return done.status
