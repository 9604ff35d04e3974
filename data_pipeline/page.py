"""HTML pages: the one place where text becomes HTML."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, **values: object) -> str:
    """The page that `template`, which extends page.html and fills its block `body`, makes of `values`.

    Every value is escaped unless it is `markupsafe.Markup`. `title` is the page's. To be written as UTF-8.
    """
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return as_utf8(environment.get_template(template.name).render(values))


def as_utf8(text: str) -> str:
    """`text` without the surrogates that stand in file names that are no UTF-8, which a page cannot hold."""
    return text.encode("utf-8", "replace").decode()
