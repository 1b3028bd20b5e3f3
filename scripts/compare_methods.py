"""All methods at several numbers of stages on several texts: simulated ticks, modeled time, all ranks counted.

Texts are held-out source (a number of prompts) and files of questions, as benchmark.py takes them. Of methods with a
choice that the text decides (depth of stpp, draft steps of best-first, draft length of eesd, passes of hierarchies) the
best of a few by modeled time is shown. Ticks are simulated (equal to the engine's, tests/analysis); modeled time
charges every rank the bytes of weights it reads in a tick. The baseline of ratios is pp on as many stages.

python scripts/compare_methods.py --prompts 4 question.jsonl --out methods.jsonl  # Spec-Bench's questions
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from tqdm import tqdm

import pipedec_jax
from pipedec_jax.analysis.answer_file import LineFile
from pipedec_jax.command_line.held_out_options import check_stages
from pipedec_jax.command_line.numbers import from_0, from_1
from pipedec_jax.command_line.output import Parser, check_place, fail, run_command

KEPT = ("ranks", "unit", "ticks", "costs", "hits")
"""What is kept of a count."""


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--prompts", nargs="+", default=["4"], help="number of held-out prompts, and files of questions (4)")
    add("--per-category", metavar="Q", type=from_1, default=2, help="questions of each category of a file (2)")
    add("--stages", metavar="N", type=from_1, nargs="+", default=[2, 4, 8, 16], help="of the target (2 4 8 16)")
    add("--width", metavar="W", type=from_1, default=16, help="most guesses in a batch (16)")
    add("--children", metavar="K", type=from_1, default=16, help="most guesses after each token (16)")
    add("--only", metavar="METHOD", nargs="+", default=[], help="of these methods (all)")
    add("--max-new-tokens", metavar="M", type=from_1, default=128, help="most tokens of an answer (128)")
    add("--seed", type=from_0, default=0, help="that draws the held-out prompts (0)")
    add("--out", metavar="FILE", type=Path, help="every count as a JSON line; the same command goes on with it")
    return parser.parse_args()


def main() -> None:
    """Simulate all methods and print a table for each text."""
    options = parse()
    from pipedec_jax.analysis import every_method as every

    pipedec_jax.use_cpu_devices(every.ranks_needed(options.stages, 3))
    try:
        run(options, every)
    except (ValueError, OSError) as error:
        fail(error)


def run(options: argparse.Namespace, every: Any) -> None:
    models = {name: pipedec_jax.load_demo(name) for name in ("draft", "middle", "target")}
    layers = models["target"].config.layers
    check_stages(options.stages, models["target"].config)
    shape = (options.width, options.children)
    wanted = [
        setting
        for stages in options.stages
        for setting in (*every.settings(stages, layers, (2, 4, 8), *shape), *every.hierarchies(stages, [*models]))
        if not options.only or setting.method in options.only
    ]
    if not wanted:
        raise ValueError(f"--only {' '.join(options.only)}: there is no such method")
    if options.out:
        check_place("--out", options.out)
    known = know_texts(options, every, models["target"])
    head = {"prompts": [[one.corpus, list(one.prompt), list(one.answer)] for one in known], "shape": list(shape)}
    kept = open_kept(options.out, head) if options.out else None
    done = {row["name"]: row for row in kept.rows[1:]} if kept is not None else {}
    words = {name: every.say(model, known) for name, model in models.items() if name != "target"}
    make = every.same_family(models)
    counts = []
    for setting in tqdm(wanted, unit="setting", disable=None):
        row = done.get(setting.name)
        if row is not None:
            hits = None if row["hits"] is None else tuple(row["hits"])
            found = every.Count(setting, row["ranks"], row["unit"], tuple(row["ticks"]), tuple(row["costs"]), hits)
        elif setting.models:
            found = every.count_hierarchy(models, setting, known, words)
        else:
            found = every.count(make, setting, known)
        counts.append(found)
        if kept is not None and row is None:
            values = dataclasses.asdict(found)
            kept.append({"name": setting.name, **{key: values[key] for key in KEPT}})
    for corpus in dict.fromkeys(one.corpus for one in known):
        print(f"\n### {corpus}\n")
        print_rows(every.rows(counts, known, lambda one, corpus=corpus: one.corpus == corpus))
        categories = list(dict.fromkeys(one.category for one in known if one.corpus == corpus))
        if len(categories) > 1:
            print_categories(every, counts, known, categories)


def know_texts(options: argparse.Namespace, every: Any, target: pipedec_jax.Model) -> list[Any]:
    """Plain decoding's answers to all prompts; prints what they are, and which are left out."""
    from pipedec_jax.analysis.held_out import held_out_questions
    from pipedec_jax.analysis.questions import of_each_category, read_questions

    files = {  # before anything is decoded
        text: of_each_category(read_questions(Path(text)), options.per_category)
        for text in options.prompts
        if not text.isdigit()
    }
    plain = pipedec_jax.Decoder(target, method="pp", stages=1)
    known: list[Any] = []
    for text in options.prompts:
        if text.isdigit():
            corpus, questions = "held-out source", held_out_questions(int(text), options.seed)
        else:
            corpus, questions = Path(text).name, files[text]
        found, left_out = every.know(plain, questions, corpus, options.max_new_tokens)
        known += found
        tokens = sum(len(one.answer) for one in found)
        print(f"{corpus}: {len(questions)} prompts, {len(found)} answers, {tokens} tokens; ", end="")
        print(f"{len(left_out)} cut or left out")
        for name, reason in left_out.items():
            print(f"  {name}: {reason}")
    return known


