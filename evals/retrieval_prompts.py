"""Retrieval prompts with the structure of RULER (arXiv:2404.06654), in words of their own: pure text, no data.

A `Draft` makes the same sample at any size; `fitted` finds the largest size that a number of tokens has room for.
Every draw of a sample comes from one generator seeded by seed, task, length and index: a sample is the same whatever
else is made. Facts are worded as in `sparseprefill.prompts`, so that the model inside can be asked for them.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sparseprefill.prompts import KEY_ADJECTIVES, KEY_NOUNS, Prose

GENERATOR_VERSION = 1
"""Of all prompts made here and in `needle_prompts`: raised when any of them changes."""

QUESTION_PLACES = ("start", "middle", "end")
"""Where a question may stand; the answer cue ends the prompt in any case."""

_NOISE = " The tide comes in. The tide goes out. The sand is warm. Gulls fly over. Here we are, as every day."
_DIGITS = 7
_LONGEST_UNIT = 400  # characters of a user's text that stand together
_MOST_DRAWN = 200_000  # keys of three words, and made-up words: there are 276 and 343 thousand of them
_GRID = 40  # a needle stands at one of so many depths
_FROM_HERE_FULL_LISTS = 4096  # shorter lists of words repeat them less often


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one context, in pieces of text that are joined as they are."""

    intro: str  # what the model is to do
    context: tuple[str, ...]  # haystack and needles
    question: str
    cue: str  # the start of the answer, which the model goes on with
    references: tuple[str, ...]  # what the answer must contain
    reply: str  # an answer that is right, as it would follow the cue
    places: tuple[int, ...] = ()  # pieces of the context that state what is asked for
    size: int = 0  # units of haystack

    def text(self, question_at: str = "end") -> str:
        """All but the cue."""
        match question_at:
            case "start":
                pieces = [self.intro, self.question, *self.context]
            case "middle":
                half = _middle(self.context)
                pieces = [self.intro, *self.context[:half], self.question, *self.context[half:]]
            case "end":
                pieces = [self.intro, *self.context, self.question]
            case _:
                raise ValueError(f"unknown question place {question_at!r}: choose one of {', '.join(QUESTION_PLACES)}")
        return "".join(pieces).lstrip()

    @property
    def depths(self) -> tuple[float, ...]:
        """Share of the rest of the context, in characters, that stands before each needle: 0 first, 1 last of all."""
        sizes = [len(piece) for piece in self.context]
        before = [0, *itertools.accumulate(sizes)]
        return tuple(before[place] / max(1, before[-1] - sizes[place]) for place in self.places)


def _middle(pieces: Sequence[str]) -> int:
    """The boundary between pieces that is nearest to half of their characters."""
    edges = [0, *itertools.accumulate(map(len, pieces))]
    return min(range(len(edges)), key=lambda n: abs(2 * edges[n] - edges[-1]))


@dataclass(frozen=True, slots=True)
class Draft:
    """A sample whose haystack can have any size."""

    make: Callable[[int], Sample]  # a larger size has more units of the same haystack
    least: int = 1  # the smallest size


