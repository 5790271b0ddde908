"""Normalises answers as the official VQA evaluation does (GT-Vision-Lab/VQA, `vqaEval.py`), with its oddities."""

import re


PUNCTUATION = (
    ";",
    "/",
    "[",
    "]",
    '"',
    "{",
    "}",
    "(",
    ")",
    "=",
    "+",
    "\\",
    "_",
    "-",
    ">",
    "<",
    "@",
    "`",
    ",",
    "?",
    "!",
)
ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# A word that lacks one apostrophe gets it back. The official table has one entry the wrong way round.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place in range(len(word))
    if word[place] == "'"
} | {"somebody'd": "somebodyd"}


def normalise(answer: str, keep_articles: bool = False) -> str:
    """Returns the answer as the official VQA evaluation compares it; with `keep_articles`, the articles stay.

    1. New lines and tabs become spaces; surrounding white space goes.
    2. Each of `PUNCTUATION` is deleted if it stands next to a space anywhere in the answer, or if the answer has a comma between
       digits; otherwise it becomes a space. Apostrophes and colons stay.
    3. A period goes unless a digit follows (the first 32 of them: the official code passes a flag where the count belongs).
    4. Lower case; "none" and "zero" ... "ten" become digits; articles go; contractions get a lost apostrophe back.
    """
    text = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if keep_articles or word not in ARTICLES)


def without_punctuation(answer: str) -> str:
    """Returns the answer after steps 2 and 3 of `normalise`."""
    has_digit_comma = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        beside_a_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_a_space or has_digit_comma else " ")
    return re.sub(r"\.(?!\d)", "", text, count=32)


def comparable(prediction: str, reference: str) -> tuple[str, str]:
    """Returns both answers in the form of the comparison: the normal form, or the first weaker one that leaves any of the reference.

    The first weaker form keeps articles (a reference "A"); the second only lower-cases and strips (a reference "+"). The reference's form
    is empty only if the reference is.
    """
    for form in (normalise, lambda answer: normalise(answer, keep_articles=True)):
        if right := form(reference):
            return form(prediction), right
    return prediction.strip().lower(), reference.strip().lower()
