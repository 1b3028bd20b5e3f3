"""Int8 layers beside plain ones: logits, bytes on the device, and speed of plain decoding on one device.

python scripts/measure_int8.py                  # the demo target on held-out files
python scripts/measure_int8.py --target DIR     # any model, on random tokens
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np

import pipedec_jax
from pipedec_jax.analysis.held_out import held_out_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="converted or Hugging Face directory (default: the demo target)")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=200, help="tokens of a prompt at most")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="to compute in")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row instead of the table")
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(1)
    import jax

    from pipedec_jax.analysis import int8_effect

    def load(int8: bool) -> pipedec_jax.Model:
        if args.target is None:
            return pipedec_jax.load_demo("target", int8=int8)
        return pipedec_jax.load(args.target, int8=int8)

    plain, rounded = load(False), load(True)
    if args.target is None:
        prompts = [plain.tokenizer.encode(prompt.text)[: args.length] for prompt in held_out_prompts(args.prompts, 0)]
    else:
        noise = np.random.default_rng(0)
        prompts = [noise.integers(plain.vocab_size, size=args.length).tolist() for _ in range(args.prompts)]
    expected = [int8_effect.logits(plain, prompt, "float32") for prompt in prompts]
    if not args.json:
        print(f"{plain.name}, {jax.devices()[0].device_kind}, {len(prompts)} prompts of {args.length} tokens at most")
        columns = ["computed in", "layers", "MB of layers, of the rest", "max, RMS difference of logits", "same choice"]
        print(f"| {' | '.join([*columns, 'KL', 'tokens/s (lowest to highest)'])} |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for dtype in args.dtypes:
        for model, layers in ((plain, dtype), (rounded, "int8")):
            found = [int8_effect.logits(model, prompt, dtype) for prompt in prompts]
            logits = int8_effect.compare(np.concatenate(found), np.concatenate(expected))
            speed = int8_effect.measure_speed(model, prompts, dtype, args.max_new_tokens)
            if args.json:
                row = {"dtype": dtype, "layers": layers, **dataclasses.asdict(logits), **dataclasses.asdict(speed)}
                print(json.dumps(row), flush=True)
                continue
            print(
                f"| {dtype} | {layers} | {speed.layer_bytes / 1e6:.1f}, {speed.other_bytes / 1e6:.1f} | "
                f"{logits.largest:.2g}, {logits.typical:.2g} | {logits.same_choice:.2%} | {logits.divergence:.2g} | "
                f"{speed.tokens_per_s:.1f} ({speed.spread[0]:.1f} to {speed.spread[1]:.1f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
