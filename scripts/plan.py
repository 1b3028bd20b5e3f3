r"""Choose a method, stages and width for a target, a draft and so many devices, before anything is loaded.

Everything it prints is predicted: the parts' seconds come from a calibration (scripts/calibrate.py) or, without one,
from a device's memory bandwidth and peak operations; ticks per token from a hit curve, by default the demo family's;
the links from the command line. Beside this software's methods stand what the same devices could do instead. Ends with
status 1 where nothing fits.

python scripts/plan.py --target configs/llama-3.1-70b.json --draft configs/llama-3.2-1b.json --devices 15 \
    --bandwidth 2800 --peak 800 --memory 80 --link-bandwidth 10 --link-latency 15
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from pipedec_jax.analysis.hit_curve import HitCurve, read_hit_curve
from pipedec_jax.analysis.links import Link
from pipedec_jax.analysis.plan import Plan, make_plan
from pipedec_jax.analysis.prediction import Device, Prediction, Problem, cache_costs, roofline_costs, rows_needed
from pipedec_jax.command_line.geometries import geometry_and_tokenizer, read_object
from pipedec_jax.command_line.output import Parser, fail, run_command
from pipedec_jax.config import LlamaConfig
from pipedec_jax.model.exit_head import VARIANTS
from pipedec_jax.modeled.cost import Costs, calibrated_costs
from pipedec_jax.tokenizer import check_same_tokens

DEMO_CURVE = Path(__file__).resolve().parent.parent / "configs" / "demo_hit_curve.json"
GIGA = 1e9
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--target", required=True, metavar="CONFIG", help="geometry (JSON, see configs/) or a model")
    parser.add_argument("--draft", metavar="CONFIG", help="the same for the draft; left out: methods without one")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="devices, the draft's rank among them")
    parser.add_argument("--calibration", metavar="FILE", help="measured seconds of these models' parts (calibrate.py)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="without a calibration: a device's memory")
    parser.add_argument("--peak", type=float, metavar="TFLOP/s", help="without a calibration: a device's operations")
    parser.add_argument("--memory", type=float, metavar="GB", help="of a device; without it nothing is checked to fit")
    parser.add_argument("--link-bandwidth", type=float, default=25.0, metavar="GB/s", help="of a device (25)")
    parser.add_argument("--link-latency", type=float, default=10.0, metavar="US", help="of a message (10 microseconds)")
    parser.add_argument("--hit-curve", metavar="FILE", default=str(DEMO_CURVE), help="ticks per token (the demo's)")
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="prompt and answer (4096, or the target's context if that is less)",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of weights and caches (bfloat16)")
    parser.add_argument("--exit-head", default="block", choices=VARIANTS, help="that PPSD would be given (block)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Raise `ValueError`, naming the option and what was given, for a number that no device, link or text has."""
    for name in ("devices", "context"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    for name, unit in (("bandwidth", "GB/s"), ("peak", "TFLOP/s"), ("memory", "GB"), ("link_bandwidth", "GB/s")):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number over 0 ({unit}), not {value:g}")
    if not 0 <= args.link_latency < math.inf:
        raise ValueError(
            f"--link-latency must be a finite number of at least 0 (microseconds), not {args.link_latency:g}"
        )


def pair(target: str, draft: str | None) -> tuple[LlamaConfig, LlamaConfig | None]:
    """The geometries of a target and of a draft that may guess for it.

    Raises:
        ValueError: where they have not the same tokens, as far as can be told.
    """
    config, tokens = geometry_and_tokenizer(target, "target")
    if draft is None:
        return config, None
    other, drafts = geometry_and_tokenizer(draft, "draft")
    if tokens is not None and drafts is not None:
        check_same_tokens(tokens, drafts)
    elif config.vocab_size != other.vocab_size:
        raise ValueError(
            f"--draft {draft} has a vocabulary of {other.vocab_size} and --target {target} one of {config.vocab_size}, "
            "but a pair must share its tokenizer: give a draft of the target's family, or none"
        )
    return config, other


def costs_of(
    args: argparse.Namespace, target: LlamaConfig, draft: LlamaConfig | None, curve: HitCurve
) -> tuple[Costs, Costs | None, str]:
    """Seconds of the parts, those of a slot of the cache, and in words where they are from."""
    if args.calibration is not None:
        if args.bandwidth is not None or args.peak is not None:
            raise ValueError("give --calibration, or --bandwidth and --peak, not both")
        seconds = read_object(args.calibration, "calibration")
        try:
            costs = calibrated_costs(seconds, target, draft, args.dtype)
        except TypeError as error:
            raise ValueError(f"calibration {args.calibration}: {error}") from None
        if "measured" not in seconds:
            raise ValueError(
                f"calibration {args.calibration} does not say of which models it was measured: make one with "
                "calibrate.py"
            )
        return costs, None, f"measured by parts on one machine ({args.calibration})"
    if args.bandwidth is None or args.peak is None:
        raise ValueError("give --calibration FILE, or a device's --bandwidth (GB/s) and --peak (TFLOP/s)")
    device = Device(bandwidth=args.bandwidth * GIGA, operations=args.peak * 1e12)
    costs, per_slot = (
        part(target, draft, device, item_bytes=DTYPES[args.dtype], rows=rows_needed(curve))
        for part in (roofline_costs, cache_costs)
    )
    source = f"a roofline of {args.bandwidth:g} GB/s and {args.peak:g} TFLOP/s a device, no fixed cost of a tick"
    return costs, per_slot, source


def milliseconds(seconds: float) -> str:
    """To the hundredth, and below one to three digits."""
    return f"{1e3 * seconds:.2f}" if seconds >= 1e-3 else f"{1e3 * seconds:.3g}"


def describe(found: Prediction) -> str:
    """One prediction in words."""
    words = [found.method]
    if found.drafter not in ("none", "exit head"):
        words.append(f"drafter {found.drafter}")
    if found.exit_layer is not None:
        words.append(f"exit after layer {found.exit_layer}")
    if found.stages > 1 or found.ours:
        words.append(f"{found.stages} stage{'s' if found.stages > 1 else ''}")
    if found.tensor > 1:
        words.append(f"each over {found.tensor} devices" if found.stages > 1 else f"over {found.tensor} devices")
    if found.draft_steps is not None and found.exit_layer is None:
        what = "level" if "static" in found.method or found.method == "stpp" else "draft step"
        words.append(f"width {found.width}, {found.draft_steps} {what}{'s' if found.draft_steps > 1 else ''}")
    return ", ".join(words)


def verdict(plan: Plan, problem: Problem) -> list[str]:
    """What follows, in plain words."""
    lines = []
    best, other = plan.chosen, plan.best_alternative
    for found in (*plan.methods, *plan.alternatives):
        if found.fits is False:
            assert problem.memory is not None
            lines.append(
                f"does not fit: {describe(found)} needs at least {found.bytes / GIGA:.3g} GB a device, of "
                f"{problem.memory / GIGA:g}"
            )
    if best is None and other is None:
        return [*lines, "nothing fits: more devices, more memory, a narrower dtype or a shorter context is needed"]
    if best is None:
        assert other is not None
        return [
            *lines,
            f"no method of this software fits; use {describe(other)}: {milliseconds(other.seconds)} ms a token",
        ]
    lines.append(f"would choose: {describe(best)}: {milliseconds(best.seconds)} ms a token")
    if other is not None and other.seconds < best.seconds:
        lines.append(
            f"but {describe(other)} WINS: {milliseconds(other.seconds)} ms a token, "
            f"{best.seconds / other.seconds:.2f} times as fast as that"
        )
    elif other is not None:
        lines.append(
            f"it wins: {other.seconds / best.seconds:.2f} times as fast as the best of the alternatives, "
            f"{describe(other)} at {milliseconds(other.seconds)} ms"
        )
    if plan.needed_hit_rate is not None and other is not None:
        need = plan.needed_hit_rate
        at = f"at a hit rate of {need:.2f}" if need <= 1 else "at no hit rate"
        lines.append(f"pipedec as above would equal {describe(other)} {'at any hit rate' if need <= 0 else at}")
    return lines


def table(predictions: list[Prediction], baseline: float) -> None:
    """Print predictions as a Markdown table."""
    print("| method | devices | ticks per token | ms a tick | ms a token | pp / this | GB a device | |")
    print("|" + " --- |" * 8)
    for found in predictions:
        ticks = "-" if found.ticks is None else f"{found.ticks:.2f}{'*' if found.beyond else ''}"
        tick = "-" if found.tick_seconds is None else milliseconds(found.tick_seconds)
        fits = {None: "", True: "fits", False: "does NOT fit"}[found.fits]
        print(
            f"| {describe(found)} | {found.devices} | {ticks} | {tick} | {milliseconds(found.seconds)} | "
            f"{baseline / found.seconds:.2f} | {found.bytes / GIGA:.3g} | {fits} |"
        )


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, predict, print; 1 where nothing fits, else 0."""
    args = parse(arguments)
    try:
        check(args)
        target, draft = pair(args.target, args.draft)
        if args.context is None:
            args.context = min(4096, target.context, draft.context if draft else target.context)
        curve = read_hit_curve(read_object(args.hit_curve, "hit curve"))
        costs, per_slot, source = costs_of(args, target, draft, curve)
        problem = Problem(
            target=target,
            draft=draft,
            costs=costs,
            curve=curve,
            link=Link(bandwidth=args.link_bandwidth * GIGA, latency=args.link_latency * 1e-6),
            devices=args.devices,
            context=args.context,
            memory=None if args.memory is None else args.memory * GIGA,
            dtype=args.dtype,
            exit_head=args.exit_head,
            per_slot=per_slot,
        )
        plan = make_plan(problem)
    except (OSError, ValueError) as error:
        fail(error)
    basis = [
        f"times: {source}",
        f"links: {args.link_bandwidth:g} GB/s and {args.link_latency:g} us a message, between any two devices alike",
        f"ticks per token: {Path(args.hit_curve).name}: {curve.about or 'it does not say where it is from'}",
    ]
    if args.memory is None:
        basis.append("memory: not checked, as --memory was not given")
    words, status = verdict(plan, problem), int(plan.chosen is None and plan.best_alternative is None)
    if args.json:
        groups = {name: [x.to_dict() for x in getattr(plan, name)] for name in ("methods", "alternatives")}
        chosen = plan.chosen and plan.chosen.to_dict()
        best = plan.best_alternative and plan.best_alternative.to_dict()
        need = plan.needed_hit_rate
        found = {"kind": "predicted", "from": basis, "argv": sys.argv[1:] if arguments is None else arguments, **groups}
        found |= {"chosen": chosen, "best_alternative": best, "pipedec_needs_hit_rate": need, "verdict": words}
        print(json.dumps(found, indent=1))
        return status
    baseline = plan.methods[0].seconds
    print(
        f"PREDICTED, nothing here was measured as a whole. {args.devices} devices, {args.dtype}, {args.context} tokens."
    )
    print("\n".join(f"  {line}" for line in basis))
    print("\nThis software (the best setting of each; * the hit curve continued over its last point)")
    table(list(plan.methods), baseline)
    print("\nThe same devices without it, in their favour: no fixed cost of a step, layers split exactly")
    table(list(plan.alternatives), baseline)
    print()
    print("\n".join(words))
    return status


if __name__ == "__main__":
    run_command(main)
