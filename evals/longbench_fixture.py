"""A few made-up rows for every data set of LongBench: they try out the machinery offline and measure nothing.

Short texts about lighthouses, of our own, seeded: the same on every machine. The stored lengths are made up too, so
that the buckets of LongBench-E are all there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
ROWS = 4
_LENGTHS = (1500, 5000, 9000, 3999)  # as stored; what the texts really have is a hundred words or two

_TOWNS = ("Arbroath", "Bellmere", "Carrow", "Dunmouth", "Eastholm", "Farside", "Gullbay", "Hollin")
_BUILDERS = ("Mira Holt", "Jon Pell", "Ada Crane", "Tom Verity", "Iris Lund", "Ned Marsh", "Una Frey", "Sol Brandt")
_COLOURS = ("red", "white", "green", "grey", "yellow", "black", "blue", "brown")
_TOWNS_ZH = ("青石镇", "白沙镇", "松林镇", "河口镇", "月湾镇", "东岭镇", "云山镇", "竹溪镇")
_BUILDERS_ZH = ("李明", "王芳", "张伟", "刘洋", "陈静", "杨帆", "赵磊", "周敏")
_TREC = ("Person", "Place", "Number", "Colour")
_LSHT = ("天气", "体育", "财经", "交通")

Facts = list[tuple[str, str, str, int]]  # town, builder, colour, year


def fixture_rows(name: str) -> list[Row]:
    """Made-up rows of a set: of LongBench (`hotpotqa`), of E (`hotpotqa_e`) or of version 2 (`longbench-v2`)."""
    if name == "longbench-v2":
        return [_version_2(i) for i in range(ROWS)]
    base = name if name in _MAKERS else name.removesuffix("_e")
    return [_version_1(base, i) for i in range(ROWS)]


def _version_1(name: str, number: int) -> Row:
    draw = random.Random(f"{name}/{number}")
    context, question, answers, classes = _MAKERS[name](draw)
    chinese = name in ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
    language = "python" if name in ("lcc", "repobench-p") else "zh" if chinese else "en"
    return {
        "_id": f"fixture-{number}", "input": question, "context": context, "answers": answers,
        "length": _LENGTHS[number], "dataset": name, "language": language, "all_classes": classes,
    }  # fmt: skip


def _version_2(number: int) -> Row:
    draw = random.Random(f"v2/{number}")
    facts = _facts(draw)
    right = draw.randrange(4)
    return {
        "_id": f"fixture-{number}", "domain": "Made-up texts", "sub_domain": "Lighthouses",
        "difficulty": ("easy", "hard")[number % 2], "length": ("short", "medium", "long", "short")[number],
        "question": f"Who built the lighthouse of {facts[right][0]}?",
        **{f"choice_{letter}": fact[1] for letter, fact in zip("ABCD", facts, strict=False)},
        "answer": "ABCD"[right], "context": _prose(draw, facts),
    }  # fmt: skip


Made = tuple[str, str, list[str], list[str] | None]  # context, input, answers, all_classes


def _facts(draw: random.Random) -> Facts:
    colours, builders = draw.sample(_COLOURS, 8), draw.sample(_BUILDERS, 8)
    towns, years = draw.sample(_TOWNS, 8), draw.sample(range(1780, 1930), 8)
    return list(zip(towns, builders, colours, years, strict=True))


def _told(fact: tuple[str, str, str, int]) -> str:
    town, builder, colour, year = fact
    return f"The lighthouse of {town} is {colour}, and {builder} finished it in the year {year}."


def _prose(draw: random.Random, facts: Facts) -> str:
    between = (
        "Nobody in the harbour remembers a winter as long as that one.",
        "The keeper wrote the weather into a book every evening.",
        "Boats from the other side of the bay came in with the tide.",
    )
    return "\n\n".join(f"{_told(fact)} {draw.choice(between)}" for fact in facts)


def _question(draw: random.Random) -> Made:
    facts = _facts(draw)
    town, builder, _, _ = draw.choice(facts)
    return _prose(draw, facts), f"Who built the lighthouse of {town}?", [builder, f"It was {builder}"], None


def _summary(draw: random.Random) -> Made:
    facts = _facts(draw)
    answer = f"Eight lighthouses are described. The oldest dates from {min(fact[3] for fact in facts)}."
    return _prose(draw, facts), "", [answer], None


def _query(draw: random.Random) -> Made:
    context, _, answers, _ = _summary(draw)
    return context, "Summarize what is said about the age of the lighthouses.", answers, None


def _kinds(draw: random.Random) -> Made:
    asked = {"Person": "Who built it?", "Place": "Where does it stand?", "Number": "How high is it?",
             "Colour": "What colour is it?"}  # fmt: skip
    shots = [f"Question: {town}: {asked[kind]}\nType: {kind}" for town in draw.sample(_TOWNS, 4) for kind in _TREC]
    kind = draw.choice(_TREC)
    draw.shuffle(shots)
    return "\n".join(shots), f"Question: {draw.choice(_TOWNS)}: {asked[kind]}\nType:", [kind], list(_TREC)


def _trivia(draw: random.Random) -> Made:
    facts = _facts(draw)
    shots = [
        f"Passage:\n{_told(f)}\nQuestion:\nIn which town is the {f[2]} lighthouse?\nAnswer:\n{f[0]}" for f in facts
    ]
    last = draw.choice(facts)
    asked = f"Passage:\n{_told(last)}\nQuestion:\nWho finished it?\nAnswer:"
    return "\n\n".join(shots), asked, [last[1]], None


def _dialogue(draw: random.Random) -> Made:
    first, second = draw.sample(_BUILDERS, 2)
    shots = [
        f"Dialogue: {a}: Is the lamp lit?\n{b}: Not yet, I am on the stairs.\nSummary: {b} will light the lamp soon."
        for a, b in zip(_BUILDERS, reversed(_BUILDERS), strict=True)
    ]
    asked = f"Dialogue: {first}: Can you bring oil?\n{second}: Yes, tomorrow.\nSummary:"
    return "\n\n".join(shots), asked, [f"{second} will bring oil to {first} tomorrow."], None


def _counted(draw: random.Random) -> Made:
    facts = _facts(draw)[: draw.randint(3, 7)]
    told = [_told(fact) for fact in facts] + [_told(draw.choice(facts)) for _ in range(3)]
    draw.shuffle(told)
    context = "\n\n".join(f"Paragraph {i}: {text}" for i, text in enumerate(told, 1))
    return context, "", [str(len(facts))], None


def _retrieved(draw: random.Random) -> Made:
    facts = _facts(draw)
    i = draw.randrange(len(facts))
    context = "\n\n".join(f"Paragraph {n}: {_told(fact)}" for n, fact in enumerate(facts, 1))
    return context, f"A lighthouse that {facts[i][1]} built, {facts[i][2]} in colour.", [f"Paragraph {i + 1}"], None


def _code(draw: random.Random) -> tuple[str, str]:
    """A function without its last line, and that line."""
    name, first, second = draw.sample(("height", "radius", "flashes", "period", "oil", "range_"), 3)
    text = f"def {name}({first}: float, {second}: float) -> float:\n    total = {first} + {second}\n"
    return text, f"    return total * {draw.randint(2, 9)}"


def _completed(draw: random.Random) -> Made:
    others = ["{}{}\n".format(*_code(draw)) for _ in range(4)]
    text, line = _code(draw)
    return "\n".join([*others, text]), "", [line], None


def _repository(draw: random.Random) -> Made:
    others = [f"Path: lamps/part_{i}.py\n" + "{}{}\n".format(*_code(draw)) for i in range(4)]
    text, line = _code(draw)
    return "\n".join(others), f"Path: lamps/main.py\n{text}", [line], None


def _facts_zh(draw: random.Random) -> list[tuple[str, str, int]]:
    towns, builders = draw.sample(_TOWNS_ZH, 8), draw.sample(_BUILDERS_ZH, 8)
    return list(zip(towns, builders, draw.sample(range(1880, 1990), 8), strict=True))


def _told_zh(fact: tuple[str, str, int]) -> str:
    return f"{fact[0]}的灯塔由{fact[1]}设计，{fact[2]}年建成，每天傍晚开始照明。"


def _question_zh(draw: random.Random) -> Made:
    facts = _facts_zh(draw)
    town, builder, year = draw.choice(facts)
    return (
        "\n".join(map(_told_zh, facts)),
        f"{town}的灯塔是谁设计的？",
        [f"{builder}设计", f"由{builder}于{year}年设计"],
        None,
    )


def _summary_zh(draw: random.Random) -> Made:
    facts = _facts_zh(draw)
    spoken = [f"发言人{i}：{_told_zh(fact)}" for i, fact in enumerate(facts, 1)]
    return "\n".join(spoken), "", [f"会议介绍了八座灯塔，最早的一座建于{min(f[2] for f in facts)}年。"], None


def _kinds_zh(draw: random.Random) -> Made:
    news = {"天气": "明天有大雨，请带好雨伞。", "体育": "球队昨晚赢得了比赛。", "财经": "股市今天小幅上涨。",
            "交通": "新的地铁线路下周开通。"}  # fmt: skip
    shots = [f"新闻内容：{town}消息，{news[kind]}\n类别：{kind}" for town in _TOWNS_ZH[:4] for kind in _LSHT]
    draw.shuffle(shots)
    kind = draw.choice(_LSHT)
    return "\n".join(shots), f"新闻内容：{draw.choice(_TOWNS_ZH[4:])}消息，{news[kind]}\n类别：", [kind], list(_LSHT)


def _retrieved_zh(draw: random.Random) -> Made:
    facts = _facts_zh(draw)
    i = draw.randrange(len(facts))
    context = "\n\n".join(f"段落{n}：{_told_zh(fact)}" for n, fact in enumerate(facts, 1))
    return context, f"{facts[i][1]}设计的灯塔在{facts[i][2]}年建成。", [f"段落{i + 1}"], None


_MAKERS: dict[str, Callable[[random.Random], Made]] = {
    "narrativeqa": _question, "qasper": _question, "multifieldqa_en": _question, "multifieldqa_zh": _question_zh,
    "hotpotqa": _question, "2wikimqa": _question, "musique": _question, "dureader": _question_zh,
    "gov_report": _summary, "qmsum": _query, "multi_news": _summary, "vcsum": _summary_zh, "trec": _kinds,
    "triviaqa": _trivia, "samsum": _dialogue, "lsht": _kinds_zh, "passage_count": _counted,
    "passage_retrieval_en": _retrieved, "passage_retrieval_zh": _retrieved_zh, "lcc": _completed,
    "repobench-p": _repository,
}  # fmt: skip