class Haystack:
    """Units of text in an order of their own, made when they are first asked for."""

    def __init__(self, stream: Iterator[str]) -> None:
        self._stream = stream
        self._units: list[str] = []
        self._edges = [0]  # characters before the n-th unit

    def around(self, size: int, needles: Sequence[tuple[float, str]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The first `size` units with needles between them, and where in the result each needle stands.

        A needle at depth d (0 to 1) stands at the last boundary with at most that share of the haystack's characters
        before it; at one boundary, in the order given.
        """
        while len(self._units) < size:
            self._units.append(next(self._stream))
            self._edges.append(self._edges[-1] + len(self._units[-1]))
        total = self._edges[size]
        at = [bisect.bisect_right(self._edges, depth * total, 0, size + 1) - 1 for depth, _ in needles]
        pieces: list[str] = []
        places = [0] * len(needles)
        done = 0
        for k in sorted(range(len(needles)), key=lambda n: at[n]):
            pieces += self._units[done : at[k]]
            done = at[k]
            places[k] = len(pieces)
            pieces.append(needles[k][1])
        return (*pieces, *self._units[done:size]), tuple(places)


def noise() -> Haystack:
    """One line, again and again."""
    return Haystack(itertools.repeat(f"\n{_NOISE.strip()}"))


@dataclass(frozen=True, slots=True)
class UserText:
    """A text of the user's own to hide things in, made ready once for all samples."""

    units: tuple[str, ...]  # sentences; long ones in parts
    whole: str  # all of them

    @staticmethod
    def of(sentences: Sequence[str]) -> UserText:
        """Raises ValueError where there is no text in them."""
        units = tuple(unit for sentence in sentences if sentence.strip() for unit in _cut(sentence))
        if not units:
            raise ValueError("the haystack is empty: give it at least one sentence")
        return UserText(units, "".join(units))


def prose(draw: random.Random, text: UserText | None) -> Haystack:
    """Seeded prose, or a user's sentences from a random one on, over and over."""
    if text is None:
        return Haystack(iter(Prose(draw.getrandbits(64))))
    units, first = text.units, draw.randrange(len(text.units))
    return Haystack(units[(first + step) % len(units)] for step in itertools.count())


def _cut(sentence: str) -> Iterator[str]:
    """A sentence in units that lengths can be fitted with: at blanks, and where there are none, anywhere."""
    while len(sentence) > _LONGEST_UNIT:
        at = sentence.rfind(" ", 1, _LONGEST_UNIT)
        yield sentence[: at if at > 0 else _LONGEST_UNIT]
        sentence = sentence[at if at > 0 else _LONGEST_UNIT :]
    yield sentence


# ---- draws


def draw_numbers(count: int, draw: random.Random, text: UserText | None = None, digits: int = _DIGITS) -> list[str]:
    """Different numbers of as many digits, none of which a user's text contains."""
    own = "" if text is None else text.whole
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        number = str(draw.randrange(10 ** (digits - 1), 10**digits))
        if number not in own:
            numbers[number] = None
    return list(numbers)


def draw_keys(count: int, draw: random.Random, text: UserText | None = None) -> list[str]:
    """Keys of two words that share none, and of which a user's text says nothing."""
    own = "" if text is None else text.whole
    for _ in range(1000):
        adjectives, nouns = draw.sample(KEY_ADJECTIVES, count), draw.sample(KEY_NOUNS, count)
        keys = [f"{adjective} {noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]
        if not any(statement(key, "") in own for key in keys):
            return keys
    raise ValueError("the haystack states facts of the form that is asked for, very many of them: choose another text")


def draw_hex(draw: random.Random) -> str:
    """An id of 32 hexadecimal digits in groups."""
    text = f"{draw.getrandbits(128):032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def draw_depths(count: int, draw: random.Random) -> list[float]:
    """Different depths on a grid from 0 to 1, ascending."""
    return [step / (_GRID - 1) for step in sorted(draw.sample(range(_GRID), count))]


def _draw_names(count: int, draw: random.Random, letters: int, alphabet: str) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(alphabet, k=letters))] = None
    return list(names)


def _draw_spoken(draw: random.Random, taken: set[str]) -> str:
    """A made-up word that is not `taken`, and then is. All have six letters: none contains another."""
    if len(taken) > _MOST_DRAWN:
        raise ValueError(f"no more than {_MOST_DRAWN} different words are made up: choose a shorter length")
    while True:
        word = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))
        if word not in taken:
            taken.add(word)
            return word


# ---- wording, as the model inside was trained on


def statement(key: str, value: str) -> str:
    """A fact; without a value, all that stands before it."""
    return f" The secret code of the {key} is {value}." if value else f" The secret code of the {key} is"


def fact_question(keys: Sequence[str]) -> str:
    """What asks for the value of every key."""
    if len(keys) == 1:
        return f" Question: What is the secret code of the {keys[0]}?"
    wanted = [f"the secret code of the {key}" for key in keys]
    return f" Question: What is {_listed(wanted)}? Answer with one sentence for each."


def fact_cue(key: str) -> str:
    """What the value of a key is to follow."""
    return f" Answer:{statement(key, '')}"


def fact_reply(keys: Sequence[str], values: Sequence[str]) -> str:
    """What goes on after the cue of the first key, and is right."""
    rest = [statement(key, value) for key, value in zip(keys[1:], values[1:], strict=True)]
    return f" {values[0]}." + "".join(rest)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---- the tasks


@dataclass(frozen=True, slots=True)
class Difficulty:
    """The numbers that RULER's tasks have, with its defaults."""

    keys: int = 4  # facts in "multi_key", the one asked for among them
    values: int = 4  # of one key in "multi_value"
    queries: int = 4  # keys asked for in "multi_query"
    hops: int = 4  # of a chain in "variable_tracking": so many variables and one more
    chains: int = 1  # there, the one asked for among them
    common: int = 10  # words asked for in "common_words"
    alpha: float = 2.0  # of the zeta distribution in "frequent_words"

    def __post_init__(self) -> None:
        """Refuse numbers for which there are no prompts."""
        limits = {"keys": _GRID, "values": _GRID, "queries": _GRID, "hops": _GRID - 1, "chains": 100, "common": 100}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be between 1 and {most}, got {getattr(self, name)}")
        if not 1.1 <= self.alpha <= 6.0:
            raise ValueError(f"alpha must be between 1.1 and 6, got {self.alpha}")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a task's sample is drawn with."""

    draw: random.Random
    length: int  # tokens
    difficulty: Difficulty
    text: UserText | None  # None: seeded prose


