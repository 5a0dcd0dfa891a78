"""The server's OpenAPI document and the page that shows it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2
import yaml

import vit_static

_DOCUMENT = Path(__file__).with_name("openapi.yaml")
_DOCS_PAGE = "docs_page.html"


@functools.cache
def _template() -> dict[str, Any]:
    return yaml.safe_load(_DOCUMENT.read_text(encoding="utf-8"))


def openapi_document(model_name: str, *, needs_key: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server."""
    template = _template()
    info = {**template["info"], "title": f"vit_static: {model_name}", "version": vit_static.__version__}
    return {**template, "info": info, "security": [{"key": []} if needs_key else {}]}


def docs_html(document: dict[str, Any], model_name: str, base_url: str, *, needs_key: bool) -> str:
    """Return the page for people: examples for this server, and its endpoints. It needs nothing from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_DOCUMENT.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(_DOCS_PAGE)
    return page.render(document=document, model=model_name, url=base_url, needs_key=needs_key)
