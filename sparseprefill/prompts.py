"""Seeded prompts: plain prose to hide things in, and needles with questions all along the prompt.

Nothing here needs torch or a model. A prompt is a list of token ids made with the encoder you pass, so the
positions of every answer are known exactly and no text has to be searched for afterwards.

Every draw comes from a generator seeded by `f"{seed}/{index}"`: prompt *i* is the same whatever was made before it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Encode = Callable[[str], list[int]]
"""Token ids of a text, without special tokens."""

KEY_ADJECTIVES = (
    "amber", "ancient", "blue", "bold", "bright", "brown", "calm", "clever", "cold", "copper", "dark", "deep",
    "distant", "dry", "early", "empty", "faint", "gentle", "golden", "grand", "green", "grey", "heavy", "hidden",
    "hollow", "idle", "iron", "late", "little", "lonely", "loud", "narrow", "northern", "old", "pale", "patient",
    "plain", "proud", "purple", "quiet", "red", "rough", "round", "silent", "silver", "simple", "slow", "small",
    "smooth", "southern", "steep", "strange", "tall", "thin", "warm", "white", "wide", "wild", "wooden", "young",
)  # fmt: skip
"""First words of a needle's key."""

KEY_NOUNS = (
    "anchor", "apple", "arrow", "badger", "barrel", "basket", "bell", "boat", "bridge", "bucket", "button", "candle",
    "castle", "chair", "cherry", "clock", "cloud", "coat", "crow", "desk", "door", "dragon", "drum", "eagle", "engine",
    "falcon", "feather", "fiddle", "flag", "forest", "fountain", "fox", "garden", "gate", "glove", "hammer", "harbour",
    "hat", "horse", "island", "kettle", "key", "kite", "ladder", "lamp", "lantern", "letter", "lion", "mirror",
    "mountain", "orchard", "otter", "owl", "paper", "pepper", "piano", "pillow", "pond", "rabbit", "raven", "river",
    "road", "robin", "rose", "saddle", "sail", "shell", "ship", "spoon", "stone", "table", "tower", "train", "tree",
    "trumpet", "tunnel", "valley", "violin", "wagon", "wheel", "whistle", "willow", "window", "wolf",
)  # fmt: skip
"""Second words of a needle's key."""

