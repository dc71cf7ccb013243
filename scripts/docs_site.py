"""Hooks of mkdocs, which mkdocs.yml names: what the site shows beyond the files in docs/.

- docs/metrics.md is one page in the repository. On the site, each metric has a page of its own, made of
  its card and of its section there, and the overview is a table of all cards. They are made when the
  site is built, so that they are never older than the cards.
- Files outside of docs/ to which a page links (results of benchmarks, examples) become part of the site.
- Links are written for the repository; here they are changed to what the site has.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Callable
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_metrics import MetricCard
from diffsynth_metrics.catalog import NAMES, find_card, find_class

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
METRICS = "docs/metrics.md"
PUBLISHED = [name for name in NAMES if name != "shapes"]
"""The metrics that have a page; the embedded model is only for trying the package out."""

_CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`]*`|\]\(([^)\s]+)\)", re.DOTALL | re.MULTILINE)
_REFERENCE = re.compile(r"^::: (.*)\.(.*)$", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?(?:[a-z_]+\.)*([^<]*)</code>")


def sections(markdown: str) -> dict[str, str]:
    """Return the sections of a page by their headings of level 2, what comes before them by ""."""
    _, *parts = re.split(r"^## (.*)\n", "\n## \n" + markdown, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def section_of(name: str) -> str:
    """Return the heading in docs/metrics.md whose first paragraph names the class of a metric.

    Raises:
        ValueError: No section, or several, name it.
    """
    wanted = f"`{find_class(name).__name__}`"
    texts = sections((ROOT / METRICS).read_text(encoding="utf-8"))
    found = [heading for heading, text in texts.items() if wanted in text.strip().split("\n\n")[0]]
    if len(found) != 1:
        raise ValueError(f"Give {wanted} one section in {METRICS} that begins with it; found {found}")
    return found[0]


def slug(heading: str) -> str:
    """Return the anchor that GitHub and Python-Markdown both give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def replace_links(markdown: str, replace: Callable[[str], str]) -> str:
    """Change the targets of all links that are not in code."""

    def change(match: re.Match[str]) -> str:
        return match[0] if match[1] is None else f"]({replace(match[1])})"

    return _CODE_OR_LINK.sub(change, markdown)


