"""CIDEr-D without Java equals the official programs: pycocoevalcap's scorer, and CoreNLP's tokenizer run by pycocoevalcap."""

import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import examples
from tests.caption_grammar import caption


FOLDER = Path(__file__).parents[2] / "alignvlm/evaluation/metrics/cider"


def load_module(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ptb_tokenizer = load_module("ptb_tokenizer")
scorer = load_module("cider_d")


@pytest.fixture(scope="module")
def cider():
    return evaluate.load(str(FOLDER))


@pytest.fixture(scope="module")
def official_tokens():
    """A function from captions to their official tokens, by the Java program."""
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("the official tokenizer needs Java, which is not installed")

    def tokens(captions: list[str]) -> list[list[str]]:
        lines = tokenizer.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(captions)})
        return [lines[i][0].split() for i in range(len(captions))]

    return tokens


def shared_captions(folder: Path) -> dict[str, list[str]]:
    """Every caption of the shared data, by where it comes from."""
    coco = [json.loads(line) for line in (folder / "metric_checks/coco_karpathy_test.jsonl").open()]
    found = {"coco": [text for row in coco for text in row["captions"]]}
    for captioner in {name for row in coco for name in row["predictions"]}:
        found[captioner] = [row["predictions"][captioner]["text"] for row in coco if captioner in row["predictions"]]
    for name, path in (
        ("flickr8k", "flickr8k/captions.jsonl"),
        ("flickr30k", "text/flickr30k_train_captions.jsonl"),
    ):
        found[name] = [text for line in (folder / path).open() for text in json.loads(line)["captions"]]
    return found


@pytest.mark.slow
def test_tokens_equal_java_on_shared_captions(shared_data, official_tokens):
    """A fifth of them; `make test-full` has all."""
    for name, every in shared_captions(shared_data).items():
        captions = every[:: 5 if examples(1) == 1 else 1]
        ours, official = ptb_tokenizer.tokenize(captions), official_tokens(captions)
        assert [c for c, a, b in zip(captions, ours, official) if a != b] == [], name


@pytest.mark.slow
def test_tokens_equal_java_on_999_of_1000_made_up_captions(official_tokens):
    rng = random.Random(2)
    captions, kinds = zip(*(caption(rng) for _ in range(min(examples(30_000), 100_000))))
    differing = [
        index
        for index, (ours, official) in enumerate(zip(ptb_tokenizer.tokenize(captions), official_tokens(captions)))
        if ours != official
    ]
    by_kind = Counter(kind for index in differing for kind in kinds[index])
    first = [captions[index] for index in differing[:20]]
    assert len(differing) <= len(captions) / 1000, f"{len(differing)} differ; by kind {by_kind.most_common()}; {first}"


def test_tokens_equal_java_on_all_pairs_of_characters_and_many_triples(official_tokens):
    characters = [chr(code) for code in range(0x21, 0x7F)]
    rng = random.Random(0)
    texts = [a + b for a in characters for b in characters]
    texts += ["".join(rng.choices(characters, k=3)) for _ in range(40_000)]
    ours, official = ptb_tokenizer.tokenize(texts), official_tokens(texts)
    differing = [text for text, a, b in zip(texts, ours, official) if a != b]
    assert [text for text in differing if len(text) == 2] == []
    assert len(differing) < 20, differing


@pytest.mark.slow
def test_words_are_on_the_lists_if_and_only_if_java_knows_them(official_tokens, shared_data):
    t = ptb_tokenizer
    listed = [
        *t.TITLES,
        *t.ENDINGS,
        *t.CAPITALISED_ENDINGS,
        *t.BEFORE_NUMBERS,
        *t.SENTENCE_STARTS,
        *t.FILE_TYPES,
        *t.SPLIT_WORDS,
    ]
    book = (shared_data / "text/wikitext2.valid.txt").read_text().lower()
    others = sorted(set(re.findall(r"\b[a-z]{2,9}\b", book)))
    forms = ("the {}. dog", "the {}. 5", "J. {} dog", "1.{} is", "I {} it", "J. {}. dog")
    texts = [
        form.format(w) for word in listed + others for w in (word, word.capitalize(), word.upper()) for form in forms
    ]
    ours, official = t.tokenize(texts), official_tokens(texts)
    assert [text for text, a, b in zip(texts, ours, official) if a != b] == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("Mr. Smith's U.S. flag (1990's)", "mr. smith 's u.s. flag -lrb- 1990 's -rrb-"),
        ('"Stop!" he said; I cannot...', "stop he said i can not"),
        ("well-lit black/white t-shirts, $5.99", "well-lit black/white t-shirts $ 5.99"),
        ("rock 'n' roll in the '90s :)", "rock 'n' roll in the '90s :-rrb-"),
        ("no. 5 but no. six", "no. 5 but no six"),
        ("", ""),
        ("  \t ", ""),
    ],
)
def test_tokens_as_observed_from_the_java_program(text, tokens):
    assert ptb_tokenizer.tokenize([text]) == [tokens.split()]


