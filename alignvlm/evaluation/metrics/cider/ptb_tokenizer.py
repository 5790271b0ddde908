"""Tokenizes captions as coco-caption does: Penn Treebank tokens, lower case, without punctuation.

The official program is CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase`, in Java. These rules were written from its answers to
given texts, not from its grammar. Like any lexical scanner it tries every rule at each position: the longest match wins, and of equally
long ones the first. If a rule has a group, the group is the token; the match after it is context that must follow and counts towards the
length.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache


# coco-caption removes these. The brackets in its list are upper case and the tokens lower case, so brackets stay.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Abbreviations that keep their period: "Mr." ...
TITLES = """
adj adm adv alex assoc asst atty ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov govs hon
insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph pres prof pvt rep reps rev sen
sens sfc sgt spc st ste supt supts treas vs wm
""".split()
# ... "Inc.", with which a sentence may end ...
ENDINGS = """
al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla fri ga
inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc ppte pptes ppty pptys
pte ptes pty ptys rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
""".split()
# ... "Mass.", though "a mass." ends a sentence, and "no. 5".
CAPITALISED_ENDINGS = "ark az del ill la mass miss ore pa tex wash".split()
BEFORE_NUMBERS = "art ca fig figs no nos op p pp prop".split()
NOT_IN_CAPITALS = (
    "mfg",
    "mtg",
    "ppte",
    "pptes",
    "ppty",
    "pptys",
    "pte",
    "ptes",
    "pty",
    "ptys",
)  # "Pty." but not "PTY."
# One of these, capitalised, behind an initial starts a new sentence: "in section B. The dog".
SENTENCE_STARTS = """
a about according additionally after an as at but earlier he her here however if in it last many more now once one
other our she since so some such that the their then there these they this we what when while yet you
""".split()
FILE_TYPES = """
bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov pdf php pl png ppt ps py sql tar txt wav x xml zip
""".split()
# Written as one word, tokenized as two.
SPLIT_WORDS = {word: [word[:3], word[3:]] for word in ("cannot", "gonna", "gotta", "wanna", "gimme", "lemme")}


def _any_of(words: Iterable[str]) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return "(?i:" + "|".join(f"{w[0]}(?-i:{w[1:]})" if w in NOT_IN_CAPITALS else w for w in longest_first) + ")"


def _capitalised(words: Iterable[str]) -> str:
    return "(?:" + "|".join(f"{w[0].upper()}(?i:{w[1:]})" for w in sorted(words, key=len, reverse=True)) + ")"


MARKS = "\u0300-\u036f"  # accents that follow their letter
LETTER, ALNUM = rf"(?:[^\W\d_]|[{MARKS}])", rf"(?:[^\W_]|[{MARKS}])"
APOSTROPHE, ANY_APOSTROPHE = "['\u2019]", "['\u2019\u2018\u201b`]"
QUOTES = "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a`"
SPACE = r"[ \t]"  # a new line is a new caption
ELIDED = rf"(?i:[dlo]){ANY_APOSTROPHE}{ALNUM}{{2,}}"  # d'oeuvres, O'Neil
STOPPED = rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)+"  # photo.jpg, Yahoo!s
HYPHEN = "[-_\u058a\u2010\u2011]"
PART = rf"(?:{ELIDED}|{ALNUM}+)"
CLITIC = r"(?i:s|d|m|ll|re|ve)"  # she's, she'd, I'm, she'll, they're, they've
TAG_NAME = r"[A-Za-z][A-Za-z0-9_:.-]*"
HOST = r"[^\sA-Z0-9\"<>|().!?,:;{}\[\]^_`$'/\\=@-]+"
URL, URL_END = r"[^\s\"<>|(){}]", r"[^\s\"<>|(){}.!?,-]"
MAIL = r"[^\s\"<>|(){}.]+"
MARKUP = rf"</?{TAG_NAME}(?:{SPACE}+{TAG_NAME}(?:{SPACE}*={SPACE}*(?:\"[^\"\n]*\"|'[^'\n]*'))?)*{SPACE}*/?>|<[!?][A-Za-z-][^>\n]*>"
RULES = [
    re.compile(pattern)
    for pattern in (
        # Abbreviations, initials (unless a sentence starts behind) and acronyms. "inc.-5" is "inc." and "-5": two more
        # characters belong to the context, if only to win over other rules.
        rf"{_any_of(TITLES)}\.",
        STOPPED,
        rf"({_any_of(ENDINGS)}\.|{_capitalised(CAPITALISED_ENDINGS)}\.)[\s\S]{{0,2}}",
        rf"({_any_of(BEFORE_NUMBERS)}\.)\s?\d",
        rf"[A-Za-z]\.(?!\s+(?:{MARKUP})?(?:{_capitalised(SENTENCE_STARTS)}|M(?i:[rs])\.|(?<=>))\s)",
        r"[A-Za-z](?:\.[A-Za-z])+\.?|(?i:ph\.d\.)",
        rf"(?:{ALNUM}+(?:[-_]{ALNUM}+)*|{STOPPED}|{ELIDED}|[A-Z]+(?:&[A-Z]+)+)\.(?=[,;:])",
        # Words, and what follows their apostrophe: do|n't, dog|'s.
        rf"{ALNUM}+",
        rf"([A-Za-z]*[A-MO-Za-mo-z])(?i:n{ANY_APOSTROPHE}t)",
        rf"(?i:n{ANY_APOSTROPHE}t)",
        rf"({ALNUM}+){APOSTROPHE}{CLITIC}",
        rf"'{CLITIC}(?![A-Za-z])|\u2019(?:{CLITIC}|[nN])",
        # Words with an apostrophe: d'oeuvres, O'Neil, Hawai'i, o'clock.
        ELIDED,
        rf"(?:[dlno]|[A-HJ-XZ]){ANY_APOSTROPHE}{LETTER}{{2,}}",
        rf"{LETTER}+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z]{LETTER}*",
        rf"((?i:y){APOSTROPHE})[A-Za-z]",
        rf"(?i:[djl]|ol|dunkin|somethin){APOSTROPHE}",
        rf"(?i:cap{APOSTROPHE}n|c{APOSTROPHE}(?:mon|est)|[eo]{APOSTROPHE}er|s{APOSTROPHE}mores|nat{APOSTROPHE}l)",
        rf"(?i:{APOSTROPHE}(?:em|till?|cause|n{APOSTROPHE}))",
        rf"(?i:{APOSTROPHE}n)(?=\s)",
        r"(?i:('t)(?:is|was))",
        rf"{APOSTROPHE}[0-9]0[sS]",
        rf"({APOSTROPHE}[0-9][0-9])(?:[ \n]|$)",
        # Words joined by hyphens, underscores, slashes, stops: 3-year-old, U.S.-led, 1,000-mile, and/or, photo.jpg, AT&T.
        rf"{PART}(?:{HYPHEN}{PART})+",
        r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:(?:[A-Za-z]\.){2,}|[A-Za-z0-9]+))+",
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
        rf"(?:{ALNUM}+\.)+{_any_of(FILE_TYPES)}(?=[\s.,!?])",
        r"[A-Z]+(?:[&+][A-Z]+)+",
        # Numbers, times, fractions, dates, telephone numbers.
        r"[-+]?\d*(?:[.,:]?\d+)+",
        rf"\d+(?:-|{SPACE}\s*)\d+/\d+|\d+/\d+(?:/\d+)?",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"(?:\+\d{2,3}[- ])?(?:\d{2,4}[- ]\d{3,4}[- ]|\(\d{2,3}\) ?\d{3,4}[- ]?)\d{3,5}(?!\d*-\d)",
        # Addresses and tags.
        rf"(?i:https?)://{URL}+{URL_END}",
        rf"(?i:www\.)(?:[^\s\"<>|().!?,{{}}]+\.)+[A-Za-z]{{2,4}}(?:/{URL}+{URL_END})?",
        rf"(?:{HOST}\.)+(?i:com|net|org|edu)(?:/[^\s\"<>|()]+{URL_END})?",
        rf"<?[A-Za-z0-9]{URL}*@(?:{MAIL}\.)*{MAIL}>?",
        rf"#{LETTER}+|@[A-Za-z_][A-Za-z0-9_]*",
        MARKUP,
        # Symbols.
        r"[A-Z]*\$",
        r"(?i:c\+\+|[cf]\#)",
        r"[<>]?[:;=][-o*']?[()DPdpO\[\]{|\\@](?![A-Za-z0-9])",
        r":[0-9]",
        r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)",
        rf"[{QUOTES}]{{2}}|''",
        rf"\.{{3,5}}|\.{SPACE}\.{SPACE}\.(?:{SPACE}\.)*",
        r"&QUOT;|&#\d+;",
        r"-{2,}|_{2,}|\*{2,}|#{2,}|@{2,}|[?!]+|<<|>>|\\?\*",
    )
]
# Captions are mostly words between spaces, and no rule joins those to their neighbours.
PLAIN_WORD = re.compile(r"[A-Za-z]+(?=,?[ \n])")

UNREADABLE = "\x7f"
ENTITIES = {
    "&amp;": "&",
    "&AMP;": "&",
    "&lt;": "<",
    "&LT;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "&apos;": "'",
    "&nbsp;": " ",
    "&ndash;": "--",
    "&mdash;": "--",
}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
CHARACTERS = {
    **dict.fromkeys("\u2018\u201b\u2039\x91", "`"),
    **dict.fromkeys("\u2019\u203a\x92", "'"),
    **dict.fromkeys("\u201c\u00ab\x93", "``"),
    **dict.fromkeys('"\u201d\u00bb\x94', "''"),
    **dict.fromkeys("\u2013\u2014\u2015\x96\x97", "--"),
    **dict.fromkeys("\u20ac\u20a0\u00a4\x80", "$"),
    **dict.fromkeys("\u058a\u2010\u2011", ""),
    **dict(zip("\u00bc\u00bd\u00be\u2153\u2154", ("1/4", "1/2", "3/4", "1/3", "2/3"))),
    "\u2026": "...",
    "\u00a3": "#",
    "\u00a2": "cents",
}


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Tokenizes captions in their order, which matters: whether a final "B." keeps its period depends on the next caption.

    Line breaks within a caption count as spaces. (In the official pipeline they shift every later caption by one.)
    """
    text = "\n".join(" ".join(_readable(caption).splitlines()) for caption in captions) + "\n"
    tokenized, tokens, place = [], [], 0
    while place < len(text):
        if text[place] == "\n":
            tokenized.append([token for token in tokens if token and token not in PUNCTUATION])
            tokens = []
            place += 1
        elif text[place].isspace() or text[place] == UNREADABLE:
            place += 1
        else:
            plain = PLAIN_WORD.match(text, place)
            token = plain.group() if plain else _longest_match(text, place)
            place += len(token)
            tokens += _normalised(token)
    return tokenized