INTRO_ONE = "A secret code is hidden in the text below. Remember it: you will be asked for it.\n\n"
INTRO_SOME = "Secret codes are hidden in the text below. Remember them: you will be asked for some of them.\n\n"


def _facts(
    haystack: Haystack,
    keys: Sequence[str],
    values: Sequence[str],
    plan: Plan,
    *,
    asked: int = 1,
    lines: bool = False,
    intro: str = INTRO_SOME,
) -> Draft:
    """Facts in a haystack of sentences or of lines; the first `asked` of them are asked for."""
    depths = draw_depths(len(keys), plan.draw)
    plan.draw.shuffle(depths)
    lead = "\n" if lines else " "
    needles = [
        (depth, lead + statement(key, value).strip()) for depth, key, value in zip(depths, keys, values, strict=True)
    ]

    def make(size: int) -> Sample:
        context, places = haystack.around(size, needles)
        return Sample(
            intro, context, fact_question(keys[:asked]),
            fact_cue(keys[0]), tuple(values[:asked]), fact_reply(keys[:asked], values[:asked]), places[:asked], size,
        )  # fmt: skip

    return Draft(make)


def _single_noise(plan: Plan) -> Draft:
    return _facts(noise(), draw_keys(1, plan.draw), draw_numbers(1, plan.draw), plan, lines=True, intro=INTRO_ONE)


def _single_text(plan: Plan) -> Draft:
    keys, values = draw_keys(1, plan.draw, plan.text), draw_numbers(1, plan.draw, plan.text)
    return _facts(prose(plan.draw, plan.text), keys, values, plan, intro=INTRO_ONE)


def _single_hex(plan: Plan) -> Draft:
    keys = draw_keys(1, plan.draw, plan.text)
    return _facts(prose(plan.draw, plan.text), keys, [draw_hex(plan.draw)], plan, intro=INTRO_ONE)


def _multi_key(plan: Plan) -> Draft:
    count = plan.difficulty.keys
    keys, values = draw_keys(count, plan.draw, plan.text), draw_numbers(count, plan.draw, plan.text)
    return _facts(prose(plan.draw, plan.text), keys, values, plan)


def _multi_query(plan: Plan) -> Draft:
    count = plan.difficulty.queries
    keys, values = draw_keys(count, plan.draw, plan.text), draw_numbers(count, plan.draw, plan.text)
    return _facts(prose(plan.draw, plan.text), keys, values, plan, asked=count)


