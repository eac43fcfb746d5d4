"""report.html: what it holds, and, opened in a browser, what it does."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from l2t_fast.cli import main
from l2t_fast.data.options import DataConfig
from l2t_fast.errors import L2TError
from l2t_fast.reports.page import page_data, report
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import save_config
from tests.reports.shared import PEAKED, UNIFORM, training
from tests.shared import RESULT_ROWS, write_rows

CHROMIUM = Path("/usr/bin/chromium")
CHANNELS = [PEAKED, PEAKED, UNIFORM, PEAKED]
RISING = [[1.0, 1.0, 1.0, 1.0], [1.5, 1.0, 0.5, 0.0], [3.0, 1.0, 0.25, 0.0]]
NASTY = "<script>window.bad = 1</script>&\"'"


def ended(cell: Path, accuracy: float = 0.5) -> None:
    result = {"test_accuracy_last": accuracy, "seconds": 2.0, "iterations": 100, "images": 800}
    (cell / "result.json").write_text(json.dumps(result))


def finished(
    folder: Path, epochs: int = 3, methods: tuple[str, ...] = ("scratch", "l2t-ww"), name: str = "run"
) -> Path:
    """A run of two seeds, with all there is to show."""
    config = resolve(TrainConfig(name=name, method=methods, seeds=(0, 1), data=DataConfig("cifar100")))
    run = folder / "run"
    for method in methods:
        for seed in (0, 1):
            cell, learns = run / method / f"seed-{seed}", method == "l2t-ww"
            more: dict[str, Any] = {"final": RISING[epochs - 1], "channels": CHANNELS} if learns else {"meta": False}
            training(cell, RISING[:epochs] if learns else [[1.0] * 4] * epochs, **more)
            ended(cell, 0.5 + 0.1 * learns + 0.01 * seed)
    save_config(config, run / "config.json")
    machine = {"device": "Some GPU", "threads": 2, "torch": "2.11.0", "time": "2026"}
    write_rows(run / "environment.jsonl", [machine, {**machine, "time": "2027"}, {**machine, "threads": 4}])
    return run


def written(folder: Path, results: Path | None = None) -> Path:
    return report(folder, Console(quiet=True), results)


def test_numbers_of_a_run(tmp_path: Path) -> None:
    data = page_data(finished(tmp_path))
    assert (data["ended"], data["waiting"], data["failed"]) == (4, 0, 0)
    (column,) = data["columns"]
    assert column["table"]["lines"][1][:2] == ["l2t-ww", "60.50 ± 0.71"]
    assert [1, 1] in column["table"]["bold"]
    lines = column["curves"]["loss"]["lines"]
    assert [(line["method"], line["seed"]) for line in lines] == [(m, s) for m in ("scratch", "l2t-ww") for s in (0, 1)]
    assert lines[0]["points"] == [[1, 1], [2, 1], [3, 1]]
    (learned,) = data["learned"]
    assert learned["history"] == [RISING, RISING]
    assert learned["layers"] == [["", "a", "x"], ["", "a", "y"], ["", "b", "x"], ["", "b", "y"]]
    (weights,) = data["weights"]
    assert [sum(counts) for counts in weights["counts"]] == pytest.approx([100] * 4)
    assert data["timings"]["lines"][0] == ["scratch", "20.0 ± 0.0", "400 ± 0", "2.0 ± 0.0"]
    result = json.loads((tmp_path / "run/scratch/seed-0/result.json").read_text())
    for seed in (0, 1):
        (tmp_path / f"run/scratch/seed-{seed}/result.json").write_text(json.dumps({**result, "seconds": 2000.0}))
    assert page_data(tmp_path / "run")["timings"]["lines"][0][2] == "0.40 ± 0.00"
    assert data["floors"] is None  # none are known
    assert data["environment"]["header"] == ["", "machine 1", "machine 2"]
    assert ["CPU threads", "2", "4"] in data["environment"]["lines"]
    assert data["command"].startswith("l2t-fast train --name run-again ")


def test_floors_are_those_of_the_results_file_given(tmp_path: Path) -> None:
    floors = page_data(finished(tmp_path), write_rows(tmp_path / "rows.jsonl", RESULT_ROWS))["floors"]
    assert floors["device"] == "Some GPU"
    assert floors["lines"] == [
        ["tiny", "4", "eager", "fp32", "15.00", "1.00", "10%"],
        ["tiny", "4", "eager", "fp32", "20.00", "1.00", "10%"],
    ]
    with pytest.raises(L2TError, match=r"has no iteration of the engine with a floor"):
        page_data(tmp_path / "run", write_rows(tmp_path / "none.jsonl", RESULT_ROWS[:2]))
    for change in ({"ms_median": "q"}, {"case": None}, {"floor_fraction": [1]}, {"batch": "four"}):
        rows = [{**row, **change} if row.get("by") == "engine" else row for row in RESULT_ROWS]
        with pytest.raises(L2TError, match=r"is damaged \(an iteration lacks its case or its times\): give another"):
            page_data(tmp_path / "run", write_rows(tmp_path / "edited.jsonl", rows))
    (tmp_path / "damaged.jsonl").write_text("{\n")
    with pytest.raises(L2TError, match=r"damaged.jsonl cannot be read"):
        page_data(tmp_path / "run", tmp_path / "damaged.jsonl")


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    run = finished(tmp_path, methods=("scratch",))
    rows = [{"epoch": i // 500, "iteration": i % 500, "loss": float(i)} for i in range(1000)]
    write_rows(run / "scratch/seed-0/metrics.jsonl", [*rows[:500], {"epoch": 0, "val_accuracy": 0.25}, *rows[500:]])
    curves = page_data(run)["columns"][0]["curves"]
    points = curves["loss"]["lines"][0]["points"]
    assert 160 <= len(points) <= 320
    assert points[0] == [6, 2.5]
    assert points[-1][0] == 1000
    assert curves["val_accuracy"]["lines"] == [{"method": "scratch", "seed": 0, "points": [[500, 25]]}]


def test_a_table_with_failed_and_missing_cells(tmp_path: Path) -> None:
    table = failed_table(tmp_path)
    data = page_data(table)
    assert (data["ended"], data["waiting"], data["failed"]) == (2, 5, 1)
    titles = [column["title"] for column in data["columns"]]
    assert sorted(titles) == ["cifar10, vgg9_bn", "cifar100, vgg9_bn"]
    below = " ".join(text for column in data["columns"] for text in column["table"]["below"])
    assert "l2t-ww, seed 0: the loss is nan" in below
    assert data["command"].startswith(
        "l2t-fast table --name table-again --method scratch l2t-ww --dataset cifar100 cif"
    )
    assert data["timings"]["lines"] == [["cifar100, vgg9_bn", "scratch", "20.0 ± 0.0", "400 ± 0", "2.0 ± 0.0"]]


def failed_table(folder: Path) -> Path:
    table = TableConfig(name="table", method=("scratch", "l2t-ww"), dataset=("cifar100", "cifar10"), seeds=(0, 1))
    for name, config in column_configs(table).items():
        (folder / "table" / name).mkdir(parents=True)
        save_config(config, folder / "table" / name / "config.json")
    save_config(table, folder / "table/table.json")
    column = folder / "table/cifar100-vgg9_bn"
    for seed in (0, 1):
        training(column / f"scratch/seed-{seed}", [[1.0] * 4], meta=False)
        ended(column / f"scratch/seed-{seed}")
    training(column / "l2t-ww/seed-0", RISING, ended=False)
    (column / "problems.json").write_text(json.dumps({"l2t-ww": {"0": f"the loss is nan {NASTY}"}}))
    return folder / "table"


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    assert "is no run: give a folder that" in " ".join(capsys.readouterr().err.split())


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a page; afterwards nothing was complained of, and nothing asked of anyone."""
    said: list[str] = []
    asked: list[str] = []
    contexts: list[Any] = []

    def open_page(path: Path, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        asked.remove(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == []


def widths(page: Any) -> dict[str, float]:
    lines = page.eval_on_selector_all(
        "path[data-pair]", "lines => lines.map(line => [line.dataset.pair, Number(line.getAttribute('stroke-width'))])"
    )
    return dict(lines)


def test_labels_of_axes_have_room(tmp_path: Path, opened: Open) -> None:
    """Of losses that diverge, and below the small pictures of channel weights; what was never finite is no curve."""
    run = finished(tmp_path, epochs=1)
    nothing = float("nan")
    rows: list[dict[str, Any]] = [{"iteration": i, "loss": 3.0 * 10 ** (9 * i)} for i in range(4)]
    rows = [{"epoch": 0, "meta_loss": nothing, **row} for row in rows]
    for path in run.glob("l2t-ww/*/learned.json"):
        write_rows(
            path.with_name("metrics.jsonl"), [*rows, {"epoch": 0, "meta_loss": nothing, "pair_weights": RISING[0]}]
        )
        learned = json.loads(path.read_text())  # all but uniform, C w from 0.996 to 1.004
        learned["channels"] = [{**c, "profile": [1.004, 1.0, 1.0, 0.996]} for c in learned["channels"]]
        path.write_text(json.dumps(learned))
    page = opened(written(run), viewport={"width": 1100, "height": 700})
    assert page.locator('svg[aria-label="meta-loss"]').count() == 0
    boxes = page.eval_on_selector_all(
        "figure svg",
        """pictures => pictures.map(one => [one.getBoundingClientRect().left, [...one.querySelectorAll('text')].map(
            text => (box => [box.left, box.right, Math.round(box.top)])(text.getBoundingClientRect()))])""",
    )
    for left, texts in boxes:
        assert all(start >= left for start, _, _ in texts)
        for row in {top for _, _, top in texts}:
            ends = sorted((start, end) for start, end, top in texts if top == row)
            assert all(end < start for (_, end), (start, _) in itertools.pairwise(ends))


def test_the_slider_goes_through_the_epochs_by_mouse_and_keys(tmp_path: Path, opened: Open) -> None:
    page = opened(written(finished(tmp_path)))
    assert page.title() == "run"
    assert page.locator("#which option").all_inner_texts() == [
        "l2t-ww, mean of 2 seeds",
        "l2t-ww, seed 0",
        "l2t-ww, seed 1",
    ]
    assert page.locator("output").inner_text() == "3 of 3"
    assert widths(page) == pytest.approx({"a → x": 14, "a → y": 14 / 3, "b → x": 14 / 12, "b → y": 0}, abs=0.01)
    page.locator("#epoch").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("output").inner_text() == "2 of 3"
    assert widths(page)["a → x"] == 7
    page.locator("#epoch").fill("1")
    assert set(widths(page).values()) == {4.67}
    bars = page.locator(".bars li span:last-child").all_inner_texts()
    assert bars == ["1.00"] * 4
    page.select_option("#which", label="l2t-ww, seed 1")
    assert page.locator("output").inner_text() == "3 of 3"


def test_light_and_dark(tmp_path: Path, opened: Open) -> None:
    path = written(finished(tmp_path))
    color = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 26)"
    for scheme, first, then in (("light", light, dark), ("dark", dark, light)):
        page = opened(path, color_scheme=scheme)
        assert page.evaluate(color) == first
        page.click("#theme")
        assert page.evaluate(color) == then
        page.click("#theme")
        assert page.evaluate(color) == first


def test_methods_are_hidden_and_shown(tmp_path: Path, opened: Open) -> None:
    page = opened(written(finished(tmp_path)))
    loss = page.locator('svg[aria-label="training cross entropy"] polyline')
    assert loss.count() == 4
    page.get_by_role("button", name="scratch").click()
    assert loss.count() == 2
    page.get_by_role("button", name="scratch").click()
    assert loss.count() == 4


def test_it_is_read_on_a_phone(tmp_path: Path, opened: Open) -> None:
    page = opened(
        written(finished(tmp_path), write_rows(tmp_path / "rows.jsonl", RESULT_ROWS)),
        viewport={"width": 340, "height": 700},
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    sizes = page.eval_on_selector_all(
        "svg text", "texts => texts.map(text => parseFloat(getComputedStyle(text).fontSize))"
    )
    assert min(sizes) >= 12
    outside = page.eval_on_selector_all(
        "figure svg", "all => all.filter(one => one.getBoundingClientRect().right > innerWidth).length"
    )
    assert outside == 0
    page.set_viewport_size({"width": 1200, "height": 700})
    wide = "document.querySelector('figure svg').getBoundingClientRect().width > 400"
    for _ in range(50):  # `wait_for_function` would evaluate a string, which the page forbids
        if page.evaluate(wide):
            break
        page.wait_for_timeout(100)
    assert page.evaluate(wide)


@pytest.mark.parametrize(
    "what", ["one epoch", "nothing learned", "unfinished", "named from the start", "not begun", "failed cells"]
)
def test_it_opens_whatever_there_is(tmp_path: Path, opened: Open, what: str) -> None:
    if what == "failed cells":
        folder = failed_table(tmp_path)
    elif what == "nothing learned":
        folder = finished(tmp_path, methods=("scratch",))
    else:
        folder = finished(tmp_path, epochs=1 if what == "one epoch" else 2)
    if what in ("unfinished", "named from the start"):
        if what == "named from the start":
            learned = (folder / "l2t-ww/seed-1/learned.json").read_text()
            (folder / "l2t-ww/seed-1/pairs.json").write_text(learned)
        for name in ("result.json", "learned.json"):
            (folder / "l2t-ww/seed-1" / name).unlink()
            (folder / "l2t-ww/seed-0" / name).unlink()
        (folder / "l2t-ww/seed-0/metrics.jsonl").write_text('{"epoch": 0, "iteration": 0, "loss": 2.5}\n{"epo')
    if what == "not begun":
        folder = tmp_path / "new"
        folder.mkdir()
        save_config(resolve(TrainConfig(name="new")), folder / "config.json")
    page = opened(written(folder))
    text = page.inner_text("main")
    assert "NaN" not in page.content().partition("<main>")[2].partition("</main>")[0]
    expected = {
        "one epoch": ["1 of 1", "trainings: 4 ended"],
        "nothing learned": [
            "No training that learns pair weights λ",
            "No training that learns channel weights has ended.",
        ],
        "unfinished": ["2 ended, 2 not ended yet", "The names of the layers are known when a training has ended."],
        "named from the start": ["2 ended, 2 not ended yet", "2 of 2 so far", "a → x"],
        "not begun": ["6 not ended yet", "Nothing has been trained yet.", "No training has ended."],
        "failed cells": ["2 ended, 5 not ended yet, 1 failed", NASTY],
    }[what]
    for words in expected:
        assert words in text
    assert page.evaluate("window.bad") is None


def test_names_are_text_and_nothing_else(tmp_path: Path, opened: Open) -> None:
    """Of folders, methods and layers."""
    run = finished(tmp_path)
    for path in run.glob("l2t-ww/*/learned.json"):
        path.write_text(path.read_text().replace('"a', json.dumps(NASTY)[:-1]))
    config = json.loads((run / "config.json").read_text())
    config["name"] = "</script><b>"
    run = run.rename(run.with_name("<b>run &amp;"))
    page = opened(written(run))
    assert page.evaluate("window.bad") is None
    assert page.title() == "<b>run &amp;"
    assert page.locator("h1").inner_text() == "<b>run &amp;"
    assert page.locator("main b").count() == 1  # the best method's
    assert any(NASTY in name for name in widths(page))


def test_the_page_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path)
    main(["report", str(run)])
    assert "report.html has it all in one page" in " ".join(capsys.readouterr().out.split())
    assert (run / "report.html").stat().st_size < 100_000
