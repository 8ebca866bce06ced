"""The report: one page that holds everything, and the learning curve."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import make_run
from matplotlib import image
from matplotlib.figure import Figure

from rft.config.metrics import TrackingConfig
from rft.metrics import RunLog
from rft.report.charts import POINTS, Chart, draw_all, thin
from rft.report.events import as_text, notable_events, outcome_of
from rft.report.history import NoRun, Run
from rft.report.plots import curve, plot_learning_curve, smooth
from rft.report.report import before_and_after, facts, write_report

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


class Page(HTMLParser):
    """Open tags, to see that all are closed; what the page would load; its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: dict[str, int] = {}
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and v[0] != "#"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(run_dir, tmp_path_factory.mktemp("out") / "deep" / "report.html")
    return path.read_text()


def test_the_page_is_well_formed_and_loads_nothing(html: str) -> None:
    page = Page(html)
    assert page.open == [] and page.loads == []
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_the_page_has_its_parts(html: str) -> None:
    text = Page(html).text
    for part in ("arithmetic-seed1", "grpo", "92.0%", "from 35.0%", "1 resume, 1 fault", "fault/engine",
                 "EngineDeadError", "guard/duplicates", "What is 2 + 3 * 4?", "epsilon: 0.2"):  # fmt: skip
        assert part in text
    assert "<b>not markup</b>" in text  # the completion's own characters, escaped in the page
    assert "<b>not markup</b>" not in html


@pytest.fixture(scope="module")
def charts(run_dir: Path) -> list[Chart]:
    return draw_all(Run(run_dir))


def test_every_chart_that_the_run_has_numbers_for(charts: list[Chart], html: str) -> None:
    titles = [chart.title for chart in charts]
    assert titles == [
        "Reward", "Held-out accuracy", "Outcomes", "KL divergence", "Entropy", "Completion length",
        "Output diversity", "Shares", "Loss", "Gradient norm", "Changed weights", "Where the time goes",
        "Throughput", "Staleness", "Proof of the push",
    ]  # fmt: skip
    assert Page(html).tags["svg"] == len(titles) + 1  # and the time line


def test_charts_are_the_same_for_the_same_run(charts: list[Chart], html: str) -> None:
    assert all(chart.svg in html for chart in charts)  # the page drew its own


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, TrackingConfig(trackers=())) as log:
        page = Page(write_report(tmp_path).read_text())
        assert "No step has been written yet" in page.text and "running" in page.text
        log.log(1, {"train/loss": float("nan"), "reward/mean": 0.5})
        page = Page(write_report(tmp_path).read_text())
    assert page.open == [] and "reward" in page.text


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(NoRun):
        write_report(tmp_path)


def test_the_head_tells_what_was_measured(run_dir: Path) -> None:
    told = {fact.label: (fact.value, fact.remark) for fact in facts(Run(run_dir))}
    assert told["steps"] == ("120", "of 120")
    assert told["held-out accuracy"] == ("92.0%", "from 35.0%")
    assert told["time"][0] == "2 h 57 min"  # 120 steps of 75 s, 15 min of pause, 10 steps taken twice


def test_events_are_in_order_with_their_tone(run_dir: Path) -> None:
    told = notable_events(Run(run_dir))
    assert [(e["kind"], e["tone"]) for e in told] == [
        ("run/opened", "info"), ("fault/engine", "bad"), ("run/opened", "info"), ("run/superseded", "info"),
        ("guard/duplicates", "warn"), ("run/closed", "info"),
    ]  # fmt: skip
    assert (told[1]["step"], told[1]["at"]) == ("40", "51 min 15 s")


def test_held_out_prompts_come_together() -> None:
    rows = [
        {"step": step, "split": split, "prompt": f"p{i}", "completion": f"{step}-{i}-{n}"}
        for step in (0, 10, 20)
        for split in ("train", "eval")
        for i in (0, step + 1)
        for n in (0, 1)
    ]
    pairs = before_and_after(rows)
    assert [(p.prompt, (p.before or {})["completion"], (p.after or {})["completion"]) for p in pairs] == [
        ("p0", "0-0-0", "20-0-0"),
        ("p0", "0-0-1", "20-0-1"),
    ]
    training = before_and_after([row for row in rows if row["split"] == "train" and row["step"] == 0])
    assert [p.after for p in training] == [None] * 4


def test_chat_prompts_and_outcomes_are_readable() -> None:
    assert as_text([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]) == (
        "user: hi\nassistant: ho"
    )
    assert outcome_of({"outcome": {"math": "wrong", "format": "correct"}}) == "wrong"
    assert outcome_of({"outcome": "correct"}) == "correct" and outcome_of({}) == ""


def test_smoothing_keeps_ends_and_means() -> None:
    assert smooth([1.0, 2.0, 3.0, 4.0], 3).tolist() == [1.5, 2.0, 3.0, 3.5]
    assert smooth([5.0], 50).tolist() == [5.0]


def test_long_runs_are_thinned_without_bias() -> None:
    steps, values = thin(range(10_007), [float(i % 2) for i in range(10_007)])
    assert len(steps) == len(values) == POINTS
    assert abs(values.mean() - 0.5) < 0.01 and 0 < steps[0] < 13 and steps[-1] > 9990


@pytest.mark.parametrize(("values", "dots"), [([0.5], 1), ([0.5, 0.6], 0)])
def test_a_single_value_is_drawn_as_a_dot(values: list[float], dots: int) -> None:
    """A line through one point would be invisible, as of a run with one evaluation after its start."""
    axes = Figure().subplots()
    curve(axes, list(range(len(values))), values, "black")
    assert sum(line.get_marker() == "o" for line in axes.lines) == dots


def test_learning_curve_of_several_seeds(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"seed{s}", total=40, seed=s) for s in (1, 2)]
    pixels = image.imread(plot_learning_curve(runs, tmp_path / "pictures" / "curve.png"))
    assert pixels.shape[1] > 1000 and 0.5 < pixels[..., :3].mean() < 0.995


def test_no_curve_without_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path, 9, TrackingConfig(trackers=())):
        pass
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_learning_curve([tmp_path], tmp_path / "curve.png")


def browse(html: str, folder: Path, width: int, *flags: str) -> str:
    """The page as headless Chromium shows it; what the browser prints."""
    assert CHROMIUM is not None
    page = folder / "report.html"
    page.write_text(html)
    common = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    window = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},3000"]
    command = [CHROMIUM, *common, *window, *flags, page.as_uri()]
    return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page cannot be looked at")


@needs_chromium
def test_the_page_in_a_browser(html: str, tmp_path: Path) -> None:
    """Charts, time line and samples are drawn: the colours of each are on the picture."""
    browse(html, tmp_path, 1280, f"--screenshot={tmp_path / 'shot.png'}")
    pixels = image.imread(tmp_path / "shot.png")[..., :3]
    assert pixels.shape[:2] == (3000, 1280)
    for color in ("#1b9e77", "#d1495b", "#2f6bd8", "#7b5cc4", "#14805f"):
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - rgb).max(axis=-1) < 0.03).sum() > 20, f"{color} is not on the page"


@needs_chromium
def test_the_page_on_a_narrow_screen(html: str, tmp_path: Path) -> None:
    """Nothing is wider than the window (the browser's narrowest is 500)."""
    probe = "<script>document.title = document.documentElement.scrollWidth</script>"
    found = re.search(r"<title>(\d+)</title>", browse(html + probe, tmp_path, 500, "--dump-dom"))
    assert found is not None and int(found[1]) <= 500
