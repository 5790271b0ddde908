"""CIDEr of a real captioner on COCO's Karpathy test split: this package and pycocoevalcap with Java, in one run.

    ALIGNVLM_TEST_DATA=... python benchmarks/cider.py [--output out/bench/cider.json]

Needs pycocoevalcap, Java, and `metric_checks/coco_karpathy_test.jsonl` in the folder of test data. Times are the best of several
rounds, in which the two take turns.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

import evaluate
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer


METRIC = Path(__file__).resolve().parents[1] / "alignvlm/evaluation/metrics/cider"
sys.path.insert(0, str(METRIC))
from cider_d import cider_d  # noqa: E402
from ptb_tokenizer import tokenize  # noqa: E402


def official(predictions: list[str], references: list[list[str]]) -> tuple[float, float, float]:
    """Seconds for tokens and for scores, and the score."""
    started = time.perf_counter()
    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({i: [{"caption": text} for text in group] for i, group in enumerate(references)})
    res = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
    tokenized = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        score, _ = Cider().compute_score(gts, res)
    return tokenized - started, time.perf_counter() - tokenized, float(score)


def ours(predictions: list[str], references: list[list[str]]) -> tuple[float, float, float]:
    started = time.perf_counter()
    tokens = iter(tokenize([text for group in references for text in group]))
    groups = [[next(tokens) for _ in group] for group in references]
    hypotheses = tokenize(predictions)
    tokenized = time.perf_counter()
    score = cider_d(hypotheses, groups).mean()
    return tokenized - started, time.perf_counter() - tokenized, float(score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="out/bench/cider.json")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    data = os.environ.get("ALIGNVLM_TEST_DATA")
    if not data:
        raise SystemExit("Set ALIGNVLM_TEST_DATA to the folder of test data; this benchmark needs real captions.")
    rows = [json.loads(line) for line in (Path(data) / "metric_checks/coco_karpathy_test.jsonl").open()]
    rows = [row for row in rows if "magic" in row["predictions"]]
    predictions = [row["predictions"]["magic"]["text"] for row in rows]
    references = [row["captions"] for row in rows]

    times: dict[str, list[tuple]] = {"pycocoevalcap, Java": [], "this package": []}
    for _ in range(arguments.rounds):
        times["pycocoevalcap, Java"].append(official(predictions, references))
        times["this package"].append(ours(predictions, references))
    metric = evaluate.load(str(METRIC))
    started = time.perf_counter()
    metric.compute(predictions=predictions, references=references)
    through_evaluate = time.perf_counter() - started

    report = {"images": len(rows), "captions": sum(map(len, references)) + len(rows)}
    print(
        f"{report['images']} images, {report['captions']} captions\n{'':<22}{'tokens s':>10}{'scores s':>10}{'total s':>10}{'CIDEr':>22}"
    )
    for name, rounds in times.items():
        tokens, scores = min(r[0] for r in rounds), min(r[1] for r in rounds)
        report[name] = {"tokens_s": tokens, "scores_s": scores, "cider": rounds[0][2]}
        print(f"{name:<22}{tokens:>10.2f}{scores:>10.2f}{tokens + scores:>10.2f}{rounds[0][2]:>22.16f}")
    totals = {name: report[name]["tokens_s"] + report[name]["scores_s"] for name in times}
    report["ratio"] = totals["pycocoevalcap, Java"] / totals["this package"]
    report["through_evaluate_s"] = through_evaluate
    print(f"{report['ratio']:.1f} times as fast; through evaluate's compute(): {through_evaluate:.2f} s")
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
