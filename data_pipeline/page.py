"""The pages that people open: the one place where text becomes HTML."""

import html

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22252c; max-width: 1060px; margin: 40px auto; padding: 0 20px; }
h1 { font-size: 28px; margin-bottom: 4px; } h2 { font-size: 20px; margin: 40px 0 6px; }
.faint, figcaption { color: #767b88; font-size: 13px; }
svg, video, img { max-width: 100%; height: auto; border-radius: 8px; }
figure { display: inline-block; margin: 0 8px 12px 0; } figure img, figure video { display: block; }
table { border-collapse: collapse; margin: 12px 0; } td, th { padding: 3px 18px 3px 0; text-align: left; }
td { font-variant-numeric: tabular-nums; }
.row { display: flex; align-items: center; gap: 10px; } .row b { width: 130px; font-weight: 500; }
.row i { background: #2f6fde; height: 12px; border-radius: 3px; }
.bars { display: flex; align-items: flex-end; height: 90px; gap: 1px; }
.bars i { background: #2f6fde; width: 14px; min-height: 1px; }
"""
# No script runs in a page, and nothing is fetched but pictures and videos beside it (`file:` is for Firefox, to which a
# page opened from a disk has no `'self'`).
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:; media-src 'self' file:; "
    "base-uri 'none'; form-action 'none'"
)
EMPTY = ("br", "img", "meta")  # elements that hold nothing and are not closed


class Html(str):
    """Text that is HTML already. Every other text is escaped when it becomes part of a page."""


def h(tag: str, *inside: object, **attributes: object) -> Html:
    """The element `tag`; what is inside, and its attributes (`class_` is `class`), are text unless they are Html."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for name, value in attributes.items())
    begin = f"<{tag}{given}>"
    return Html(begin if tag in EMPTY else f"{begin}{''.join(map(_escaped, inside))}</{tag}>")


def page_of(title: str, *inside: object) -> str:
    """A whole page, to be written as UTF-8."""
    head = h("meta", charset="utf-8"), h("meta", http_equiv="Content-Security-Policy", content=POLICY)
    style = h("style", Html(STYLE))
    whole = h("html", *head, h("title", title), style, *(Html(f"\n{_escaped(one)}") for one in inside), lang="en")
    return f"<!doctype html>{whole}\n"


def as_utf8(text: str) -> str:
    """`text` without halves of pairs, which file names that are no UTF-8 have and a page cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _escaped(value: object) -> str:
    return as_utf8(value if isinstance(value, Html) else html.escape(str(value)))
