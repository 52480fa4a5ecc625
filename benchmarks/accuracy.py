"""Measures recipes on a model: free-running accuracy against 16 bits on the same held-out problems.

    python benchmarks/accuracy.py --recipes rtn-w4a4 gptq-w4a4 dllmquant-w4a4 --limit 1000 --output runs/accuracy

Every cell is saved as it is measured (per-item results, JSON), so an interrupted run goes on where it stopped. The
table goes to standard output and to OUTPUT/table.md.
"""

import argparse
import logging
from pathlib import Path

from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

import dllmquant
from dllmquant import DLLMQuantizer
from dllmquant.assets import bundled_names
from dllmquant.checkpoint import weight_bytes
from dllmquant.lab.evaluate import Evaluation, evaluate
from dllmquant.lab.statistics import PairedDifference, paired_difference

logger = logging.getLogger("accuracy")


def measure(path: str, recipe: str | None, args: argparse.Namespace) -> tuple[Evaluation, float]:
    """Returns a recipe's evaluation (None: 16 bits) and its bytes per quantized weight, from disk if done before."""
    file = args.output / f"{recipe or '16-bit'}.seed{args.seed}.json"
    if not file.exists():
        logger.info("measuring %s", recipe or "16-bit")
        model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        if recipe is not None:
            DLLMQuantizer(recipe).quantize(model, tokenizer=tokenizer, seed=args.seed, progress=False)
        evaluate(model, tokenizer, args.tasks, limit=args.limit, mc_num=args.mc_num, progress=False).save(file)
        size = weight_bytes(model).bytes_per_quantized_weight if recipe is not None else 2.0
        file.with_suffix(".bytes").write_text(f"{size}\n")
    return Evaluation.load(file), float(file.with_suffix(".bytes").read_text())


def pooled(base: Evaluation, other: Evaluation, tasks: list[str]) -> PairedDifference:
    """Compares two evaluations on the generated tasks together."""
    right = [{(item.task, item.key): item.correct for item in e.items if item.task in tasks} for e in (base, other)]
    return paired_difference(list(right[0].values()), [right[1][key] for key in right[0]])


def main() -> None:
    """Measures every recipe and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada-tiny", help="bundled name, directory or hub id")
    parser.add_argument("--recipes", nargs="+", default=["rtn-w4a4", "gptq-w4a4", "dllmquant-w4a4"])
    parser.add_argument("--tasks", nargs="+", default=["math", "code", "qa"])
    parser.add_argument("--limit", type=int, default=1000, help="held-out problems per task")
    parser.add_argument("--mc-num", type=int, default=16, help="Monte Carlo samples per choice (qa)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    transformers_logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    path = dllmquant.bundled(args.model) if args.model in bundled_names() else args.model

    base, _ = measure(path, None, args)
    generated = [task for task in args.tasks if task != "qa"]
    lines = [
        f"| recipe | bytes/weight | {' | '.join(args.tasks)} | {'+'.join(generated)} against 16 bits |",
        f"|---|---|{'---|' * len(args.tasks)}---|",
    ]
    for recipe in (None, *args.recipes):
        result, size = measure(path, recipe, args)
        cells = [f"{result.scores[task].accuracy:.1%}" for task in args.tasks]
        difference = ""
        if recipe is not None:
            d = pooled(base, result, generated)
            difference = f"{100 * d.difference:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        lines.append(f"| {recipe or '16-bit'} | {size:.3f} | {' | '.join(cells)} | {difference} |")
    table = "\n".join(lines)
    (args.output / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