def _longest_match(text: str, place: int) -> str:
    token, longest = text[place], 1
    for rule in RULES:
        match = rule.match(text, place)
        if match and match.end() - place > longest:
            token, longest = match[rule.groups], match.end() - place
    return token


@lru_cache(maxsize=100_000)
def _normalised(token: str) -> list[str]:
    """Returns what is printed for a token: lower case, brackets by name, ASCII quotes, the parts of "cannot"."""
    if len(token) == 1:
        return [{**CHARACTERS, **BRACKETS}.get(token, token.lower())]
    if token[:3] == "...":
        return ["..."]
    if token in ("--", "---", "----"):
        return ["--"]
    if token[:3] in (". .", ".\t."):
        return ["..."]
    if all(character in QUOTES for character in token):
        return ["".join(CHARACTERS.get(character, character) for character in token)]
    token = token.lower()
    if token in SPLIT_WORDS:
        return SPLIT_WORDS[token]
    if re.fullmatch(f"\u2019{CLITIC}|n{ANY_APOSTROPHE}t", token):
        token = token.translate({0x2019: "'", 0x2018: "`", 0x201B: "`"})
    return token.replace("(", "-lrb-").replace(")", "-rrb-").split()


def _readable(caption: str) -> str:
    """Resolves entities, and drops or sets apart characters that the official tokenizer does not know."""
    if "&" in caption:
        for entity, character in ENTITIES.items():
            caption = caption.replace(entity, character)
    return caption if caption.isascii() else "".join(map(_readable_character, caption))


@lru_cache(maxsize=100_000)
def _readable_character(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("No", "Nl"):
        return f" {character} "
    if character.isascii() or character in CHARACTERS or character in MARKS:
        return character
    if character > "\uffff" or category in ("Cc", "Cf", "Co", "Cn", "Cs", "Me") or "\ufe00" <= character <= "\ufe0f":
        return "" if character == "\u00ad" else UNREADABLE
    return character
