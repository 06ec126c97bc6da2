"""The HTML report: one file that asks nobody, says every number, and escapes what others wrote."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from made_up import RUN, read_back
from made_up import report as made_up

from moefast.core.errors import OutputError
from moefast.protocol.html import page, write_page
from moefast.protocol.report_text import efficiency_words

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Elements in order, their text, and whether tags close as they opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def report():
    return made_up()


@pytest.fixture(scope="module")
def text(report):
    return page(report, RUN)


@pytest.fixture(scope="module")
def read(text):
    return Reader(text)


def test_the_same_bytes_and_not_too_many(report, text, tmp_path):
    again = page(read_back(report), json.loads(json.dumps(RUN)))
    assert again == text
    write_page(report, RUN, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == text.encode()
    assert len(text.encode()) < 1_000_000


def test_nothing_from_elsewhere(text, read):
    assert "default-src 'none'" in text
    for tag, attributes in read.attributes:
        assert tag not in {"script", "iframe", "object", "img"}, tag
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "action"}:
                assert value.startswith(("#", "data:,")), (tag, name, value)
            assert not name.startswith("on"), name
    assert not re.search(r"@import|url\((?!#)", text)


def test_references_inside_the_page_lead_somewhere(read):
    known = [attributes["id"] for _, attributes in read.attributes if "id" in attributes]
    assert len(known) == len(set(known))
    for _, attributes in read.attributes:
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in known
        for name in attributes.get("aria-labelledby", "").split():
            assert name in known


def test_headline_and_tables_carry_the_numbers(report, read):
    overall = report.overall
    for words in (
        "phys-moe on fake",
        f"{overall.r2:.3f}",
        f"[{overall.r2_interval[0]:.3f}, {overall.r2_interval[1]:.3f}]",
        "12,346",
        "a CPU",
        "0123456789abcdef",
        "‖flux‖₂/‖error‖₂",
        "median(flux/error)",
        "moefast evaluate test.h5 -m model -o report/",
        "3 of 1,201 predictions are not finite",
        "95 % percentile bootstrap",
    ):
        assert words in read.text, words
    for kind in ("snr_norm", "snr_median", "grid", "metallicity"):
        for group in report.groups(kind):
            assert f"{group.r2:.3f}".replace("-", "−") in read.text
            low, high = (f"{v:.3f}".replace("-", "−") for v in group.r2_interval)
            assert f"[{low}, {high}]" in read.text
    for name, entry in report.references.items():
        assert name in read.text
        assert f"{entry.r2_gain:+.3f}".replace("-", "−") in read.text


def test_for_every_eye_and_width(text, read):
    assert '<html lang="en">' in text
    assert "prefers-color-scheme: dark" in text
    assert 'content="width=device-width, initial-scale=1"' in text
    pictures = [attributes for tag, attributes in read.attributes if tag == "svg"]
    assert len(pictures) == 17
    assert all(picture["role"] == "img" and picture["aria-labelledby"] for picture in pictures)
    assert all("scope" in attributes for tag, attributes in read.attributes if tag == "th")
    scrolled = [attributes for _, attributes in read.attributes if attributes.get("class") == "scroll"]
    assert scrolled
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in scrolled)
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert all(text.count(f"--{role}: #") == 3 for role in used)


def test_marks_of_the_roadmap_only_when_asked_for(report):
    from moefast.protocol.milestones.judge import judge_alone

    protocol = made_up(n_resamples=1000, model={"kind": "model", "name": "m", "recipe": "published-ridge"})
    judged = judge_alone(protocol)
    assert "Milestones" not in Reader(page(protocol, RUN)).text
    read = Reader(page(protocol, RUN, judged))
    assert "Milestones that this evaluation bears on" in read.text
    assert "C0" in read.text


def test_what_others_wrote_is_text():
    evil = '<script>alert("x")</script> & "sons"'
    found = page(
        made_up(60, data_set=evil, model={"kind": "table", "name": evil, "sha256": None}), {"command": evil}
    )
    assert "<script" not in found
    assert evil in Reader(found).text


def test_a_report_without_most_things():
    bare = made_up(
        40,
        err=None,
        weights=None,
        expert_grid=None,
        references={},
        ceilings={},
        group_ceilings=None,
        noise="none",
        noise_level=None,
        model={"kind": "onnx", "name": "x.onnx", "wave_checked": False},
    )
    read = Reader(page(bare))
    assert "no errors were claimed" in read.text
    assert "The gate" not in read.text
    assert "No noise was added" in read.text
    assert "only the number of pixels was checked" in read.text
    assert "Spectra per second" not in read.text
    assert "moefast evaluate TEST… -m MODEL" in read.text


def test_a_page_that_cannot_be_written(report, tmp_path):
    with pytest.raises(OutputError, match="missing"):
        write_page(report, None, tmp_path / "missing" / "report.html")


def test_what_is_no_limit_has_no_efficiency():
    entry = made_up(40, ceilings={"bayes": 0.4}, group_ceilings=None).ceilings["bayes"]
    entry = replace(entry, efficiency=2.269)
    assert efficiency_words("fisher mean", entry) == "–"
    assert efficiency_words("bayes", entry) == "2.269"
    assert efficiency_words("bayes", replace(entry, efficiency_reason="the ceiling is not above zero")) == "–"
