"""What a browser would make of a page, and a text that means harm."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "</dd></article><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
    "| a | `b` | **c** \n\n# heading\r\n```\n$x_1$ {{ 7 * 7 }} {% raw %} &amp; "
    "\x00\x07\x1b[31m\x85\x9b\u202eevil\u2066 \u200f\ud800\udfff\ufffe\u2028 --> ]]> ' \" \\ <!--"
)


class Page(HTMLParser):
    """What a browser would make of a page, as far as these tests ask; complains about tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"{self.open} not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """All words of the page in one line."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]