def test_the_period_of_a_final_letter_depends_on_the_next_caption():
    assert ptb_tokenizer.tokenize(["letter B.", "A dog", "letter B.", "a dog"])[0::2] == [
        ["letter", "b"],
        ["letter", "b."],
    ]


def test_a_line_break_within_a_caption_moves_no_other_caption():
    broken = ["a dog\nruns", "a\r\ncat", "x\u2028y\x0bz", "the end"]
    assert ptb_tokenizer.tokenize(broken) == [["a", "dog", "runs"], ["a", "cat"], ["x", "y", "z"], ["the", "end"]]


words = st.lists(st.sampled_from(["a", "dog", "cat", "runs", "the"]), max_size=7)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=6))
def test_scores_equal_pycocoevalcap(items):
    official = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    predictions = [prediction for prediction, _ in items]
    references = [group for _, group in items]
    assume(any(tokens for group in references for tokens in group))  # else pycocoevalcap crashes
    mean, per_item = official.compute_score(
        {i: [" ".join(tokens) for tokens in group] for i, group in enumerate(references)},
        {i: [" ".join(prediction)] for i, prediction in enumerate(predictions)},
    )
    ours = scorer.cider_d(predictions, references)
    np.testing.assert_allclose(ours, per_item, rtol=0, atol=1e-12)
    assert abs(ours.mean() - mean) <= 1e-12
    frequencies = scorer.document_frequencies(references)
    np.testing.assert_array_equal(scorer.cider_d(predictions, references, frequencies, len(items)), ours)


@pytest.mark.slow
def test_scores_of_real_captioners_are_the_expected_ones(shared_data, cider):
    rows = [json.loads(line) for line in (shared_data / "metric_checks/coco_karpathy_test.jsonl").open()]
    expected = json.loads((shared_data / "metric_checks/expected_scores.json").read_text())["coco"]
    for captioner, scores in expected.items():
        captioned = [row for row in rows if captioner in row["predictions"]]
        found = cider.compute(
            predictions=[row["predictions"][captioner]["text"] for row in captioned],
            references=[row["captions"] for row in captioned],
        )
        assert len(captioned) == scores["n"]
        assert abs(found["cider"] - scores["CIDEr"]) <= 1e-9, captioner
        for row, score in zip(captioned, found["cider_per_item"]):
            assert abs(row["predictions"][captioner]["cider"] - score) < 1e-6  # rounded there


def test_official_results_at_the_edges(cider):
    assert cider.compute(predictions=["a dog"], references=[["a dog"]]) == {"cider": 0.0, "cider_per_item": [0.0]}
    found = cider.compute(predictions=["", "a cat sleeps"], references=[["a dog"], ["a cat sleeps", "the cat"]])
    assert found["cider_per_item"][0] == 0.0 and found["cider_per_item"][1] > 0
    assert cider.compute(predictions=["", ""], references=[[""], [""]])["cider"] == 0.0
    single = cider.compute(predictions=["a dog", "a cat"], references=["a dog", "the cat"])
    assert single == cider.compute(predictions=["a dog", "a cat"], references=[["a dog"], ["the cat"]])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "at least one prediction"),
        (["a", None], [["a"], ["b"]], "Prediction 1 is None"),
        ([3], [["a"]], "Prediction 0 is 3"),
        (["a", "b"], [["a"], []], "Item 1 needs at least one reference"),
        (["a", "b"], [["a"], [None]], r"Item 1 .* \[None\]"),
        (["a", "b"], [["a"], 7], "Item 1 .* it has 7"),
        (["a", "b"], [["a"]], "Mismatch"),
    ],
)
def test_unusable_input_is_named_and_leaves_what_was_added(cider, predictions, references, message):
    cider.add(prediction="a dog", reference=["a dog", "the dog"])
    with pytest.raises(ValueError, match=message):
        cider.add_batch(predictions=predictions, references=references)
    cider.add(prediction="a cat", reference=["a cat"])
    assert len(cider.compute()["cider_per_item"]) == 2


def test_document_frequencies_of_other_references(cider):
    references = [["a dog runs", "the dog"], ["a cat sleeps"], ["two birds"]]
    predictions = ["a dog runs", "a cat", "birds"]
    frequencies = json.loads(json.dumps(cider.document_frequencies(references)))
    alone = cider.compute(predictions=predictions, references=references)
    assert cider.compute(predictions=predictions, references=references, document_frequencies=frequencies) == alone
    one = cider.compute(predictions=predictions[:1], references=references[:1], document_frequencies=frequencies)
    assert one["cider"] == alone["cider_per_item"][0] > 0
    with pytest.raises(ValueError, match="document_frequencies must hold"):
        cider.compute(predictions=["a"], references=[["a"]], document_frequencies={"a dog": 3})


@pytest.mark.parametrize("name", ["cider", "pathvqa_accuracy"])
def test_metrics_load_from_their_folder_without_network_or_package(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(FOLDER.parent / name, folder)
    program = f"""
import socket
def refuse(*arguments):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
metric = evaluate.load({str(folder)!r})
print(metric.compute(predictions=["yes", "a cat"], references=["yes", "a cat"]))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("'accuracy': 1.0" if name == "pathvqa_accuracy" else "'cider':") in result.stdout