def _multi_key_haystack(plan: Plan) -> Draft:
    """The haystack consists of facts of the same form: keys of three words, for there must be very many."""
    draw = random.Random(plan.draw.getrandbits(64))
    keys: set[str] = set()
    values: set[str] = set()

    def fact() -> tuple[str, str]:
        if len(keys) > _MOST_DRAWN:
            raise ValueError(f"no more than {_MOST_DRAWN} facts have different keys: choose a shorter length")
        while True:
            first, second = draw.sample(KEY_ADJECTIVES, 2)
            key = f"{first} {second} {draw.choice(KEY_NOUNS)}"
            value = str(draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
            if key not in keys and value not in values:
                keys.add(key)
                values.add(value)
                return key, value

    key, value = fact()
    facts = (f"\n{statement(*fact()).strip()}" for _ in itertools.repeat(None))
    return _facts(Haystack(facts), [key], [value], plan, lines=True)


def _multi_key_hex(plan: Plan) -> Draft:
    draw = random.Random(plan.draw.getrandbits(64))  # 128 bits each: no two are the same
    facts = (f"\n{statement(draw_hex(draw), draw_hex(draw)).strip()}" for _ in itertools.repeat(None))
    return _facts(Haystack(facts), [draw_hex(plan.draw)], [draw_hex(plan.draw)], plan, lines=True)


def _multi_value(plan: Plan) -> Draft:
    count = plan.difficulty.values
    (key,) = draw_keys(1, plan.draw, plan.text)
    values = draw_numbers(count, plan.draw, plan.text)
    haystack = prose(plan.draw, plan.text)
    needles = [
        (depth, f" One of the secret codes of the {key} is {value}.")
        for depth, value in zip(draw_depths(count, plan.draw), values, strict=True)
    ]

    def make(size: int) -> Sample:
        context, places = haystack.around(size, needles)
        return Sample(
            INTRO_SOME, context, f" Question: What are all the secret codes of the {key}?",
            f" Answer: The secret codes of the {key} are", tuple(values), f" {_listed(values)}.", places, size,
        )  # fmt: skip

    return Draft(make)


def _assignments(value: str, names: Sequence[str]) -> list[str]:
    """A chain: the first name is set to the value, each following one to the name before it."""
    return [f"\nLet {name} be {before}." for name, before in zip(names, (value, *names), strict=False)]


def _variables_asked(value: str) -> tuple[str, str]:
    return (
        f"\nQuestion: Which variables are {value}, directly or through other variables? Name all of them.",
        f" Answer: The variables that are {value} are",
    )


def _variable_tracking(plan: Plan) -> Draft:
    draw, count = plan.draw, plan.difficulty.hops + 1
    shown, *values = draw_numbers(plan.difficulty.chains + 1, draw, digits=5)
    names = _draw_names(plan.difficulty.chains * count, draw, 5, string.ascii_uppercase)
    chains = [names[start : start + count] for start in range(0, len(names), count)]
    needles = []
    for value, chain in zip(values, chains, strict=True):
        needles += list(zip(draw_depths(count, draw), _assignments(value, chain), strict=True))
    # one question answered, so that a model without training on instructions knows what is asked for
    example = _draw_names(count, draw, 3, string.ascii_uppercase)
    line = f"\n{_NOISE.strip()}"
    told = "".join(line + each for each in _assignments(shown, example))
    asked, cue = _variables_asked(shown)
    task = "Below, variables are set, to numbers or to other variables. Remember them: you will be asked for some."
    intro = f"{task}{told}{line}{asked}{cue} {_listed(example)}.\n\n{task}"
    haystack = noise()
    asked, cue = _variables_asked(values[0])

    def make(size: int) -> Sample:
        context, places = haystack.around(size, needles)
        wanted = tuple(chains[0])
        return Sample(intro, context, asked, cue, wanted, f" {_listed(wanted)}.", places[:count], size)

    return Draft(make)


def _words_asked(common: int) -> tuple[str, str]:
    return (
        f"\nQuestion: Which {common} words stand most often in the list above?",
        f" Answer: The {common} words that stand most often in the list above are:",
    )


def _common_words(plan: Plan) -> Draft:
    """A few words stand often in a numbered list, very many stand in it a few times."""
    draw, count = plan.draw, plan.difficulty.common
    often, seldom = (30, 3) if plan.length >= _FROM_HERE_FULL_LISTS else (6, 1)
    taken: set[str] = set()
    wanted = tuple(_draw_spoken(draw, taken) for _ in range(count))
    shown = [_draw_spoken(draw, taken) for _ in range(9)]
    order = random.Random(draw.getrandbits(64))
    example = _numbered(shown[:3] * 4 + shown[3:], order)
    asked, cue = _words_asked(3)
    task = "Below is a numbered list of words, in which some stand more often than others. Remember those.\n"
    intro = f"{task}{''.join(example)}{asked}{cue}{''.join(_numbered(shown[:3], order))}\n\n{task}"
    seed = draw.getrandbits(64)
    stream = random.Random(draw.getrandbits(64))
    others: list[str] = []
    asked, cue = _words_asked(count)

    def make(size: int) -> Sample:
        while len(others) < size:
            others.append(_draw_spoken(stream, taken))
        context = _numbered([*wanted * often, *others[:size] * seldom], random.Random(seed))
        reply = "".join(f" {n}. {word}" for n, word in enumerate(wanted, 1))
        return Sample(intro, context, asked, cue, wanted, reply, size=size)

    return Draft(make, least=5)


def _numbered(words: Sequence[str], order: random.Random) -> tuple[str, ...]:
    """A shuffled list with numbers."""
    return tuple(f" {n}. {word}" for n, word in enumerate(order.sample(words, len(words)), 1))


def zeta(alpha: float) -> float:
    """Riemann's zeta function of a real number above 1 (Euler and Maclaurin, good to nine digits)."""
    n = 50
    head = sum(math.pow(k, -alpha) for k in range(1, n))
    return head + math.pow(n, 1 - alpha) / (alpha - 1) + math.pow(n, -alpha) * (0.5 + alpha / n / 12)


def _frequent_words(plan: Plan) -> Draft:
    """Coded words, the k-th of which stands size / (k ** alpha * zeta(alpha)) times; the first is only dots."""
    draw, alpha = plan.draw, plan.difficulty.alpha
    words = ["......", *_draw_names(max(8, plan.length // 50), draw, 6, string.ascii_lowercase)]
    wanted = tuple(words[1:4])
    shares = [math.pow(rank, -alpha) / zeta(alpha) for rank in range(1, len(words) + 1)]
    seed = draw.getrandbits(64)
    task = (
        "Below are coded words and dots, some of them many times. Ignore the dots. Remember the three coded words that "
        "stand most often.\n"
    )

    def make(size: int) -> Sample:
        counts = [int(size * share) for share in shares]
        text = [f" {word}" for word, count in zip(words, counts, strict=True) for _ in range(count)]
        random.Random(seed).shuffle(text)
        return Sample(
            task, tuple(text), "\nQuestion: Which three coded words stand most often in the text above?",
            " Answer: The three coded words that stand most often in the text above are:", wanted,
            f" {_listed(wanted)}.", size=size,
        )  # fmt: skip

    # from here on the fourth stands more often than the fifth, whatever is rounded
    return Draft(make, least=int(1 / (shares[3] - shares[4])) + 1)


TASKS: dict[str, Callable[[Plan], Draft]] = {
    "single_noise": _single_noise,
    "single_text": _single_text,
    "single_hex": _single_hex,
    "multi_key": _multi_key,
    "multi_key_haystack": _multi_key_haystack,
    "multi_key_hex": _multi_key_hex,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
"""RULER's tasks that need no data, in its order: its two QA tasks are missing."""

TEXT_TASKS = ("single_text", "single_hex", "multi_key", "multi_value", "multi_query")
"""Those whose haystack is prose, or a user's text."""

NEW_TOKENS = {
    **dict.fromkeys(TASKS, 128), "variable_tracking": 30, "common_words": 120, "frequent_words": 50,
}  # fmt: skip
"""Tokens that an answer may have, as RULER gives them."""


def draft(
    task: str,
    length: int,
    *,
    seed: int = 1,
    index: int = 0,
    difficulty: Difficulty | None = None,
    text: UserText | None = None,
) -> Draft:
    """Sample `index` of a task at a length, of any size.

    Raises ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    draw = random.Random(f"retrieval/{task}/{seed}/{length}/{index}")
    return TASKS[task](Plan(draw, length, difficulty or Difficulty(), text))


# ---- length


def fitted(make: Callable[[int], Draft], length: int, need: Callable[[Sample], int], what: str) -> Sample:
    """The sample of the largest size that `length` has room for: one unit more, and it needs more.

    Args:
        make: the draft at a length.
        length: tokens.
        need: tokens that a sample takes, with room for its answer.
        what: names the sample in messages.

    Raises:
        ValueError: even the smallest size takes more; the message says at which length it would not.
    """
    chosen = make(length)
    least = need(chosen.make(chosen.least))
    if least > length:
        # every length has a sample of its own, of about the same need
        for longer in range(max(length + 1, least // 2), 64 * least):
            other = make(longer)
            if need(other.make(other.least)) <= longer:
                raise ValueError(
                    f"{what}: {length} tokens are too short, its question and answer alone take {least}: "
                    f"{longer} is the smallest length that works"
                )
        raise ValueError(f"{what}: {length} tokens are too short, and no length works")
    size = largest(lambda n: need(chosen.make(n)), length, chosen.least, what)
    return chosen.make(size)


def largest(need: Callable[[int], int], room: int, least: int, what: str) -> int:
    """A size with need(size) <= room < need(size + 1), where need(least) <= room. Ends for every `need`.

    Guesses along a straight line; where these do not settle it, it doubles and halves.
    """
    most = least + 16 * room + 1024  # a unit takes a token, unless the tokenizer drops it
    low, low_need = least, need(least)
    least_need = low_need
    high: int | None = None
    high_need = step = 0
    for probe in itertools.count():
        if high is not None and high - low <= 1:
            return low
        if high is None:
            slope = (low_need - least_need) / (low - least) if low > least else 0.0
            ahead = int((room - low_need) / slope) + 1 if slope > 0 and probe < 8 else 0
            step = max(ahead, 16 if not probe else 2 * step if probe >= 8 else 2)
            size = low + step
        elif probe < 16:
            size = low + int((room - low_need) * (high - low) / max(1, high_need - low_need))
            size = min(max(size, low + 1), high - 1)
        else:
            size = (low + high) // 2
        taken = need(size)
        if taken <= room:
            low, low_need = size, taken
        else:
            high, high_need = size, taken
        if low > most:
            raise ValueError(f"{what}: the tokenizer turns the haystack into no tokens: it cannot fill {room} of them")
    raise AssertionError("unreachable")
