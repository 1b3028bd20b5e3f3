"""Other software and this one on the same weights, prompts and cores, in one run: tokens compared, ratios measured.

Peers are Hugging Face transformers on CPU and llama.cpp through its Python binding, both in float32 with both cores,
each plain, with the draft model and with look-up; of ours plain decoding on one device, and methods on two ranks of
this machine. All decode each prompt in turn (A B C A B C). llama.cpp reads float32 GGUF files that this script writes;
of its drafts a few lengths are tried. Answers that differ from our plain decoding's are counted: ours must not, a
peer's may where two scores nearly tie. Compiled programs are kept: run it once before measuring, to compile.

pip install '.[peers]'
python scripts/compare_peers.py --prompts 4 --max-new-tokens 96
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

import pipedec_jax
from pipedec_jax.command_line.numbers import from_0, from_1
from pipedec_jax.command_line.output import Parser, check_place, fail, run_command
from pipedec_jax.hosts.processes import usable_cores
from pipedec_jax.whole_files import write_whole

PLAIN = "ours: plain, one device"


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--prompts", metavar="Q", type=from_1, default=6, help="held-out prompts (6)")
    add("--seed", type=from_0, default=0, help="that draws them (0)")
    add("--max-new-tokens", metavar="M", type=from_1, default=128, help="tokens of each answer (128)")
    add("--rounds", metavar="R", type=from_1, default=1, help="over all prompts (1)")
    add("--threads", metavar="T", type=from_1, default=usable_cores(), help="of the peers (all cores that it may use)")
    add("--only", metavar="TEXT", nargs="+", help="only those whose name holds one of these, and our plain decoding")
    add("--profile", metavar="K", type=from_0, default=0, help="also show the K longest operations of ours, a tick (0)")
    add("--out", metavar="FILE", type=Path, help="also write the rows as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure and print a table."""
    options = parse()
    pipedec_jax.use_cpu_devices(2)
    from pipedec_jax.disk_cache import use_compilation_cache

    use_compilation_cache()
    try:
        if options.out is not None:
            check_place("--out", options.out)
        with tempfile.TemporaryDirectory(prefix="pipedec_jax_peers_") as folder:
            run(options, Path(folder))
    except (ValueError, OSError, ImportError) as error:
        fail(error)


def run(options: argparse.Namespace, folder: Path) -> None:
    from pipedec_jax.analysis.held_out import held_out_prompts
    from pipedec_jax.peers import contest
    from pipedec_jax.peers.entrants import entrants

    target = pipedec_jax.load_demo("target")
    prompts = [target.tokenizer.encode(prompt.text) for prompt in held_out_prompts(options.prompts, options.seed)]
    slots = 1 << (max(map(len, prompts)) + options.max_new_tokens - 1).bit_length()
    chosen = {
        name: make
        for name, make in entrants(folder, slots, options.threads).items()
        if not options.only or name == PLAIN or any(text in name for text in options.only)
    }
    if options.only and not any(text in name for name in chosen for text in options.only):
        raise ValueError(f"--only {' '.join(options.only)}: nobody's name holds any of that")
    peers = {name: make() for name, make in tqdm(chosen.items(), desc="loading", disable=None)}
    turns = len(peers) * (1 + options.rounds * len(prompts))
    with tqdm(total=turns, unit="answer", disable=None) as bar:
        answers = contest.contest(peers, prompts, options.max_new_tokens, rounds=options.rounds, after=bar.update)
    rivals = [name for name in answers if not name.startswith("ours")]
    rows = contest.standings(answers, PLAIN, [PLAIN])
    if rivals:
        strongest = min((row for row in rows if row.name in rivals), key=lambda row: row.per_token_ms).name
        rows = contest.standings(answers, PLAIN, [PLAIN, strongest])
        print(f"strongest peer: {strongest}")
    print_rows(options, rows)
    for name, peer in peers.items() if options.profile else ():
        if name.startswith("ours"):
            print_profile(options, name, peer, prompts[-1])
    if options.out is not None:
        about = {"argv": sys.argv[1:], "rows": [vars(row) for row in rows]}
        write_whole(options.out, json.dumps(about, indent=1) + "\n")
    wrong = [row.name for row in rows if row.name.startswith("ours") and row.same < row.answers]
    if wrong:
        raise SystemExit(f"tokens of ours differ from plain decoding's: {', '.join(wrong)}")


def print_rows(options: argparse.Namespace, rows: list[Any]) -> None:
    print(
        f"{options.prompts} held-out prompts (seed {options.seed}), {options.max_new_tokens} tokens each, greedy, ",
        end="",
    )
    print(f"float32, {options.threads} threads, {options.rounds} rounds; measured, medians; ratios with quartiles")
    baselines = list(rows[0].against)
    heads = ["decodes", "same tokens", "first token, ms", "ms per token after it", "ms per token, prompt included"]
    heads += [f"time of {name} / this" for name in baselines]
    print(f"| {' | '.join(heads)} |")
    print("|" + " --- |" * len(heads))
    for row in rows:
        same = f"{row.same} of {row.answers}" + (f" (first: {row.first_differs})" if row.first_differs else "")
        cells = [row.name, same, f"{row.first_ms:.1f}", f"{row.per_token_ms:.2f}", f"{row.whole_ms:.2f}"]
        cells += ["{:.2f} ({:.2f} to {:.2f})".format(*row.against[name]) for name in baselines]
        print(f"| {' | '.join(cells)} |")


def print_profile(options: argparse.Namespace, name: str, peer: Any, prompt: list[int]) -> None:
    from pipedec_jax.analysis.profile import profile_host

    peer.engine.start(prompt, max_new_tokens=options.max_new_tokens)
    begun = peer.engine.run(1).ticks[-1]
    found = profile_host(lambda: peer.engine.run(options.max_new_tokens))
    ticks = peer.engine.run(0).ticks[-1] - begun
    print(f"\n{name}: operations of {ticks} ticks, measured under JAX's profiler, which slows them; a tick")
    print("| operation | how often | us, all ranks together |\n| --- | --- | --- |")
    for operation, (count, seconds) in list(found.items())[: options.profile]:
        print(f"| {operation} | {count / ticks:.1f} | {1e6 * seconds / ticks:.0f} |")


if __name__ == "__main__":
    run_command(main)
