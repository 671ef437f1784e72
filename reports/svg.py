"""An SVG drawing made part of a page: ids of its own, no roles of its own, a title and a description.

The drawing is parsed and changed as a tree. Leaves out drawing it (`chart_rendering`).
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.dom.minidom import Element, parseString


def accessible_svg(text: str, name: str, title: str, description: str) -> str:
    """An SVG document as an element of a page, read out as an image.

    Args:
        text: the document.
        name: prefix of its ids; differs from that of every other drawing of the page.
        title: what a screen reader says first.
        description: what a screen reader says next.
    """
    document = parseString(text)  # drawn by vl-convert, where texts are escaped
    svg = document.documentElement
    assert svg is not None
    elements = list(_elements(svg))
    ids = [element.getAttribute("id") for element in elements if element.hasAttribute("id")]
    for element in elements:
        for key, value in list(element.attributes.items()):
            if key == "role" or key.startswith("aria-"):
                element.removeAttribute(key)
            elif key == "id":
                element.setAttribute(key, f"{name}-{value}")
            elif value.startswith("url(#") and value[5:-1] in ids:
                element.setAttribute(key, f"url(#{name}-{value[5:-1]})")
    svg.setAttribute("role", "img")
    svg.setAttribute("aria-labelledby", f"{name}-title {name}-desc")
    first = svg.firstChild
    for tag, content in (("title", title), ("desc", description)):
        element = document.createElement(tag)
        element.setAttribute("id", f"{name}-{tag}")
        element.appendChild(document.createTextNode(content))
        svg.insertBefore(element, first)
    return str(svg.toxml())


def _elements(root: Element) -> Iterator[Element]:
    yield root
    for child in root.childNodes:
        if isinstance(child, Element):
            yield from _elements(child)