def open_kept(path: Path, head: dict[str, Any]) -> LineFile:
    """The file of counts, whose first line says of which texts and widths they are.

    Raises:
        ValueError: when they are of others.
    """
    kept = LineFile(path)
    if not kept.rows:
        kept.append(head)
    elif kept.rows[0] != head:
        raise ValueError(f"{path} holds counts of other texts or widths: choose another --out")
    return kept


def print_rows(rows: list[Any]) -> None:
    print(
        "| stages | method | drafts with | best of those tried | target ranks | draft ranks | ticks per token", end=""
    )
    print(" (simulated) | hit rate (simulated) | ticks: pp / this (simulated) | time: pp / this (modeled) |")
    print("|" + " --- |" * 10)
    for row in rows:
        setting = row.count.setting
        hit = "-" if row.hit_rate is None else f"{row.hit_rate:.3f}"
        faster = setting.stages / row.ticks_per_token
        print(f"| {setting.stages} | {setting.method} | {setting.note or '-'} | {setting.tried or '-'} | ", end="")
        print(f"{setting.stages} | {row.count.ranks} | {row.ticks_per_token:.2f} | {hit} | {faster:.2f} | ", end="")
        print(f"{row.modeled_speedup_vs_pp:.2f} |")


def print_categories(every: Any, counts: list[Any], known: list[Any], categories: list[str]) -> None:
    """Modeled time of pp over that of each method, by category, at the most stages but one (8 of 2, 4, 8, 16)."""
    stages = sorted({one.setting.stages for one in counts})
    at = stages[max(0, len(stages) - 2)]
    shown = [one for one in counts if one.setting.stages == at and one.setting.method != "pp"]
    tables = {
        category: every.rows(shown, known, lambda one, category=category: one.category == category)
        for category in categories
    }
    names = [
        f"{row.count.setting.method}, {row.count.setting.note}" if row.count.setting.note else row.count.setting.method
        for row in tables[categories[0]]
    ]
    print(f"\nBy category, {at} stages: time of pp over each method's (modeled)\n")
    print(f"| category | answers | {' | '.join(names)} |")
    print("|" + " --- |" * (2 + len(names)))
    for category, rows in tables.items():
        cells = [f"{row.modeled_speedup_vs_pp:.2f}" for row in rows]
        print(f"| {category} | {rows[0].answers} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_command(main)
