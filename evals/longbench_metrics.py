"""The scores of LongBench, version 1, E and 2, equal to the official ones to the last digit that they print.

Written from the definitions of the official scorer (LongBench, MIT licence), its oddities included, because published
numbers contain them: an answer that is an article never scores, ROUGE-L of a text with itself is 0.999999995, a blank
line counts as code. Depends on the standard library and numpy; on jieba for the Chinese sets alone.

Every metric takes (prediction, reference), is in [0, 1], and is total: whatever was predicted gets a score.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np

from sparseprefill.evals.longbench_data import BUCKETS, SETS, SPLITS, LongBenchSet, base_name, bucket_of

# the official list as it stands: it closes book titles with a mark that it does not open them with
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏."
)
_DELETE = str.maketrans("", "", string.punctuation)
_DELETE_CHINESE = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_COMMENT_MARKS = ("`", "#", "//")
RECURSION_STEPS = 980
"""Steps of one walk through a table of ROUGE-L after which the official, recursive one gives up under CPython."""


def token_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two multisets of tokens; 0 where nothing is shared, also where both are empty."""
    shared = sum((Counter(prediction) & Counter(reference)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of words: lower case, ASCII punctuation deleted, English articles dropped."""
    return token_f1(_words(prediction), _words(reference))


def _words(text: str) -> list[str]:
    return _ARTICLE.sub(" ", text.lower().translate(_DELETE)).split()


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of the words that jieba finds: lower case, ASCII and Chinese punctuation deleted."""
    return token_f1(_chinese_words(prediction), _chinese_words(reference))


def _chinese_words(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_DELETE_CHINESE).split()) for word in segment(text))
    return [word for word in words if word]


def segment(text: str) -> list[str]:
    """Chinese text as words, by jieba with its own dictionary. ImportError, with the way out, without jieba."""
    try:
        import jieba
    except ImportError as error:
        raise ImportError('the Chinese sets are scored with jieba: pip install "sparseprefill[evals]"') from error
    jieba.setLogLevel(logging.WARNING)  # it announces on the terminal that it loads its dictionary
    return list(jieba.cut(text, cut_all=False))


