"""Writes the tables of docs/results.md and other pages, and draws their plots, from docs/results.json.

    python docs/write_results_page.py

The pages' sentences are written by hand; between the comments `<!-- begin: NAME -->` and `<!-- end: NAME -->` stands what this writes.
"""

import json
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python docs/write_results_page.py`

from matplotlib import pyplot

from benchmarks import (
    alignment_options,
    all_tasks,
    aspect_ratios,
    findings,
    native_shapes,
    pathvqa_longer,
    projector_start,
    questions_alone,
    questions_and_images,
    real_photos,
    tiles,
    tokens,
    tokens_photos,
)


DOCS = Path(__file__).parent
SHOWN = {
    "scenes": "accuracy",
    "photos": "CIDEr",
    "small_photos": "CIDEr",
}  # the metric that a plot shows, where a finding has it
BLUE, GREY, ORANGE = "#2f6fa7", "#999999", "#c8641b"


def stages_table(found: dict) -> str:
    """What the stages on real photos cost, and what was measured before and after them."""
    lines = [
        "| stage | records | steps | minutes | TFLOP | loss of held-out records | WikiText-2 perplexity | MIR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (number, stage), tflop in zip(found["stages"].items(), found["plan"]["tflop"]):
        before_after = [
            " → ".join(f"{stage[f'{name}_{when}']:.2f}" for when in ("before", "after"))
            for name in ("eval_loss", "text_perplexity", "mir")
        ]
        cells = [f"{stage['records']:,}", f"{stage['steps']:,}", f"{stage['seconds'] / 60:.0f}", f"{tflop:,.0f}"]
        lines.append(f"| {number} | {' | '.join(cells + before_after)} |")
    return "\n".join(lines)


def examples(found: dict) -> str:
    """The first answers to each task by the last stage that answered it, beside a person's."""
    blocks = []
    for task in ("captions", "daquar", "pathvqa", "vqa_rad"):
        numbers = [number for number, results in found["results"].items() if task in results["tasks"]]
        if not numbers:
            continue
        lines = [f"**{task}**, after stage {numbers[-1]}:", "", "| asked | the model | a person |", "|---|---|---|"]
        for item in found["results"][numbers[-1]]["tasks"][task]["examples"]:
            cells = (item["prompt"], item["prediction"], item["references"][0])
            lines.append(f"| {' | '.join(cell.replace('|', '/').strip() for cell in cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def ten_questions(found: dict) -> str:
    """The answers to ten questions about no image, before and after the stages."""
    results = found["results"]
    lines = ["| asked | " + " | ".join(f"stage {number}" for number in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for index, question in enumerate(real_photos.QUESTIONS):
        answers = [" ".join(each["questions"][index].replace("|", "/").split()) for each in results.values()]
        lines.append(f"| {question} | {' | '.join(answers)} |")
    return "\n".join(lines)


def draw_finding(name: str, worlds: dict[str, dict]) -> Path:
    """Draws a finding: a panel for each world, with a point for each seed, joined across arms; or the curve over steps."""
    figure, row = pyplot.subplots(1, len(worlds), figsize=(4.6 * len(worlds), 3), layout="constrained", squeeze=False)
    for axes, (world, found) in zip(row[0], worlds.items()):
        runs = found["runs"]
        if any(run["curve"] for arm in runs.values() for run in arm.values()):
            draw_curves(axes, runs)
        else:
            draw_points(axes, runs, found["summary"], SHOWN[world])
        axes.set_title(world)
        axes.spines[["top", "right"]].set_visible(False)
    path = DOCS / f"results_{name}.png"
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path


def draw_points(axes, runs: dict, summary: dict, metric: str) -> None:
    arms = list(summary)
    for seed in runs[arms[0]]:
        values = {arm: runs[arm][seed]["values"][metric] for arm in arms if seed in runs[arm]}
        axes.plot(list(values), list(values.values()), "o-", color=GREY, linewidth=0.8, markersize=3)
    axes.plot(arms, [summary[arm][metric]["mean"] for arm in arms], "_", color=BLUE, markersize=26, markeredgewidth=3)
    axes.set_xticks(range(len(arms)), [arm.replace(" ", "\n") for arm in arms])
    axes.set_ylabel(metric)
    axes.margins(x=0.2)


def draw_curves(axes, runs: dict) -> None:
    for colour, (arm, seeds) in zip((ORANGE, BLUE), runs.items()):
        for index, run in enumerate(seeds.values()):
            points = {int(steps): values["accuracy"] for steps, values in run["curve"].items()}
            points[run["steps"][-1]] = run["values"]["accuracy"]
            axes.plot(
                *zip(*sorted(points.items())),
                "o-",
                color=colour,
                linewidth=1,
                markersize=3,
                label=None if index else arm,
            )
    axes.set_xlabel("steps of stage 4")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)


def blocks(results: dict) -> dict[str, str]:
    """What stands between the comments of the page, by name."""
    written = {}
    if found := results.get("real_photos"):
        written["real photos"] = real_photos.table(found["results"])
        written["stages"] = stages_table(found)
        written["examples"] = examples(found)
        written["ten questions"] = ten_questions(found)
    if found := results.get("all_tasks"):
        written["all tasks"] = all_tasks.tables(found)
    for name in findings.QUESTIONS:
        worlds = {world: results[world][name] for world in findings.WORLDS if name in results.get(world, {})}
        if worlds:
            tables = [findings.table(world, name, found["summary"]) for world, found in worlds.items()]
            picture = f"![{findings.QUESTIONS[name]}](results_{name}.png)"
            written[name] = "\n\n".join([picture, *tables])
    return written


def fill(page: str, written: dict[str, str]) -> str:
    """The page with what is written between its comments.

    Raises:
        ValueError: if the page has no place for a block.
    """
    for name, block in written.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if begin not in page or end not in page:
            raise ValueError(f"The page has no place for {name!r}: write {begin} and {end}.")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{block}\n\n{end}{rest.partition(end)[2]}"
    return page


def main() -> None:
    results = json.loads((DOCS / "results.json").read_text())
    page = DOCS / "results.md"
    page.write_text(fill(page.read_text(), blocks(results)))
    for name in findings.QUESTIONS:
        worlds = {world: results[world][name] for world in findings.WORLDS if name in results.get(world, {})}
        if worlds:
            print(draw_finding(name, worlds))
    print(page)
    for world, name in ((tokens.Frontier, "performance.md"), (tiles.Signs, "tiles.md")):
        if found := results.get(world.results):
            page, picture = DOCS / name, DOCS / f"{world.results}.png"
            tokens.draw(found, picture, world.metrics)
            shown = next(iter(world.metrics.values()))
            picture_line = f"![{shown.capitalize()} against image tokens per image]({picture.name})"
            block = f"{picture_line}\n\n{tokens.table(found, world.metrics)}"
            page.write_text(fill(page.read_text(), {world.results: block}))
            print(f"{picture}\n{page}")
    for name, file, table in (
        ("tokens_photos", "performance.md", lambda found: tokens.table(found, tokens_photos.METRICS)),
        ("tokens_small_photos", "performance.md", lambda found: tokens.table(found, tokens_photos.METRICS)),
        ("aspect_ratios", "tiles.md", aspect_ratios.table),
        ("native_shapes", "native_shapes.md", native_shapes.table),
        ("pathvqa_longer", "results.md", pathvqa_longer.table),
        ("questions_alone", "results.md", questions_alone.table),
        ("questions_and_images", "results.md", questions_and_images.table),
        ("questions_and_images_views", "results.md", questions_and_images.table_of_views),
        ("reward", "reward.md", lambda found: findings.summary_table(found["summary"])),
        ("options", "alignment.md", lambda found: alignment_options.table(found["summary"])),
        ("projector_start", "alignment.md", lambda found: projector_start.table(found["runs"])),
    ):
        if found := results.get(name):
            page = DOCS / file
            page.write_text(fill(page.read_text(), {name: table(found)}))
            print(page)


if __name__ == "__main__":
    main()
