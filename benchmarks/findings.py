"""The paper's four findings as controlled comparisons, on drawn scenes and on real photos; and what a model's own captions bring.

    python benchmarks/findings.py --seeds 5                                                      # drawn scenes alone, without a download
    python benchmarks/findings.py --photos FOLDER --language SMOLLM2 --vision MOBILENET
    python benchmarks/findings.py --photos FOLDER --language STORIES260K --vision MOBILENET --small   # all but `captions`, on more photos
    python benchmarks/findings.py --reproduce                                                    # a small part, against docs/results.json

A finding compares arms: the same backbones, data, steps and seeds, but for what the arm is named after. An arm is a few stages, run by
their scripts on a recipe with the arm's changes (`training/recipes/nano` for scenes, `smollm2_mobilenet` for photos, where FOLDER is laid out as
`benchmarks/real_photos.py` says), and the evaluation of the last checkpoint. A seed sets the projector's first weights and the order of the data, for
scenes the backbones and the scenes too. Reported are the values of all seeds, and the paired differences to the first arm: mean and
95% interval by Student's t over the seeds. What is there, in the output folder or in the file of results, is not done again: start the same
command to go on, or with more seeds. A seed's arms belong on one machine, since rounding differs.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/findings.py`

from alignvlm.data import scenes
from alignvlm.evaluation.precision import choose_precision
from alignvlm.quickstart.nano import train_nano_backbones
from alignvlm.stages.backbones import BackboneArguments, assemble
from alignvlm.tools.recaption import parser as recaption_parser
from alignvlm.tools.recaption import recaption
from benchmarks.stage_runs import ROOT, evaluate, machine, prepare_photos, stage_values, train, update_results
from hub_upload.run_record import RUN_RECORD
from modeling_alignvlm.masking_alignvlm import MASK_TYPES, get_mask_type


RESULTS = ROOT / "docs/results.json"
QUESTIONS = {
    "masks": "What do masks change that leave images, or all of the prompt, unmasked?",
    "captions": "Does a model learn faster from captions by a model (BLIP-2) than from a human's?",
    "recaptions": "What does a model learn from its own captions of further photos?",
    "alignment": "Do more records belong in stages 1 and 2, at the expense of stage 3?",
    "downstream": "What do stages 1 to 3 bring for the downstream task of stage 4?",
}
# What the recipes measure before and after a stage, and a comparison measures otherwise.
UNMEASURED = {"eval_sources": None, "text_sources": None, "alignment_records": None}


@dataclass(frozen=True)
class Finding:
    """A comparison: `arms` maps each name to its stages, pairs of a number and changes to the recipe; the first arm is the baseline.

    The stages start from assembled backbones, or from the end of the `shared` stages; `prepare` gets that checkpoint, and makes the data of the
    arms' own stages. With `curve` the checkpoint before the last stage and those that it keeps on its way are
    evaluated too. With `level` the steps are counted until a logged training loss is at most that, over all stages; of a run that never gets
    there, all its steps.
    """

    arms: dict[str, list[tuple[int, dict]]]
    tasks: tuple[str, ...]
    curve: bool = False
    level: float | None = None
    shared: tuple[tuple[int, dict], ...] = ()
    prepare: Callable[[Path], None] | None = None


class Scenes:
    """Drawn scenes and nano backbones: cheap, and possible for everyone."""

    recipe = ROOT / "training/recipes/nano"

    def __init__(self, output: Path, photos: argparse.Namespace | None = None):
        self.output = output

    def assembled(self, seed: int) -> Path:
        """The checkpoint with untrained projector; writes the held-out scenes beside it."""
        folder = self.output / f"seed{seed}"
        if not (folder / "stage0" / RUN_RECORD).is_file():
            vision, language = train_nano_backbones(folder / "backbones", seed, vision_steps=350, language_steps=60)
            scenes.make_scenes(250, "test", seed=seed).to_parquet(folder / "test.parquet")
            assemble(BackboneArguments(str(vision), str(language), str(folder / "stage0"), seed=seed))
        return folder / "stage0"

    def source(self, count: int, seed: int, *annotations: str) -> dict:
        return {"name": "scenes", "annotations": list(annotations), "count": count, "seed": seed}

    def stages(self, first: int, second: int, third: int, **changes) -> list[tuple[int, dict]]:
        """Stages 1 to 3 with these numbers of scenes; of stage 3's, a fifth with captions."""
        held_out = [{"name": "scenes", "annotations": ["questions"], "count": 250, "split": "test", "seed": 1}]
        captions = ("short_caption", "detailed_caption")
        joint = [
            self.source(third * 4 // 5, 3, "questions"),
            self.source(third // 5, 4, *captions),
            {"name": "scene_texts", "count": third // 40, "seed": 3},
        ]
        return [
            (1, {**UNMEASURED, "sources": [self.source(first, 1, "short_caption")], **changes}),
            (2, {**UNMEASURED, "sources": [self.source(second, 2, *captions)], **changes}),
            (3, {**UNMEASURED, "sources": joint, "eval_sources": held_out, **changes}),
        ]

    def findings(self, seed: int) -> dict[str, Finding]:
        # Stage 1's rate: without it a projector that nobody has trained would be held back.
        questions = {
            **UNMEASURED,
            "sources": [self.source(1024, 5, "questions")],
            "projector_learning_rate": 3.0e-3,
        }
        questions |= {"save_strategy": "steps", "save_steps": 8, "save_total_limit": None}
        return {
            "masks": Finding(
                {mask: self.stages(1536, 1536, 4000, attention_mask_type=mask) for mask in MASK_TYPES}, ("scenes",)
            ),
            "alignment": Finding(
                {
                    "short": self.stages(256, 256, 4096, per_device_train_batch_size=32),
                    "long": self.stages(1280, 1280, 2048, per_device_train_batch_size=32),
                },
                ("scenes",),
            ),
            "downstream": Finding(
                {
                    "from stage 0": [(4, questions)],
                    "from stage 3": [*self.stages(1536, 1536, 4000), (4, questions)],
                },
                ("scenes",),
                curve=True,
            ),
        }

    def evaluate(self, task: str, seed: int, checkpoint: Path, folder: Path) -> dict[str, float]:
        data = self.output / f"seed{seed}"
        result = evaluate(
            checkpoint, ["--task", "scenes", "--data", str(data), "--batch_size", "250", "--bootstrap_samples", "10"], folder
        )  # fmt: skip
        metrics = result["metrics"]
        return {"CIDEr": metrics["cider"]["cider"], "accuracy": metrics["pathvqa_accuracy"]["accuracy"]}


class Photos:
    """Photos of Flickr8k and PathVQA, MobileNetV2 and SmolLM2-135M.

    Of the validation photos that have captions by BLIP-2, the first 300 are held out for all findings; the others train the finding about captions.
    """

    recipe = ROOT / "training/recipes/smollm2_mobilenet"
    HELD_OUT = 300
    sizes = (320, 0, 480)  # photos of stages 1, 2 and 3, where work is not what is compared
    more = 400  # further photos, which a model captions
    questions = 480  # images of PathVQA that stage 4 is asked about
    save_steps = 15  # between its checkpoints that are evaluated
    caption_tokens = 24  # of an answer at most

    def __init__(self, output: Path, photos: argparse.Namespace):
        self.output, self.backbones = output, (photos.vision, photos.language)
        prepare_photos(Path(photos.photos), output / "data")
        folder = output / "data/flickr8k"
        rows = {row["image"]: row for row in map(json.loads, (folder / "captions.jsonl").read_text().splitlines())}
        by_model = [json.loads(line) for line in (folder / "ai_captions.jsonl").read_text().splitlines()]
        train_rows = [row for row in rows.values() if row["split"] == "train"]
        files = {
            "test": [rows[row["image"]] for row in by_model[: self.HELD_OUT]],
            "train": train_rows,
            "BLIP-2": [{**row, "captions": [row["blip2_zero_shot"]]} for row in by_model[self.HELD_OUT :]],
            "BLIP-2 tuned": [{**row, "captions": [row["blip2_lora_flickr8k"]]} for row in by_model[self.HELD_OUT :]],
            "human": [{**rows[row["image"]], "captions": rows[row["image"]]["captions"][:1]} for row in by_model[self.HELD_OUT :]],
        }  # fmt: skip
        for name, chosen in files.items():
            lines = [json.dumps({"image": row["image"], "captions": row["captions"]}) for row in chosen]
            (output / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def assembled(self, seed: int) -> Path:
        folder = self.output / f"seed{seed}/stage0"
        if not (folder / RUN_RECORD).is_file():
            assemble(BackboneArguments(*self.backbones, str(folder), seed=seed))
        return folder

    def captions(self, file: str, **limits: int) -> dict:
        return {"data": f"{file}.jsonl", "image_dir": "flickr8k", "prompt": "Write a short caption.", **limits}

    def stage(self, number: int, *sources: dict, measured: bool = False, **changes) -> tuple[int, dict]:
        held_out = [self.captions("test")] if measured else []
        data_dir = str(self.output / "data")
        return number, {
            **UNMEASURED,
            "save_strategy": "no",
            "data_dir": data_dir,
            "sources": list(sources),
            "eval_sources": held_out or None,
            **self.fields(number),
            **changes,
        }

    def fields(self, number: int) -> dict:
        """What a stage of this number has unlike the recipe."""
        return {}

    def photos(self, first: int, last: int) -> dict:
        """Training photos of these positions, with their five captions."""
        name = f"train-{first}-{last}"
        lines = (self.output / "data/train.jsonl").read_text().splitlines(keepends=True)[first:last]
        (self.output / "data" / f"{name}.jsonl").write_text("".join(lines))
        return self.captions(name)

    def divided(self, first: int, second: int, third: int, **changes) -> list[tuple[int, dict]]:
        """Stages 1 to 3, or 1 and 3, on these numbers of photos, each photo once."""
        ends = [first, first + second, first + second + third]
        stages = [self.stage(1, self.photos(0, ends[0]), **changes)]
        stages += [self.stage(2, self.photos(ends[0], ends[1]), **changes)] if second else []
        return [*stages, self.stage(3, self.photos(ends[1], ends[2]), measured=True, **changes)]

    def recaptions(self, seed: int) -> Finding:
        """After the stages of other findings, stage 3 again on photos that no stage has seen, with captions of that model, or one human's."""
        first = sum(self.sizes)
        photos = self.photos(first, first + self.more)["data"]
        rows = [json.loads(line) for line in (self.output / "data" / photos).read_text().splitlines()]
        human = f"one-{photos}"
        lines = [json.dumps({"image": row["image"], "captions": row["captions"][:1]}) + "\n" for row in rows]
        (self.output / "data" / human).write_text("".join(lines))
        own, agreed = f"own_captions-{seed}.jsonl", f"agreed_captions-{seed}.jsonl"

        def caption(checkpoint: Path) -> None:
            """Four samples of each photo, of which the one most like the others is kept; then the half whose samples agree more."""
            folder = self.output / "data"
            options = [str(checkpoint), str(folder / photos)]
            sampling = ["--samples", "4", "--temperature", "0.7", "--seed", str(seed), "--batch_size", "50"]
            sampling += ["--prompt", "Write a short caption.", "--max_new_tokens", str(self.caption_tokens)]
            sampling += ["--image_dir", str(folder / "flickr8k"), "--use_cpu", "--dtype", choose_precision().name]
            summary = recaption(recaption_parser().parse_args([*options, str(folder / own), *sampling]))
            shutil.copy(folder / own, folder / f"all-{own}")
            limit = ["--min_agreement", str(summary["quantiles"]["agreement"][1])]
            # Into the same file, whose samples are kept: nothing is sampled again.
            recaption(recaption_parser().parse_args([*options, str(folder / own), *sampling, *limit]))
            shutil.copy(folder / own, folder / agreed)

        def arm(source: dict) -> list[tuple[int, dict]]:
            return [self.stage(3, source, measured=True)]

        return Finding(
            {
                "no more photos": [],
                "own captions": arm({"data": f"all-{own}", "image_dir": "flickr8k"}),
                "half that agrees": arm({"data": agreed, "image_dir": "flickr8k"}),
                "a human's captions": arm(self.captions(human.removesuffix(".jsonl"))),
            },
            ("captions",),
            shared=tuple(self.divided(*self.sizes)),
            prepare=caption,
        )

    def findings(self, seed: int) -> dict[str, Finding]:
        questions = {"data": "pathvqa/train.jsonl", "split": "train", "image_dir": "pathvqa", "limit": self.questions}
        # Stage 1's rate: without it a projector that nobody has trained would be held back.
        downstream = self.stage(
            4,
            questions,
            save_strategy="steps",
            save_steps=self.save_steps,
            save_total_limit=None,
            projector_learning_rate=2.0e-3,
        )
        return {
            "masks": Finding(
                {mask: self.divided(*self.sizes, attention_mask_type=mask) for mask in MASK_TYPES}, ("captions",)
            ),
            "captions": Finding(
                {
                    name: [
                        self.stage(1, self.captions(name), logging_steps=5),
                        self.stage(3, self.captions(name), measured=True, logging_steps=5),
                    ]
                    for name in ("human", "BLIP-2", "BLIP-2 tuned")
                },
                ("captions",),
                level=3.0,
            ),
            "recaptions": self.recaptions(seed),
            "alignment": Finding(
                {"short": self.divided(80, 80, 800), "long": self.divided(320, 320, 320)}, ("captions",)
            ),
            "downstream": Finding(
                {"from stage 0": [downstream], "from stage 3": [*self.divided(*self.sizes), downstream]},
                ("pathvqa",),
                curve=True,
            ),
        }

    def options_of(self, task: str) -> list[str]:
        """The options of the evaluation."""
        data, options = self.output / "data", ["--task", "local", "--batch_size", "32"]
        if task == "captions":
            options += ["--data", str(data / "test.jsonl"), "--image_dir", str(data / "flickr8k")]
            return [*options, "--max_new_tokens", str(self.caption_tokens), "--prompt", "Write a short caption."]
        options += ["--data", str(data / "pathvqa/dev.jsonl"), "--split", "dev", "--image_dir", str(data / "pathvqa")]
        return [*options, "--max_new_tokens", "16", "--limit", "100"]

    def evaluate(self, task: str, seed: int, checkpoint: Path, folder: Path) -> dict[str, float]:
        metrics = evaluate(checkpoint, [*self.options_of(task), "--bootstrap_samples", "10"], folder)["metrics"]
        if task == "captions":
            return {"CIDEr": metrics["cider"]["cider"]}
        names = {"accuracy": "accuracy", "yes/no": "yes_no_accuracy", "open, F1": "free_form_f1"}
        return {name: metrics["pathvqa_accuracy"][key] for name, key in names.items()}


class SmallPhotos(Photos):
    """The same photos before a language model of some hundred thousand parameters, whose tokens are pieces of words (the vocabulary of
    stories260K has 512): it costs little beside the frozen encoder, whose features are kept for all arms and seeds, so that there can be
    more photos and seeds. They are not kept for mask types that give an image a row for each caption (in batches of so many images an encoder
    may give other last bits), nor where stage 2 trains the encoder."""

    sizes = (500, 0, 2500)
    more = 1500
    questions, save_steps = 800, 25
    caption_tokens = 48

    def fields(self, number: int) -> dict:
        if number == 2:
            return {}
        features = {"cache_features": True, "features_dir": str(self.output / "features")}
        return {**features, "vision_learning_rate": None, **({"language_learning_rate": 2.0e-3} if number > 2 else {})}

    def findings(self, seed: int) -> dict[str, Finding]:
        found = super().findings(seed)
        anew = {"cache_features": False, "features_dir": None}
        masks = {
            mask: self.divided(
                *self.sizes, attention_mask_type=mask, **({} if get_mask_type(mask).shares_trunk else anew)
            )
            for mask in MASK_TYPES
        }
        budget = {"short": (250, 250, 2500), "long": (1000, 1000, 1000)}
        alignment = {name: self.divided(*sizes, **anew) for name, sizes in budget.items()}
        return {
            "masks": replace(found["masks"], arms=masks),
            "recaptions": found["recaptions"],
            "alignment": replace(found["alignment"], arms=alignment),
            "downstream": found["downstream"],
        }


WORLDS: dict[str, Callable] = {"scenes": Scenes, "photos": Photos, "small_photos": SmallPhotos}


def run_arm(world: Scenes | Photos, name: str, finding: Finding, arm: str, seed: int) -> dict:
    """Runs an arm's stages and evaluations; returns its values, losses and cost."""
    folder = world.output / f"seed{seed}" / name / arm.replace(" ", "_")
    start = before = world.assembled(seed)
    entries: list[dict] = []
    for own, stages in (("shared", finding.shared), (folder.name, finding.arms[arm])):
        if own != "shared" and stages and finding.prepare is not None:
            finding.prepare(start)
        for number, changes in stages:
            before, start = start, folder.with_name(own) / f"stage{number}"
            entries.append(train(stage_values(world.recipe, number, before, start, seed=seed, **changes)))
    values = {}
    if entries[-1].get("eval_loss_after") is not None:
        values["loss"] = entries[-1]["eval_loss_after"]
    if finding.level is not None:
        values[f"steps to a training loss of {finding.level:g}"] = steps_to(entries, finding.level)
    for task in finding.tasks:
        values |= world.evaluate(task, seed, start, folder / "results" / task)
    return {
        "values": values,
        "curve": curve(world, finding, seed, before, start, folder) if finding.curve else {},
        "logged_losses": [loss for entry in entries for loss in entry["logged_losses"]],
        "steps": [entry["steps"] for entry in entries],
        "seconds": [entry["seconds"] for entry in entries],
    }


def steps_to(entries: list[dict], level: float) -> int:
    """The steps of stages, entries of run records, until a logged training loss is at most `level`, or all of them."""
    done = 0
    for entry in entries:
        for line in entry["log"]:
            if line["loss"] <= level:
                return done + line["step"]
        done += entry["steps"]
    return done


def curve(
    world: Scenes | Photos, finding: Finding, seed: int, before: Path, last: Path, folder: Path
) -> dict[str, dict]:
    """The values by steps of the last stage: before it, 0, and of the checkpoints that it kept on its way."""
    checkpoints = {0: before, **{int(path.name.split("-")[1]): path for path in last.glob("checkpoint-*")}}
    found: dict[str, dict] = {}
    for steps, checkpoint in sorted(checkpoints.items()):
        found[str(steps)] = {}
        for task in finding.tasks:
            found[str(steps)] |= world.evaluate(task, seed, checkpoint, folder / "results" / f"{task}-{steps}")
    return found


def band(values: list[float]) -> list[float] | None:
    """Where the value of one more seed lies with a chance of 99%, were values distributed normally; None of a single value."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.995, len(values) - 1)) * stdev(values) * (1 + 1 / len(values)) ** 0.5
    return [mean(values) - half, mean(values) + half]


def summarise(arms: dict[str, dict[str, dict]]) -> dict:
    """The values of all seeds, and the paired differences to the first arm over the seeds that both have.

    Args:
        arms: by arm and seed, what `run_arm` returned.
    """
    baseline, *_ = arms
    summary = {}
    for arm, runs in arms.items():
        metrics = {}
        for metric in next(iter(runs.values()))["values"]:
            values = {seed: run["values"][metric] for seed, run in runs.items()}
            values_of_seeds = list(values.values())
            metrics[metric] = {"values": values_of_seeds, "mean": mean(values_of_seeds), "band": band(values_of_seeds)}
            if arm != baseline:
                pairs = [value - arms[baseline][seed]["values"][metric] for seed, value in values.items()]
                metrics[metric] |= {"difference": mean(pairs), "interval": t_interval(pairs)}
        summary[arm] = metrics
    return summary


def t_interval(values: list[float]) -> list[float] | None:
    """The 95% interval of the mean by Student's t (Gosset, 1908); None of a single value."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return [mean(values) - half, mean(values) + half]


def table(world: str, name: str, summary: dict) -> str:
    """A finding's summary as Markdown."""
    return f"### {world}: {QUESTIONS[name]}\n\n{summary_table(summary)}"


def summary_table(summary: dict) -> str:
    """What `summarise` returns as Markdown."""
    lines = ["| arm | metric | mean | seeds | difference | 95% interval |", "|---|---|---|---|---|---|"]
    for arm, metrics in summary.items():
        for metric, found in metrics.items():
            seeds = ", ".join(f"{value:.3f}" for value in found["values"])
            difference = f"{found['difference']:+.3f}" if "difference" in found else ""
            low_high = f"{found['interval'][0]:+.3f} to {found['interval'][1]:+.3f}" if found.get("interval") else ""
            lines.append(f"| {arm} | {metric} | {found['mean']:.3f} | {seeds} | {difference} | {low_high} |")
    return "\n".join(lines)


def run(world_name: str, world: Scenes | Photos, only: list[str], seeds: int, results: Path) -> None:
    """Runs a world's findings seed by seed, but for what `results` holds, and writes what is known after each arm."""
    found = json.loads(results.read_text()).get(world_name, {}) if results.is_file() else {}
    wanted = [name for name in world.findings(0) if not only or name in only]
    for seed in range(seeds):
        for name in wanted:
            finding = world.findings(seed)[name]
            arms = found.get(name, {}).get("runs", {})
            for arm in finding.arms:
                if str(seed) in arms.setdefault(arm, {}):
                    continue
                arms[arm][str(seed)] = {**run_arm(world, name, finding, arm, seed), "machine": machine()}
                known = {arm: runs for arm, runs in arms.items() if runs}
                found[name] = {"machine": machine(), "summary": summarise(known), "runs": arms}
                update_results(results, world_name, found)
    for name in wanted:
        print(f"\n{table(world_name, name, found[name]['summary'])}")


def reproduce(output: Path) -> None:
    """Runs a finding on scenes with one seed; raises a `SystemExit` if a value is not in the band of docs/results.json."""
    recorded = json.loads(RESULTS.read_text()).get("scenes", {}).get("downstream")
    if recorded is None or len(recorded["runs"]["from stage 3"]) < 2:
        raise SystemExit(f"error: {RESULTS.relative_to(ROOT)} records no seeds to compare with yet.")
    world, outside = Scenes(output), []
    print(f"{'arm':<14} {'stage 4, steps':>14} {'accuracy':>9} {'of other seeds':>16}")
    for arm in recorded["summary"]:
        run = run_arm(world, "downstream", world.findings(0)["downstream"], arm, seed=0)
        points = {
            **{steps: values["accuracy"] for steps, values in run["curve"].items()},
            "end": run["values"]["accuracy"],
        }
        for steps, value in points.items():
            others = [
                (each["curve"][steps] if steps != "end" else each["values"])["accuracy"]
                for each in recorded["runs"][arm].values()
            ]
            low, high = band(others)
            print(f"{arm:<14} {steps:>14} {value:>9.3f} {max(low, 0):>7.3f} to {min(high, 1):.3f}", flush=True)
            if not low <= value <= high:
                outside.append(f"{arm}, {steps} steps: {value:.3f}")
    if outside:
        raise SystemExit(f"Outside the band of {RESULTS.relative_to(ROOT)}: {'; '.join(outside)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", help="A folder of photos and questions: see benchmarks/real_photos.py.")
    parser.add_argument("--language", help="SmolLM2-135M-Instruct: a folder or Hub repository.")
    parser.add_argument("--vision", help="MobileNetV2: a folder or Hub repository.")
    parser.add_argument("--small", action="store_true", help="The language model has some hundred thousand parameters: compare all but captions by BLIP-2, on more photos.")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=[], help="These findings alone.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("out/findings"))
    parser.add_argument("--results", type=Path, help="JSON file of the results. Default: in the output folder.")
    parser.add_argument(
        "--reproduce", action="store_true", help="Run a small part and compare it with docs/results.json."
    )
    arguments = parser.parse_args()
    if arguments.photos and not (arguments.language and arguments.vision):
        parser.error("--photos needs --language and --vision.")
    if arguments.small and not arguments.photos:
        parser.error("--small is an option of --photos.")
    output, started = arguments.output.resolve(), time.perf_counter()
    if arguments.reproduce:
        reproduce(output / "reproduce")
    else:
        name = "scenes" if not arguments.photos else "small_photos" if arguments.small else "photos"
        world = WORLDS[name](output / name, arguments)
        run(name, world, arguments.only, arguments.seeds, arguments.results or output / "results.json")
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes in this start.")


if __name__ == "__main__":
    main()
