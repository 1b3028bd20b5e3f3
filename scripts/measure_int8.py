"""Int8 layers beside plain ones: logits, bytes on the device, and speed of plain decoding on one device.

python scripts/measure_int8.py                                      # the demo target on held-out files
python scripts/measure_int8.py --target DIR                         # any model, on random tokens
python scripts/measure_int8.py --config configs/llama-3.2-1b.json   # a geometry with random weights, in bfloat16
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import numpy as np

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.output import Parser, fail, run_command

DTYPES = ("float32", "bfloat16", "float16")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--target", metavar="DIR", help="converted or Hugging Face directory (default: the demo target)")
    model.add_argument("--config", metavar="FILE", help="geometry (JSON, see configs/); weights are random")
    parser.add_argument("--layers", type=int, metavar="L", help="with --config: layers in place of the geometry's")
    parser.add_argument("--prompts", type=int, default=4, help="(4)")
    parser.add_argument("--length", type=int, default=200, help="tokens of a prompt at most (200)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(128)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="to compute in (float32 bfloat16; with --config bfloat16 alone)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per row instead of the table")
    options = parser.parse_args(arguments)
    for name, least in (("layers", 1), ("prompts", 1), ("length", 1), ("max_new_tokens", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if options.layers is not None and options.config is None:
        parser.error("--layers is for --config")
    options.dtypes = options.dtypes or (["bfloat16"] if options.config else ["float32", "bfloat16"])
    return options


def read_model(options: argparse.Namespace) -> tuple[str, Any, int, list[list[int]]]:
    """Name, weights and vocabulary of the model, and token ids of the prompts."""
    from pipedec_jax.model.random_source import RandomSource

    noise = np.random.default_rng(0)
    if options.config is not None:
        from pipedec_jax.command_line.geometries import read_geometry

        config = read_geometry(options.config, "config")
        if options.layers is not None:
            config = dataclasses.replace(config, layers=options.layers)
        name, source, vocab_size = f"{options.config} (random weights)", RandomSource(config), None
    else:
        model = pipedec_jax.load(options.target) if options.target else pipedec_jax.load_demo("target")
        name, source, vocab_size = model.name, model.source, model.vocab_size
        if options.target is None:
            name = "the demo target"
            texts = [prompt.text for prompt in held_out_prompts(options.prompts, 0)]
            return name, source, vocab_size, [model.tokenizer.encode(text)[: options.length] for text in texts]
    if source.config.int8:
        raise ValueError(f"{name} has int8 layers already; give the model that it was made from")
    vocab_size = vocab_size or source.config.vocab_size
    return name, source, vocab_size, noise.integers(vocab_size, size=(options.prompts, options.length)).tolist()


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table."""
    options = parse(arguments)
    begun = time.perf_counter()
    try:
        name, source, vocab_size, prompts = read_model(options)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    import jax

    from pipedec_jax.analysis import int8_effect

    rounded = int8_effect.int8_source(source)
    expected = int8_effect.logits(source, prompts, "float32", vocab_size)
    if not options.json:
        device = jax.devices()[0].device_kind
        lengths = f"{len(prompts)} prompts of {max(map(len, prompts))} tokens at most"
        print(f"{name}, {source.config.layers} layers, {device}, JAX {jax.__version__}, {lengths}; measured")
        columns = [
            "computed in",
            "layers",
            "MB of layers, of the rest, of temporaries",
            "max, RMS difference of logits",
        ]
        columns += ["same choice", "KL", "tokens/s (lowest to highest)", "GB/s of weights", "compiled in, s"]
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for dtype in options.dtypes:
        for weights, layers in ((source, dtype), (rounded, "int8")):
            difference = int8_effect.compare(int8_effect.logits(weights, prompts, dtype, vocab_size), expected)
            speed = int8_effect.measure_speed(weights, prompts, dtype, options.max_new_tokens, vocab_size)
            if options.json:
                row = {"dtype": dtype, "layers": layers, **dataclasses.asdict(difference), **dataclasses.asdict(speed)}
                print(json.dumps(row), flush=True)
                continue
            sizes = (speed.layer_bytes, speed.other_bytes, speed.temporary_bytes)
            print(
                f"| {dtype} | {layers} | {', '.join(f'{size / 1e6:.1f}' for size in sizes)} | "
                f"{difference.largest:.2g}, {difference.typical:.2g} | {difference.same_choice:.2%} | "
                f"{difference.divergence:.2g} | {speed.tokens_per_s:.1f} ({speed.spread[0]:.1f} to "
                f"{speed.spread[1]:.1f}) | {speed.read_bytes_per_s / 1e9:.1f} | {speed.compile_s:.1f} |",
                flush=True,
            )
    if not options.json:
        print(f"took {time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    run_command(main)
