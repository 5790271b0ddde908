"""CIDEr-D of tokenized captions, in numpy: the scores of coco-caption's scorer, several times faster."""

from collections.abc import Mapping, Sequence

import numpy as np


LONGEST_NGRAM = 4
SIGMA = 6.0


def cider_d(
    predictions: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    frequencies: Mapping[str, int] | None = None,
    documents: int | None = None,
) -> np.ndarray:
    """Computes CIDEr-D of every prediction, after Vedantam et al., 2015 (arXiv 1411.5726), as coco-caption computes it.

    For n = 1 ... 4, a caption is the vector of its n-grams' counts times log(documents / document frequency). A prediction's
    score against a reference is the clipped cosine of their vectors, times exp(-d² / 72), where d is the difference of their
    numbers of bigrams. CIDEr-D is the mean over references and n, times 10. An n-gram's document frequency is the number of items
    that have it in a reference.

    Args:
        predictions: one list of tokens per item.
        references: for each item, one list of tokens per reference; at least one.
        frequencies: document frequencies by n-gram, its tokens joined by spaces. Those of `references` by default.
        documents: number of items that `frequencies` were counted over.

    Returns:
        `(items,)` float64.
    """
    items = len(predictions)
    captions = [[prediction, *group] for prediction, group in zip(predictions, references)]
    group_sizes = np.array([len(group) for group in captions])
    item_of = np.repeat(np.arange(items), group_sizes)  # (captions,)
    prediction_of = np.repeat(np.cumsum(group_sizes) - group_sizes, group_sizes)  # (captions,): its item's prediction
    is_reference = np.arange(len(item_of)) != prediction_of
    texts = [caption for group in captions for caption in group]
    lengths = np.array([len(text) for text in texts])
    words = [word for text in texts for word in text]
    caption_of_word = np.repeat(np.arange(len(texts)), lengths)
    words_left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))  # in the caption, this one included

    vocabulary: dict[str, int] = {}
    word_ids = np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words], dtype=np.int64)
    log_documents = np.log(float(items if documents is None else documents))
    bigrams = np.maximum(lengths - 1, 0)
    penalty = np.exp(-((bigrams[prediction_of] - bigrams) ** 2.0) / (2 * SIGMA**2))

    scores = np.zeros(items)
    ngram_ids = np.zeros(len(words), dtype=np.int64)  # of the n-gram that starts at each word
    for n in range(1, LONGEST_NGRAM + 1):
        starts = np.flatnonzero(words_left >= n)
        longer = ngram_ids[starts] * len(vocabulary) + word_ids[starts + n - 1]
        distinct, inverse = np.unique(longer, return_inverse=True)
        ngram_ids = np.zeros(len(words), dtype=np.int64)
        ngram_ids[starts] = inverse  # small numbers again, so that the next n cannot overflow

        # One entry per caption and n-gram in it.
        entries, counts = np.unique(caption_of_word[starts] * len(distinct) + inverse, return_counts=True)
        caption, ngram = np.divmod(entries, max(len(distinct), 1))
        if frequencies is None:
            in_references = is_reference[caption]
            pairs = np.unique(item_of[caption[in_references]] * len(distinct) + ngram[in_references])
            document_frequency = np.bincount(pairs % max(len(distinct), 1), minlength=len(distinct))
        else:
            document_frequency = np.zeros(len(distinct))
            for start, index in zip(starts, inverse):
                document_frequency[index] = frequencies.get(" ".join(words[start : start + n]), 0)
        weight = counts * (log_documents - np.log(np.maximum(document_frequency, 1)))[ngram]
        norm = np.sqrt(np.bincount(caption, weight**2, minlength=len(texts)))

        # Entries of references meet the entry of their item's prediction for the same n-gram.
        key = item_of[caption] * len(distinct) + ngram
        of_reference = is_reference[caption]
        prediction_key, prediction_weight = key[~of_reference], weight[~of_reference]  # sorted by key
        place = np.searchsorted(prediction_key, key[of_reference])
        met = place < len(prediction_key)
        met[met] = prediction_key[place[met]] == key[of_reference][met]
        reference_weight = weight[of_reference][met]
        product = np.minimum(prediction_weight[place[met]], reference_weight) * reference_weight
        similarity = np.bincount(caption[of_reference][met], product, minlength=len(texts)).astype(float)
        norms = norm * norm[prediction_of]
        similarity = np.divide(similarity, norms, out=similarity, where=norms != 0) * penalty
        scores += np.bincount(item_of, np.where(is_reference, similarity, 0.0), minlength=items)
    return 10.0 * scores / LONGEST_NGRAM / (group_sizes - 1)


def document_frequencies(references: Sequence[Sequence[Sequence[str]]]) -> dict[str, int]:
    """Counts in how many items' references each n-gram (its tokens joined by spaces) occurs."""
    frequencies: dict[str, int] = {}
    for group in references:
        ngrams = {
            " ".join(tokens[start : start + n])
            for tokens in group
            for n in range(1, LONGEST_NGRAM + 1)
            for start in range(len(tokens) - n + 1)
        }
        for ngram in ngrams:
            frequencies[ngram] = frequencies.get(ngram, 0) + 1
    return frequencies
