"""Pages read as a browser reads them."""

from html.parser import HTMLParser

PLANTED = "\"'></title></style><script>alert(1)</script><img src=x onerror=alert(1)>\udcff"


class Page(HTMLParser):
    """The elements of a page, the names of their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data

    def is_closed_to(self, planted: str) -> bool:
        """Whether `planted` is in it as text alone, and no script is, nor could one run."""
        shown = planted.encode("utf-8", "replace").decode()
        policy = next(iter(self.attributes.get("content", [])), "")
        runs = "script" in self.tags or any(name.startswith("on") for name in self.attributes)
        return shown in self.text and not runs and policy.startswith("default-src 'none'")