_PEOPLE = (
    "Ada", "Bruno", "Clara", "Daniel", "Edith", "Felix", "Greta", "Henry", "Ines", "Jonas", "Karin", "Leo", "Marta",
    "Nils", "Olga", "Paul", "Rosa", "Simon", "Tilda", "Victor", "the baker", "the captain", "the carpenter",
    "the doctor", "the farmer", "the gardener", "the judge", "the miller", "the painter", "the sailor", "the shepherd",
    "the teacher", "the traveller", "the watchman", "the weaver", "her brother", "his aunt", "an old friend",
    "the youngest of the cousins", "the woman from the inn",
)  # fmt: skip
_PLACES = (
    "the market", "the harbour", "the old mill", "the chapel", "the edge of the wood", "the long field", "the station",
    "the kitchen", "the schoolhouse", "the river bank", "the upper road", "the village square", "the library",
    "the workshop", "the orchard", "the lighthouse", "the town hall", "the stable", "the garden wall", "the quarry",
    "a small inn", "the far side of the hill", "the bridge", "the courtyard", "the attic",
)  # fmt: skip
_THINGS = (
    "a letter", "the map", "a basket of apples", "the broken clock", "a bundle of wool", "the ledger", "a lantern",
    "two loaves of bread", "the spare key", "a jar of honey", "the saddle", "an umbrella", "the wooden box",
    "a pair of boots", "the rope", "a sack of flour", "the violin", "a bottle of ink", "the newspaper", "a blanket",
    "the fishing net", "a handful of nails", "the kettle", "a folded coat", "the ladder", "some firewood",
)  # fmt: skip
_DID = (
    "carried", "looked for", "mended", "forgot", "borrowed", "found", "hid", "brought", "cleaned", "sold", "packed",
    "returned", "weighed", "painted", "dropped", "wrapped", "asked about", "counted", "kept", "lost", "measured",
)  # fmt: skip
_WENT = (
    "walked", "hurried", "rode", "wandered", "drove", "climbed", "returned", "strolled", "set out", "was sent", "ran",
    "came back", "found the way", "turned", "stopped", "waited",
)  # fmt: skip
_WHEN = (
    "in the morning", "before noon", "after the rain", "late in the evening", "on the first warm day", "at dusk",
    "during the harvest", "when the bells rang", "before anyone else was awake", "a week later", "that same night",
    "at the end of the summer", "in the middle of winter", "while the others slept", "on market day",
    "not long afterwards", "once the guests had left", "as soon as the snow melted",
)  # fmt: skip
_FELT = (
    "tired", "cheerful", "uneasy", "curious", "hungry", "proud", "rather cold", "out of breath", "grateful", "puzzled",
    "determined", "impatient", "content", "a little ashamed", "wide awake", "lost in thought", "surprised",
)  # fmt: skip
_WEATHER = (
    "The wind had turned to the north", "A thin fog lay over the fields", "The sky was clear and pale",
    "It had rained since dawn", "Snow covered the roofs", "The air smelled of cut grass", "The sun stood low",
    "Thunder could be heard far away", "Frost had drawn flowers on the windows", "The heat kept everyone indoors",
)  # fmt: skip
_SAID = (
    "nothing would change before spring", "the road was no longer safe", "it was better to wait",
    "the price of salt had doubled", "there was room for one more", "the boat would not sail",
    "somebody had been there already", "the old rules still held", "a promise was a promise",
    "the work could be finished in a day", "nobody would believe the story", "the bread was still warm",
    "the letter must have been delayed", "everything had its season", "the well was deeper than it looked",
    "they ought to ask the neighbours", "the choice had been made long ago",
)  # fmt: skip
_VERB_SAID = ("said that", "was sure that", "had heard that", "wrote that", "insisted that", "doubted whether")
_LINKS = ("and", "but", "so", "while", "because", "although", "until")


class Prose:
    """An endless stream of plain sentences with no digits in them, the same for the same seed.

    Each sentence starts with a space, so that sentences may be encoded one by one and joined.
    """

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(f"prose/{seed}")

    def sentence(self) -> str:
        draw = self._random
        pick = draw.choice
        adjective, noun = pick(KEY_ADJECTIVES), pick(KEY_NOUNS)
        match draw.randrange(9):
            case 0:
                body = f"{pick(_PEOPLE)} {pick(_DID)} {pick(_THINGS)} near {pick(_PLACES)} {pick(_WHEN)}"
            case 1:
                body = (
                    f"{pick(_PEOPLE)} {pick(_WENT)} to {pick(_PLACES)} {pick(_LINKS)} {pick(_PEOPLE)} {pick(_DID)} "
                    f"{pick(_THINGS)}"
                )
            case 2:
                body = f"{pick(_PEOPLE)} {pick(_VERB_SAID)} {pick(_SAID)}"
            case 3:
                body = f"{pick(_WEATHER)}, {pick(_LINKS)} {pick(_PEOPLE)} was {pick(_FELT)}"
            case 4:
                body = f"{pick(_WHEN)}, {pick(_PEOPLE)} {pick(_WENT)} past the {adjective} {noun} to {pick(_PLACES)}"
            case 5:
                body = (
                    f"there was a {adjective} {noun} behind {pick(_PLACES)}, {pick(_LINKS)} {pick(_PEOPLE)} had never "
                    f"seen it"
                )
            case 6:
                body = f"{pick(_PEOPLE)} and {pick(_PEOPLE)} {pick(_WENT)} to {pick(_PLACES)} {pick(_WHEN)}"
            case 7:
                body = (
                    f"{pick(_WHEN)} {pick(_PEOPLE)} {pick(_DID)} {pick(_THINGS)}, {pick(_LINKS)} {pick(_PEOPLE)} "
                    f"{pick(_VERB_SAID)} {pick(_SAID)}"
                )
            case _:
                body = (
                    f"the {noun} of {pick(_PEOPLE)} was {adjective}, {pick(_LINKS)} nobody asked for it {pick(_WHEN)}"
                )
        return f" {body[0].upper()}{body[1:]}."

    def __iter__(self) -> Iterator[str]:
        while True:
            yield self.sentence()


