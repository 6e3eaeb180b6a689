"""docs/checks: a page for every id, which says what the catalogue says, and nothing else."""

import re
from pathlib import Path

import pytest

from onehour.check.catalogue import PITFALLS
from onehour.check.remedies.edits import EDITS

CHECKS = Path(__file__).parents[2] / "docs" / "checks"
SECTIONS = ["Symptom", "What it costs", "How it is seen", "Fix", "Sources"]


def test_there_is_a_page_for_every_pitfall_and_no_other():
    assert {path.stem for path in CHECKS.glob("*.md")} == {*PITFALLS, "README"}


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_a_page_says_what_the_catalogue_says(pitfall: str):
    text = (CHECKS / f"{pitfall}.md").read_text(encoding="utf-8")
    about = PITFALLS[pitfall]
    assert text.startswith(f"# {pitfall}\n\n")
    assert f"\n*{about.severity}, {about.section}: {about.why}.*\n" in text
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    assert parts[1::2] == SECTIONS
    assert all(len(part.strip()) > 20 for part in parts[2::2])
    assert "- Goyal et al. 2017, §" in parts[-1]


@pytest.mark.parametrize("path", sorted(CHECKS.glob("*.md")), ids=lambda path: path.stem)
def test_links_of_a_page_lead_somewhere(path: Path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_list_of_pages_is_the_catalogue_with_what_can_be_patched():
    rows = re.findall(
        r"^\| \[([\w-]+)\]\(([\w-]+)\.md\) \| (\w+) \| (.+?) \| (.+?) \| .*? \| ?(yes)? ?\|$",
        (CHECKS / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {row[0]: row[1:] for row in rows} == {
        pitfall: (pitfall, about.severity, about.section, about.why, "yes" if pitfall in EDITS else "")
        for pitfall, about in PITFALLS.items()
    }
    assert len(rows) == len(PITFALLS)
