"""The report: self-contained, escaped, complete, and whole with diverged runs in it."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from celo_nnx.evaluation import curves, plots, report

RATES = [1e-3, 1e-2, 1e-1]


def method(name, level):
    generator = np.random.default_rng(len(name))
    shape = np.array([2.0, 1.0, 3.0])[:, None, None] * level * np.linspace(2.0, 1.0, 40)
    losses = shape * generator.uniform(0.9, 1.1, (3, 3, 40))
    return plots.Method(name, losses, curves.tune(losses, RATES), 3.0)


@pytest.fixture
def content():
    diverged = np.full((3, 3, 40), np.inf)
    methods = [
        method("learned <b>", 0.5),
        plots.Method("random", diverged, curves.tune(diverged, RATES)),
        method("adam", 1.0),
    ]
    meta = plots.MetaCurve(np.arange(60), np.linspace(2, 1, 60), ((30, "kill -9 & resumed"),))
    return report.Report(
        title="A report",
        summary=["First & foremost."],
        steps=["Meta-trained.", "Compared."],
        meta=meta,
        methods=methods,
        task="An MLP.",
        optimizer="parts: momentum -> MLP",
        config='{"seed": 0}',
        timings=[("meta-training", 12.34)],
    )


class Balanced(HTMLParser):
    """Fails on a tag that is closed without being open."""

    void = {"meta", "br", "link", "path", "use", "rect"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_report_is_self_contained_and_complete(content, tmp_path):
    text = report.write(content, tmp_path / "report.html").read_text("utf-8")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", "href"))
    assert "@import" not in text and "<script" not in text and "url(http" not in text
    assert text.count("<svg") == 3 and plots.INK not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for words in (
        "learned &lt;b&gt;",
        "First &amp; foremost.",
        "diverged at every",
        "momentum -&gt; MLP",
        "12.3 s",
    ):
        assert words in text
    assert "<b>" not in text and "kill -9 &amp; resumed" in text


def test_scores_are_sorted_and_hold_all_seeds(content):
    rows = report.score_rows(content.methods)
    assert [row["name"] for row in rows] == ["learned <b>", "adam", "random"]
    for row, chosen in zip(rows, [content.methods[0], content.methods[2], content.methods[1]], strict=True):
        assert len(row["seeds"]) == 3 and row["median"] == np.median(row["seeds"])
        assert row["learning_rate"] == chosen.tuned.learning_rate
    assert rows[0]["learning_rate"] == 1e-2 and rows[2]["warning"]


def test_standalone_picture_is_small_and_on_paper(content):
    svg = plots.to_svg(plots.training_figure(content.methods), "picture", standalone=True)
    assert svg.startswith("<?xml") and "currentColor" not in svg and plots.PAPER_INK in svg
    assert len(svg) < 120_000


def test_versions_name_the_libraries():
    assert {"jax", "flax", "optax", "python", "devices"} <= set(report.versions())
