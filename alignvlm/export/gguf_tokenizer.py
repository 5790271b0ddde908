"""A byte-level BPE tokenizer as a GGUF file holds it.

llama.cpp has its own tokenizer. From the file it takes the tokens, what kind each is, the merges, and the name of one of the
pre-tokenizers that it has built in; `PRE_TOKENIZERS` says how those of the named families of language models cut a text.
"""

import json
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How a pre-tokenizer cuts a text: at every digit or by a regular expression, and then by GPT-2's expression if `like_gpt2`.

    Args:
        ignore_merges: a piece that is a token is taken as it is, whatever the merges make of it.
    """

    digits: bool = False
    expression: str | None = None
    like_gpt2: bool = False
    ignore_merges: bool = False


PRE_TOKENIZERS = {  # by llama.cpp's name
    "gpt-2": PreTokenizer(like_gpt2=True),
    "smollm": PreTokenizer(digits=True, like_gpt2=True),
    "qwen2": PreTokenizer(expression=_CONTRACTIONS + _WORDS + r"\p{N}" + _REST),
    "llama-bpe": PreTokenizer(expression=_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST, ignore_merges=True),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # GGUF's kinds of tokens


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file holds of a tokenizer: `tokens` and `kinds` by id, `merges` as two tokens with a space between them, and `pre`,
    the pre-tokenizer's name."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, from which the file is made"
        )
    return tokenizer.backend_tokenizer


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for what the tokenizer does to a text before the merges.

    Raises:
        ValueError: if llama.cpp would do something else. The message says what.
    """
    backend = _backend(tokenizer)
    model, normalizer = backend.model, backend.normalizer
    kind = "SentencePiece's BPE" if getattr(model, "byte_fallback", False) else type(model).__name__
    if kind != "BPE":
        raise ValueError(f"it is written for byte-level BPE tokenizers, and this one is {kind}")
    if normalizer is not None and type(normalizer).__name__ != "NFC":  # llama.cpp has none; most texts are NFC
        change = type(normalizer).__name__
        raise ValueError(f"llama.cpp does not change a text as the tokenizer's normalizer {change} does")
    added = backend.get_added_tokens_decoder().values()
    marked = [token.content for token in added if token.lstrip or token.rstrip or token.single_word]
    if marked:
        raise ValueError(f"llama.cpp does not look at the spaces around {', '.join(marked)} as this tokenizer does")
    given = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {"type": "none"}
    steps = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    found = _read(steps, model.ignore_merges)
    for name, known in PRE_TOKENIZERS.items():
        if found == known:
            return name
    raise ValueError(
        f"none of the pre-tokenizers {', '.join(PRE_TOKENIZERS)} of llama.cpp cuts texts as this tokenizer does ({json.dumps(steps)})"
    )


def _read(steps: list[dict], ignore_merges: bool) -> PreTokenizer | None:
    """The pre-tokenizer that these steps of a `tokenizer.json` are; None if no `PreTokenizer` can say it."""
    *first, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(first) > 1:
        return None
    found = {"like_gpt2": last.get("use_regex", True), "ignore_merges": ignore_merges}
    if not first:
        return PreTokenizer(**found)
    step = first[0]
    if step["type"] == "Digits" and step["individual_digits"]:
        return PreTokenizer(digits=True, **found)
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return PreTokenizer(expression=step["pattern"].get("Regex"), **found)
    return None


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer for a language model with `size` embeddings; those without a token get one that no text has.

    Raises:
        ValueError: as `pre_tokenizer_name`, and if the tokenizer has more tokens than `size`.
    """
    pre = pre_tokenizer_name(tokenizer)
    backend = json.loads(_backend(tokenizer).to_str())
    added = {each["id"]: each for each in backend["added_tokens"]}
    by_id = {index: token for token, index in backend["model"]["vocab"].items()}
    by_id |= {index: each["content"] for index, each in added.items()}
    if max(by_id) >= size:
        raise ValueError(f"the tokenizer has tokens up to {max(by_id)}, and the language model {size} embeddings")
    tokens, kinds = [], []
    for index in range(size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index in added:
            kinds.append(CONTROL if added[index]["special"] else USER_DEFINED)
        else:
            kinds.append(NORMAL if index in by_id else UNUSED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    return Vocabulary(tokens, kinds, merges, pre)


def rebuild(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer that llama.cpp makes of a vocabulary, to compare its tokens; it adds none by itself."""
    known = PRE_TOKENIZERS[vocabulary.pre]
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ")) for merge in vocabulary.merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=known.ignore_merges))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=known.like_gpt2)]
    if known.digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif known.expression:
        steps.insert(0, pre_tokenizers.Split(Regex(known.expression), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    apart = [token for token, kind in zip(vocabulary.tokens, vocabulary.kinds) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in apart])
    return tokenizer