def rouge_l(prediction: str, reference: str, *, emulate_recursion_limit: bool = False) -> float:
    """ROUGE-L's F, summary level, as the package `rouge` 1.0.1 computes it: on sets of words, case kept.

    Args:
        emulate_recursion_limit: score 0, as the official recursion does, where the walk through one pair of sentences
            takes more than `RECURSION_STEPS`: both are longer than anything that is generated here.
    """
    ours, theirs = _sentences(prediction), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    union: set[str] = set()
    for row in theirs:
        for column in ours:
            words, steps = _common_path(row, column)
            if emulate_recursion_limit and steps > RECURSION_STEPS:
                return 0.0
            union |= words
    recall = len(union) / len({word for sentence in theirs for word in sentence})
    precision = len(union) / len({word for sentence in ours for word in sentence})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence; a sentence of blanks has one word, the empty one."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_path(rows: list[str], columns: list[str]) -> tuple[set[str], int]:
    """The words of one longest common subsequence, and the steps of the walk back that found it."""
    table = [[0] * (len(columns) + 1)]
    for row in rows:
        above, line, left = table[-1], [0], 0
        for j, column in enumerate(columns):
            left = above[j] + 1 if row == column else max(above[j + 1], left)
            line.append(left)
        table.append(line)
    i, j, steps = len(rows), len(columns), 0
    words = set()
    while i and j:
        steps += 1
        if rows[i - 1] == columns[j - 1]:
            words.add(rows[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:  # ties go this way: which words are found depends on it
            j -= 1
    return words, steps


def rouge_zh(prediction: str, reference: str) -> float:
    """ROUGE-L of the words that jieba finds; only an ASCII dot ends a sentence."""
    return rouge_l(" ".join(segment(prediction)), " ".join(segment(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the prediction names, if the right one is among them."""
    hits = [name for name in classes if name in prediction]
    for name in hits:  # the official loop removes from what it walks over, and so skips the next one: kept
        if name in reference and name != reference:
            hits.remove(name)
    return 1.0 / len(hits) if reference in hits else 0.0


def retrieval(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that are the paragraph's. IndexError for a reference without one."""
    return _share_of_numbers(prediction, _paragraph(r"Paragraph (\d+)", reference))


def retrieval_zh(prediction: str, reference: str) -> float:
    """The same for Chinese references. IndexError for a reference without a paragraph's number."""
    return _share_of_numbers(prediction, _paragraph(r"段落(\d+)", reference))


def _paragraph(pattern: str, reference: str) -> str:
    found = re.search(pattern, reference)
    if found is None:  # the official scorer's exception
        raise IndexError(f"the reference {reference!r} names no paragraph: it must look like {pattern}")
    return found[1]


def count(prediction: str, reference: str | int) -> float:
    """Share of the numbers in the prediction that are the reference."""
    return _share_of_numbers(prediction, str(reference))


def _share_of_numbers(prediction: str, right: str) -> float:
    numbers = _NUMBER.findall(prediction)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, reference: str) -> float:
    """Similarity, in hundredths, of the first predicted line without a mark of a comment to the reference.

    difflib's, which is not symmetric and reads repetitive lines of 200 characters as different; the official numbers
    are made with it too, and change where python-Levenshtein is installed.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(mark in each for mark in _COMMENT_MARKS)), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


METRICS: dict[str, Callable[[str, str], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_zh": rouge_zh,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_sim": code_sim,
}
"""The metrics of two arguments; `classification` takes the classes as a third."""


def sample_score(dataset: str, prediction: str, answers: Sequence[str], classes: Sequence[str] | None = None) -> float:
    """In [0, 1]: the best over the answers, 0 without any. Four sets are scored on the first line alone.

    ValueError for a set that there is not, and for one with classes that gets none.
    """
    entry = _set(dataset)
    if entry.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if entry.metric != "classification":
        metric = METRICS[entry.metric]
        return max((0.0, *(metric(prediction, answer) for answer in answers)))
    if not classes:
        raise ValueError(f"{dataset} is scored by classes: give all of them")
    return max((0.0, *(classification(prediction, answer, classes) for answer in answers)))


def _set(dataset: str) -> LongBenchSet:
    name = base_name(dataset)
    if name not in SETS:
        raise ValueError(f"LongBench has no set {dataset!r}: choose from {', '.join(SETS)}")
    return SETS[name]


def official_mean(scores: Sequence[float]) -> float:
    """100 times the mean, rounded as the official scorer does for a data set. ValueError without any score."""
    if not scores:
        raise ValueError("there is no score to average")
    total = 0.0
    for score in scores:  # sum() compensates its error from Python 3.12 on, and would round differently
        total += score
    return round(100 * total / len(scores), 2)


def official_bucket_mean(scores: Sequence[float]) -> float | None:
    """100 times the mean, rounded as the official scorer does for a bucket of E: by numpy, whose rounding differs.

    None for an empty bucket, where the official one prints NaN.
    """
    return float(np.round(100 * np.mean(scores), 2)) if scores else None


def corpus_score(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    classes: Sequence[str] | None = None,
) -> float:
    """The official score of a data set, in [0, 100]. ValueError without a prediction."""
    pairs = zip(predictions, answers, strict=True)
    return official_mean([sample_score(dataset, prediction, right, classes) for prediction, right in pairs])


def bucket_scores(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    lengths: Sequence[int],
    classes: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """The official scores of a data set of E by bucket of stored length; None where a bucket is empty."""
    scores: dict[str, list[float]] = {name: [] for name, _ in BUCKETS}
    for prediction, right, length in zip(predictions, answers, lengths, strict=True):
        scores[bucket_of(length)].append(sample_score(dataset, prediction, right, classes))
    return {name: official_bucket_mean(values) for name, values in scores.items()}


def category_average(scores: Mapping[str, float], language: str) -> float | None:
    """The official average of a language ("en" or "zh"): the mean over categories of the means of their data sets.

    The code sets belong to both languages. None where no set of the language has a score.
    """
    if language not in ("en", "zh"):
        raise ValueError(f"averages are of en or zh, not {language!r}")
    categories: dict[str, list[float]] = {}
    for name, score in scores.items():
        entry = _set(name)
        if entry.language in (language, "code"):
            categories.setdefault(entry.category, []).append(score)
    means = [sum(values) / len(values) for values in categories.values()]
    return sum(means) / len(means) if means else None


def dataset_average(scores: Mapping[str, float]) -> float | None:
    """The plain mean over data sets, which most papers print; None without any."""
    return sum(scores.values()) / len(scores) if scores else None


def extract_choice(response: str) -> str | None:
    """The letter that an answer to LongBench v2 settles on, None where it does not say so in the sentence asked for."""
    response = response.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", response)
    found = found or re.search(r"The correct answer is ([A-D])", response)
    return found[1] if found else None


def v2_scores(rows: Sequence[tuple[bool, str, str]]) -> dict[str, float | None]:
    """The official accuracies of LongBench v2, in [0, 100], of (right, difficulty, length); None where there is no row.

    Keys: overall, easy, hard, short, medium, long.
    """
    scores: dict[str, float | None] = {}
    for name in ("overall", *SPLITS):
        judged = [right for right, difficulty, length in rows if name in ("overall", difficulty, length)]
        scores[name] = round(100 * sum(judged) / len(judged), 1) if judged else None
    return scores
