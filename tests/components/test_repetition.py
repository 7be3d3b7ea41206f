"""Parts do not repeat each other, and a variant stays a short file."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = 8


def blocks(path: Path) -> list[tuple[str, ...]]:
    """Returns every run of eight lines that say something: no blanks, comments, imports or lone brackets."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    skipped = ("#", "from ", "import ")
    said = [s for s in lines if s and not s.startswith(skipped) and any(c.isalnum() for c in s)]
    return [tuple(said[i : i + LINES]) for i in range(len(said) - LINES + 1)]


def test_no_two_blocks_of_eight_lines_are_alike() -> None:
    seen: dict[tuple[str, ...], Path] = {}
    for path in sorted((ROOT / "components").rglob("*.py")):
        for block in blocks(path):
            assert block not in seen, f"{path.name} repeats {seen[block].name}: {block}"
            seen[block] = path


def test_variants_are_short() -> None:
    for path in (ROOT / "experiments").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name
