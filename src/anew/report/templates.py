"""Fill the Jinja templates of this folder, such as page.html.

    render("page.html", title="gpt2-124m", ...)

Values in an HTML file are escaped. A value that a template uses and that is not given is an error.
"""

import functools
from pathlib import Path
from typing import Any


@functools.cache
def _template(name: str) -> Any:
    """Return a compiled template, because a page is written after each validation."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def render(name: str, /, **values: object) -> str:
    """Return the text of a template with these values."""
    return str(_template(name).render(values))