def links(markdown: str) -> list[str]:
    """Return the relative links of a page, which are not in code."""
    targets = [match[1] for match in _CODE_OR_LINK.finditer(markdown) if match[1]]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def page_of(path: str) -> str:
    """Return where a file of the repository is on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def for_site(markdown: str, path: str, site_path: str) -> str:
    """Change links that are right in the repository to those that are right on the site.

    Args:
        markdown: Text of the file ``path``, or a part of it.
        path: The file in the repository, such as ``docs/fid.md``.
        site_path: The page on which the text is.
    """
    pages = {f"{METRICS}#{slug(section_of(name))}": f"metrics/{name}.md" for name in reversed(PUBLISHED)}

    def change(target: str) -> str:
        if re.match(r"[a-z]+:|#", target):
            return target
        file, hash_sign, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), file))
        page = pages.get(f"{file}#{anchor}")
        moved = page or page_of(file) + hash_sign + anchor
        return posixpath.relpath(moved, posixpath.dirname(site_path) or ".")

    return replace_links(with_titles(markdown, path), change)


def with_titles(markdown: str, path: str) -> str:
    """Let links whose text is the name of a page show the heading that they lead to instead."""

    def change(match: re.Match[str]) -> str:
        file, _, anchor = match[2].partition("#")
        page = ROOT / posixpath.dirname(path) / file
        if not page.is_file():  # mkdocs says that the link is dead
            return match[0]
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        title = next((one for one in headings if not anchor or slug(one) == anchor), match[1])
        return f"[{title}]({match[2]})"

    return re.sub(r"\[(\w+\.md)\]\(([^)\s]*\1[^)\s]*)\)", change, markdown)


def metric_page(name: str) -> str:
    """Return the page of a metric: its card, how to load it, and its section of docs/metrics.md."""
    cls, card = find_class(name), find_card(name)
    heading = section_of(name)
    _, *parameters = inspect.signature(cls.compute).parameters.values()
    needed = (
        one.name for one in parameters if one.default is one.empty and one.kind < one.VAR_POSITIONAL
    )
    text = sections((ROOT / METRICS).read_text(encoding="utf-8"))[heading]
    return (
        f"# {card.name}\n\n{card_table(card)}\n"
        f"In Python: `{cls.__name__}.from_pretrained().compute({', '.join(needed)})`. "
        f"On the command line: `--metrics {name}`. "
        f"[What holds for all metrics](../metrics.md#what-holds-for-all), "
        f"[the class](../reference/metrics.md#diffsynth_metrics.{cls.__name__}).\n\n"
        f"## Definition\n{for_site(text, METRICS, f'metrics/{name}.md')}"
    )


def card_table(card: MetricCard) -> str:
    """Return a card as a table."""
    rows = {
        "good for": card.good_for,
        "input": card.inputs,
        "range": card.range,
        "better": "higher" if card.higher_is_better else "lower",
        "definition": f"<code>{escape(card.definition)}</code>",
        "to know": card.notes,
        "download": card.download,
        "memory of the weights": card.memory,
        "paper": f"<{card.paper}>",
        "authors' code": f"<{card.repository}> ({card.code_license})",
        "licence of the weights": card.weights_license,
    }
    lines = [f"| **{key}** | {cell(value)} |\n" for key, value in rows.items() if value]
    return "".join([lines[0], "|---|---|\n", *lines[1:]])


def overview_table() -> str:
    """Return all cards in one table."""
    head = "| metric | good for | input | range | better | download | memory |\n"
    rows = "|---|---|---|---|---|--:|--:|\n"
    for name in PUBLISHED:
        card = find_card(name)
        values = (
            f"[{card.name}](metrics/{name}.md)",
            *(card.good_for, card.inputs, card.range),
            "higher" if card.higher_is_better else "lower",
            *(card.download, card.memory),
        )
        rows += "".join(f"| {cell(value)} " for value in values) + "|\n"
    return head + rows


def cell(text: str) -> str:
    """Escape what would end a cell of a table."""
    return text.replace("|", "&#124;")


def overview_page(markdown: str) -> str:
    """Return docs/metrics.md with all cards in place of the sections that have pages of their own."""
    moved = {section_of(name) for name in PUBLISHED}
    rest = {key: text for key, text in sections(markdown).items() if key and key not in moved}
    introduction = (
        "# All metrics\n\n"
        "Each metric has a page that says what it computes, where that is defined, and under which "
        "licences it is. [Choosing a metric](choosing.md) says which one is for what.\n\n"
    )
    return introduction + overview_table() + "".join(f"\n## {key}\n{text}" for key, text in rest.items())


def linked_files() -> set[str]:
    """Return the files outside of docs/ to which pages link, and to which those link in turn."""
    found: set[str] = set()
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    while pages:
        page = pages.pop()
        for target in links((ROOT / page).read_text(encoding="utf-8")):
            file = posixpath.normpath(posixpath.join(posixpath.dirname(page), target.split("#")[0]))
            if (
                not file.startswith(("docs/", ".."))
                and file not in found | {"README.md"}
                and (ROOT / file).is_file()
            ):
                found.add(file)
                pages += [file] if file.endswith(".md") else []
    return found


def reference_page(markdown: str) -> str:
    """Return a page of docs/reference/ as mkdocstrings reads it.

    A line ``::: module.*`` stands for the public names of a module that no page there lists.
    """
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    listed = {match[0] for page in pages for match in _REFERENCE.finditer(page)}

    def write(match: re.Match[str]) -> str:
        module, name = match.groups()
        if name != "*":
            return directive(module, name)
        names = [one for one in import_module(module).__all__ if f"::: {module}.{one}" not in listed]
        return "\n\n".join(directive(module, one) for one in names)

    return _REFERENCE.sub(write, markdown)


def directive(module: str, name: str) -> str:
    """Return what mkdocstrings is asked about a public name.

    It reads the source and does not run it, so it does not see what ``to_trl = _TRLReward`` means.
    """
    value = getattr(import_module(module), name)
    public = getattr(import_module(module), "__all__", ())
    if not isinstance(value, type) or value.__name__ in (name, *public):
        return f"::: {module}.{name}"
    options = f"heading: {name}, toc_label: {name}, separate_signature: false, show_bases: false"
    return f"::: {value.__module__}.{value.__qualname__}\n    options: {{{options}}}"


# What mkdocs calls


def on_config(config: MkDocsConfig) -> None:
    """Add the pages of the metrics to the navigation."""
    (entry,) = (entry["Metrics"] for entry in config.nav or [] if "Metrics" in entry)
    entry += [{find_card(name).name: f"metrics/{name}.md"} for name in PUBLISHED]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of the metrics, and the files outside of docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    for name in PUBLISHED:
        files.append(File.generated(config, f"metrics/{name}.md", content=metric_page(name)))
    for path in sorted(linked_files()):
        file = File.generated(config, path, abs_src_path=str(ROOT / path))
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Change the links of a page to what the site has."""
    uri = page.file.src_uri
    if uri.startswith("metrics/"):
        return markdown
    in_docs = (ROOT / "docs" / uri).is_file()
    if in_docs and uri == "metrics.md":
        markdown = overview_page(markdown)
    if uri.startswith("reference/"):
        markdown = reference_page(markdown)
    return for_site(markdown, f"docs/{uri}" if in_docs else uri, uri)


def on_page_content(html: str, **_: Any) -> str:
    """Show names in docstrings without the roles of Sphinx."""
    return _ROLE.sub(r"<code>\1</code>", html)
