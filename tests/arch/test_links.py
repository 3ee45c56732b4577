"""Every relative link of the documentation leads to a file, and to a heading where it names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "examples" / "README.md",
        ROOT / "launcher" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    if page.exists()
]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def links(text: str) -> list[str]:
    found = ["".join(pair) for pair in LINK.findall(CODE.sub("``", text))]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {each.replace(" ", "-") for each in words}


def broken(page: Path) -> list[str]:
    """Return the links of `page` that lead nowhere."""
    wrong = []
    for link in links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page: Path):
    assert broken(page) == []


def test_the_readme_has_links_to_check():
    assert len(links((ROOT / "README.md").read_text(encoding="utf-8"))) > 5


def test_a_link_to_a_missing_file_or_heading_is_broken(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One: `two` (three)\n[a](page.md#one-two-three) [b](#four) [c](no.md) [d](https://x.org/no.md) `[e](no.md)`\n"
    )
    assert broken(page) == ["#four", "no.md"]