def prose_ids(encode: Encode, length: int, seed: int | str) -> list[int]:
    """The first `length` tokens of `Prose(seed)`, encoded sentence by sentence.

    Raises ValueError for an encoder that turns sentences into no tokens.
    """
    return [token for ids in _filled(encode, length, iter(Prose(seed))) for token in ids]


def text_sentences(text: str) -> list[str]:
    """Cut a text into sentences that start with a space, white space folded; joined they read as the text did."""
    sentences: list[str] = []
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if word.rstrip("\"')_").endswith((".", "!", "?")):
            sentences.append(" " + " ".join(words))
            words = []
    if words:
        sentences.append(" " + " ".join(words))
    return sentences


@dataclass(frozen=True, slots=True)
class ProfilePrompt:
    """A prompt that heads are scored on. Raises ValueError without a name or without a token."""

    name: str  # unique among all that are scored together, as in "needle/8192/0"
    token_ids: Sequence[int]  # special tokens included

    def __post_init__(self) -> None:
        if not self.name or not len(self.token_ids):
            raise ValueError(f"a prompt needs a name and at least one token, {self.name!r} has {len(self.token_ids)}")


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact: the secret code of a named key."""

    key: str  # two words
    number: str  # its code, 5 to 7 digits

    @property
    def statement(self) -> str:
        return f" The secret code of the {self.key} is {self.number}."

    @property
    def question(self) -> str:
        """Question and the start of its answer; the number comes next."""
        return (
            f" Question: What is the secret code of the {self.key}?"
            f" Answer: The secret code of the {self.key} is"
        )  # fmt: skip

    @property
    def answer(self) -> str:
        return f" {self.number}"


def draw_needles(count: int, draw: random.Random) -> list[Needle]:
    """`count` needles, no two of which share a word of their key or the number; 5 to 7 digits each.

    Raises ValueError where `count` is larger than the word lists allow.
    """
    limit = min(len(KEY_ADJECTIVES), len(KEY_NOUNS))
    if not 1 <= count <= limit:
        raise ValueError(f"needles must be between 1 and {limit}, got {count}")
    adjectives = draw.sample(KEY_ADJECTIVES, count)
    nouns = draw.sample(KEY_NOUNS, count)
    numbers: list[str] = []
    while len(numbers) < count:
        digits = draw.choice((5, 6, 7))
        number = str(draw.randrange(10 ** (digits - 1), 10**digits))
        if number not in numbers:
            numbers.append(number)
    return [Needle(f"{a} {n}", number) for a, n, number in zip(adjectives, nouns, numbers, strict=True)]


@dataclass(frozen=True, slots=True)
class Answer:
    """Where one answer stands in a prompt: tokens [start, stop) must be predicted from those before them."""

    needle: Needle  # the fact that is asked for
    part: int  # of the haystack's equal parts, which one the needle stands in
    depth: float  # of the needle, 0 = start of the prompt, 1 = its end
    asked: float  # where the question stands, on the same scale
    start: int  # first token of the answer
    stop: int  # one past its last


@dataclass(frozen=True, slots=True)
class NeedlePrompt:
    """A prompt with needles, with questions placed all along it and their answers written behind them."""

    token_ids: list[int]  # prompt and answers
    answers: list[Answer]  # by position; the last one ends the prompt


def needle_prompt(
    encode: Encode,
    length: int,
    *,
    seed: int,
    index: int = 0,
    needles: int = 5,
    haystack: Sequence[str] | None = None,
    prefix: Sequence[int] = (),
) -> NeedlePrompt:
    """A prompt of exactly `length` tokens that states `needles` facts and asks for each of them once.

    Needle k stands somewhere in the k-th of `needles` equal parts of the haystack (stratified depths). Each question
    stands behind its needle, uniformly up to the end; one of them, drawn at random, closes the prompt. Every fact is
    one of `needles`, so each question has `needles - 1` distractors of its own form.

    Args:
        encode: text to token ids, no special tokens added. Pieces are encoded alone and joined.
        length: tokens in all, `prefix` included. ValueError where the needles alone do not fit.
        seed, index: which prompt.
        haystack: sentences to hide the needles in (starting at a random one, cyclic); None for `Prose`.
        prefix: ids every prompt starts with (a BOS token).
    """
    draw = random.Random(f"needle/{seed}/{index}")
    facts = draw_needles(needles, draw)
    statements = [encode(fact.statement) for fact in facts]
    questions = [encode(fact.question) for fact in facts]
    replies = [encode(fact.answer) for fact in facts]
    fixed = len(prefix) + sum(map(len, statements)) + sum(map(len, questions)) + sum(map(len, replies))
    room = length - fixed
    if room < 0:
        raise ValueError(f"{length=} is too short: {needles} needles and their questions alone take {fixed} tokens")

    sentences = _fill(encode, room, haystack, draw)
    edges = [0]  # tokens before the n-th sentence
    for ids in sentences:
        edges.append(edges[-1] + len(ids))

    # a place is a number of whole sentences: pieces never cut one
    places = [_sentence_at(edges, (k + draw.random()) / needles * room) for k in range(needles)]
    last = draw.randrange(needles)
    asked_at = []
    for k in range(needles):
        target = edges[places[k]] + draw.random() * (room - edges[places[k]])
        asked_at.append(len(sentences) if k == last else max(places[k], _sentence_at(edges, target)))

    # at one place: statements before questions, and the closing question last of all
    events = [(places[k], 0, k) for k in range(needles)]
    events += [(asked_at[k], 2 if k == last else 1, k) for k in range(needles)]
    events.sort()

    token_ids = list(prefix)
    stated: dict[int, int] = {}
    answers: list[Answer] = []
    done = 0
    for place, kind, k in events:
        for ids in sentences[done:place]:
            token_ids += ids
        done = place
        if kind == 0:
            stated[k] = len(token_ids)
            token_ids += statements[k]
            continue
        asked = len(token_ids)
        token_ids += questions[k]
        start = len(token_ids)
        token_ids += replies[k]
        answers.append(Answer(facts[k], k, stated[k] / length, asked / length, start, len(token_ids)))
    return NeedlePrompt(token_ids, answers)


def _sentence_at(edges: Sequence[int], offset: float) -> int:
    """The last sentence boundary at or before a token offset."""
    low, high = 0, len(edges) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if edges[middle] <= offset else (low, middle - 1)
    return low


def _fill(encode: Encode, room: int, haystack: Sequence[str] | None, draw: random.Random) -> list[list[int]]:
    """Encoded sentences of exactly `room` tokens in all; only the last one may be cut."""
    if haystack is None:
        stream = iter(Prose(draw.getrandbits(64)))
    else:
        if not any(sentence.strip() for sentence in haystack):
            raise ValueError("the haystack is empty: give it at least one sentence")
        stream = _cycle(haystack, draw.randrange(len(haystack)))
    return _filled(encode, room, stream)


def _filled(encode: Encode, room: int, stream: Iterator[str]) -> list[list[int]]:
    """The same, of these sentences."""
    sentences: list[list[int]] = []
    empty = 0
    while room > 0:
        ids = encode(next(stream))[:room]
        if not ids:
            empty += 1
            if empty > 1000:
                raise ValueError("the encoder turns the haystack into no tokens at all")
            continue
        sentences.append(ids)
        room -= len(ids)
    return sentences


def _cycle(haystack: Sequence[str], first: int) -> Iterator[str]:
    while True:
        for step in range(len(haystack)):
            yield haystack[(first + step) % len(haystack)]
