"""The embedded sample data: reproducible, split by composition, and right in every answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignvlm.data import scenes
from tests import examples


shapes = st.builds(
    scenes.Shape,
    st.sampled_from(list(scenes.COLOURS)),
    st.sampled_from(scenes.SHAPES),
    st.sampled_from(list(scenes.SIZES)),
    st.sampled_from(list(scenes.POSITIONS)),
)
some_scenes = st.lists(shapes, min_size=1, max_size=2, unique_by=lambda s: s.position).map(
    lambda found: tuple(sorted(found, key=lambda s: list(scenes.POSITIONS).index(s.position)))
)


def answer_by_reading(scene, question: str) -> str:
    """A second opinion: answers a question from its words alone."""
    words = question.rstrip("?").split()
    fitting = [
        s
        for s in scene
        if all(w not in scenes.COLOURS or w == s.colour for w in words)
        and all(
            w not in (*scenes.SHAPES, *(f"{k}s" for k in scenes.SHAPES), "crosses") or s.kind.startswith(w[:5])
            for w in words
        )
        and (" ".join(words[-2:]) not in scenes.POSITIONS or s.position == " ".join(words[-2:]))
    ]
    if words[0] == "Is":
        return "yes" if fitting else "no"
    if words[0] == "How":
        return scenes.NUMBER_WORDS[len(fitting)]
    chosen = fitting[-1] if "second" in words else fitting[0]
    return chosen.colour if words[0] == "What" else chosen.position


@settings(max_examples=examples(200), deadline=None)
@given(some_scenes, st.integers(0, 2**31))
def test_every_question_has_one_right_answer(scene, seed):
    asked = scenes.questions(scene, np.random.default_rng(seed))
    assert [kind for _, _, kind in asked] == [kind for kind in scenes.QUESTION_KINDS for _ in range(2)]
    for question, answer, _ in asked:
        assert answer_by_reading(scene, question) == answer, question


def test_same_arguments_same_records_and_other_seeds_others():
    first, again = scenes.make_scenes(5, seed=3), scenes.make_scenes(5, seed=3)
    other = scenes.make_scenes(5, seed=4)
    assert first["conversations"] == again["conversations"] != other["conversations"]
    pixels = [np.asarray(r["images"][0]) for d in (first, again, other) for r in d]
    assert all(np.array_equal(a, b) for a, b in zip(pixels[:5], pixels[5:10]))
    assert not np.array_equal(pixels[0], pixels[10])


def test_no_held_out_composition_is_ever_trained_on():
    rng = np.random.default_rng(0)
    train = {frozenset(scenes.random_scene(rng, "train")) for _ in range(3000)}
    test = {frozenset(scenes.random_scene(rng, "test")) for _ in range(500)}
    assert not train & test
    scene = next(iter(s for s in train if len(s) == 2))
    assert scenes.split_of(tuple(scene)) == scenes.split_of(tuple(scene)[::-1]) == "train"


def test_answers_are_balanced_enough_that_guessing_does_not_pay():
    dataset = scenes.make_scenes(400, "test", ("questions",))
    by_kind: dict[str, list[str]] = {}
    for conversation in (conversation for row in dataset["conversations"] for conversation in row):
        by_kind.setdefault(conversation["kind"], []).extend(conversation["responses"])
    best = {kind: max(map(given.count, set(given))) / len(given) for kind, given in by_kind.items()}
    assert best["yes_no"] < 0.6 and best["colour"] < 0.35 and best["position"] < 0.4 and best["count"] < 0.65


def test_captions_name_what_is_drawn():
    scene = (
        scenes.Shape("red", "circle", "large", "top left"),
        scenes.Shape("blue", "cross", "small", "bottom right"),
    )
    assert scenes.short_caption(scene) == "A red circle and a blue cross."
    assert (
        scenes.detailed_caption(scene)
        == "A large red circle is at the top left. A small blue cross is at the bottom right."
    )
    pixels = np.asarray(scenes.draw(scene, np.random.default_rng(0))).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert pixels[16, 16, 0] > pixels[16, 16, 1:].max() + 60  # red in the top left
    assert pixels[48, 48, 2] > pixels[48, 48, :2].max() + 60  # blue in the bottom right


def test_texts_have_no_pictures():
    texts = scenes.make_texts(3)
    assert texts["images"] == [[], [], []] and all(len(asked) == 1 for asked in texts["conversations"])


@pytest.mark.parametrize("arguments", [{"split": "validation"}, {"annotations": ("poems",)}])
def test_unknown_values_are_named(arguments):
    with pytest.raises(ValueError, match=r"validation|poems"):
        scenes.make_scenes(1, **arguments)
