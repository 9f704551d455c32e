"""Plain text of Wikipedia articles from a shortened dump (``gensim`` carries one as test data)."""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from flexgen_bench.accuracy.data.rows import Rows, ordered

_PAGE = re.compile(r"<page>.*?</page>", re.DOTALL)
# A template or a table that holds no other: taken out from the inside to the outside.
_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_ENDS = re.compile(
    r"^==\s*(See also|References|External links|Further reading|Notes|Bibliography|Sources|Footnotes|Citations|Works "
    r"cited)\s*==",
    re.M,
)
_RULES = (
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"<ref[^>]*/>|<ref\b.*?</ref>", re.DOTALL), ""),
    (re.compile(r"<(math|gallery|timeline|code|source|score)\b.*?</\1>", re.DOTALL), ""),
)
_LINKED_FILE = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", re.I)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_WEB = re.compile(r"\[https?://\S+\s*([^\]]*)\]")
_SENTENCE = re.compile(r"[.!?][\"')]*$")


def read(folder: Path, *, longest: int, shortest: int) -> Rows:
    """Articles, cut between paragraphs into pieces of ``shortest`` to ``longest`` characters. subject: the article."""
    rows = []
    for path in sorted(folder.rglob("*.bz2")):
        for title, source in _articles(bz2.decompress(path.read_bytes()).decode("utf-8")):
            for piece in _pieces(article_text(source), longest):
                if len(piece) >= shortest:
                    rows.append({"subject": title, "text": piece})
    return {"test": ordered(rows)}


def article_text(source: str) -> str:
    """What a reader of the article reads: paragraphs of sentences. Markup, tables, lists, notes and what follows the
    text are gone."""
    for pattern, replacement in _RULES:
        source = pattern.sub(replacement, source)
    source = _exhaust(_INNERMOST, source)
    source = _exhaust(_LINKED_FILE, source)
    source = _exhaust(_LINK, source, r"\1")
    source = _WEB.sub(r"\1", source)
    ends = _ENDS.search(source)
    source = source[: ends.start()] if ends else source
    source = re.sub(r"'{2,}|<[^>]+>|__[A-Z]+__", "", source)
    lines = (" ".join(html.unescape(line).split()) for line in source.splitlines())
    kept = [line for line in lines if _SENTENCE.search(line) and line[:1] not in "*#:;|!=&{}["]
    # What a template said is missing; what it leaves behind is not.
    return "\n\n".join(re.sub(r"\s*\(\s*[,;]*\s*\)|\s+(?=[,.;:])", "", line) for line in kept)


def _exhaust(pattern: re.Pattern[str], text: str, replacement: str = "") -> str:
    while True:
        text, count = pattern.subn(replacement, text)
        if not count:
            return text


def _articles(dump: str) -> Iterator[tuple[str, str]]:
    # The dump is cut short: it is no well-formed document, its pages are.
    for page in _PAGE.findall(dump):
        root = ElementTree.fromstring(page)
        source = root.findtext("revision/text") or ""
        if root.findtext("ns") == "0" and not source.lower().lstrip().startswith("#redirect"):
            yield root.findtext("title") or "", source


def _pieces(text: str, longest: int) -> Iterator[str]:
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + 2 + len(paragraph) > longest:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        if len(piece) > longest:
            piece = ""  # A single paragraph that is longer than a piece may be.
    if piece:
        yield piece
