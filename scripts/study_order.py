"""In which order shall candidates be sent? Orders compared on held-out text, with the same draft and the same places.

- probability: the path's log-probability as the draft claims it (sharpness 1).
- calibrated: the same with the sharpness that fit_calibration.py finds.
- savings: probability times the ticks that having the node in flight saves: N less those since its parent was sent.
- both: savings, calibrated.

The orders are schedules written here, outside the package. Ticks are simulated; modeled time is from bytes of weights.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

import pipedec_jax
from pipedec_jax import tree as trees
from pipedec_jax.analysis.held_out import held_out_prompts
from pipedec_jax.command_line.held_out_options import add_held_out_options, check_stages
from pipedec_jax.command_line.numbers import from_1, over_0
from pipedec_jax.command_line.output import Parser, run_command
from pipedec_jax.schedules.best_first import BestFirstSchedule
from pipedec_jax.tree import PredictionTree


@dataclasses.dataclass(frozen=True)
class Savings(BestFirstSchedule):
    """Best-first by probability times the ticks that a node saves which is in flight when it is needed.

    Its parent, sent d ticks ago, will be known in N - d ticks, and the node would be sent only then: so many ticks are
    saved by sending it now.
    """

    stages: int = 1

    def score(self, tree: PredictionTree) -> jax.Array:
        """`[C, 1 + K]`."""
        now = jnp.max(tree.sent_tick) + 1
        since = jnp.where(tree.sent, now - tree.sent_tick, 0)  # nothing is lost yet below a node that waits as well
        parent = trees.at(since, tree.parent, 0)
        ticks = jnp.concatenate((parent[:, None], jnp.broadcast_to(since[:, None], tree.guess_token.shape)), axis=1)
        return super().score(tree) + jnp.log(jnp.maximum(self.stages - ticks, 1).astype(jnp.float32))


def main() -> None:
    """Parse arguments, simulate and print a Markdown table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--stages", type=from_1, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=from_1, nargs="+", default=[8, 32])
    parser.add_argument("--draft-steps", type=from_1, default=2)
    parser.add_argument("--sharpness", type=over_0, default=1.43, help="the calibrated one (default 1.43)")
    add_held_out_options(parser, prompts=4)
    args = parser.parse_args()

    pipedec_jax.use_cpu_devices(max(args.stages) + 1)
    from pipedec_jax.analysis.method_table import plain_answers, simulate

    prompts = [prompt.text for prompt in held_out_prompts(args.prompts, args.seed)]
    target, draft = pipedec_jax.load_demo("target"), pipedec_jax.load_demo("draft")
    check_stages(args.stages, target.config)
    make = functools.partial(pipedec_jax.Decoder, target, draft)
    options = {"max_new_tokens": args.max_new_tokens}
    answers = plain_answers(make, prompts, **options)

    orders = {
        "probability": (1.0, False),
        "calibrated": (args.sharpness, False),
        "savings": (1.0, True),
        "both": (args.sharpness, True),
    }
    print(f"simulated ticks per token, best-first with {args.draft_steps} draft steps, the draft model alone, ", end="")
    print(f"{args.prompts} held-out prompts (seed {args.seed}); in brackets the hit rate and late hits per token")
    print("| stages | width | " + " | ".join(orders) + " |")
    print("|" + " --- |" * (2 + len(orders)))
    for stages in args.stages:
        for width in args.width:
            cells = []
            for sharpness, by_savings in orders.values():
                own = Savings(width, 2 * (args.draft_steps - 1) * width, stages=stages)
                order = {"schedule": own} if by_savings else {"method": "best-first", "width": width}
                sizes = {"stages": stages, "draft_steps": args.draft_steps, "sharpness": sharpness}
                decoder = make(drafter="model", **order, **sizes)
                row = simulate(decoder, prompts, answers, **options)
                cells.append(f"{row.ticks_per_token:.2f} ({row.hit_rate:.3f}, {row.late_hits / row.tokens:.3f})")
            print(f"| {stages} | {width} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_command(main, refusals=(ValueError, OSError))
