"""Reads a report page as a browser would, and checks what every page has to be."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "col"}
CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Page(HTMLParser):
    """A page's tags, ids, references and visible text.

    Attributes:
        sections: The ids of the sections, in order.
        texts: By section id, its visible text; "" is the head of the page.
        images: By section id, how many pictures have data.
    """

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.references, self.policy = [], [], [], None
        self.sections, self.texts, self.images = [], {"": ""}, {"": 0}
        self.contents, self.tables, self.unnamed = [], 0, []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if "id" in named:
            self.ids.append(named["id"])
        self.references += [
            (name, value)
            for name, value in attributes
            if name.rpartition(":")[2] in ("src", "href")
        ]
        if tag == "meta" and named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]
        if tag == "section":
            self.sections.append(named["id"])
            self.texts[named["id"]], self.images[named["id"]] = "", 0
        if tag == "a" and "nav" in self.open:
            self.contents.append(named["href"])
        if tag == "img":
            self.images[self.place] += 1
            self.unnamed += [] if named.get("alt") else [tag]
        if tag == "svg":
            self.unnamed += [] if named.get("aria-label") and named.get("role") == "img" else [tag]
        if tag == "th":
            self.unnamed += [] if named.get("scope") in ("col", "row") else [tag]
        self.tables += tag == "table"
        self.texts[self.place] += "" if tag in ("b", "i", "code", "small", "a") else " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if not {"style", "script", "pre"} & set(self.open):
            self.texts[self.place] += data

    @property
    def place(self):
        """The section that is being read."""
        return self.sections[-1] if "section" in self.open else ""

    @property
    def text(self):
        """All visible text, on one line."""
        return " ".join(" ".join(self.texts.values()).split())


def check_page(html):
    """Parse a page and check what holds for every report."""
    page = Page(html)
    assert page.policy is not None
    assert page.policy.startswith(CSP)
    assert len(page.ids) == len(set(page.ids)), "an id is there twice"
    assert page.contents == [f"#{section}" for section in page.sections]
    for _, value in page.references:
        local = value.startswith("#") and value[1:] in page.ids
        assert local or value == "trace.json" or value.startswith("data:image/jpeg;base64,"), value
    assert all(one[1:] in page.ids for one in re.findall(r"url\((#[^)]*)\)", html))
    assert not re.search(r"url\((?!#)|@import|<script|\son\w+=", html)
    assert page.unnamed == []
    assert html.count("<caption>") == page.tables
    assert not re.search(r"\b(None|nan|NaN|Undefined|inf)\b", page.text), page.text
    assert len(html) < 5_000_000
    return page
