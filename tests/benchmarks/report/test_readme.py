"""The benchmark suite: the regression gate, and that the suite itself can be trusted."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import rows as results
from benchmarks.cases import CASES
from benchmarks.measure import counts, floors, timing
from benchmarks.measure.telemetry import THROTTLES, Telemetry
from benchmarks.report import markdown as report
from benchmarks.suites import aot, gate, iterations, operators, sensitivity
from benchmarks.suites import jobs as side_by_side
from l2t_fast import L2T, Engine
from l2t_fast.errors import L2TError
from l2t_fast.settings.options import TableConfig
from tests.shared import batch, engine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = replace(CASES["tiny"], batch=4, inner_steps=1)


# The gate


def test_nothing_became_worse() -> None:
    """If that is meant: `python -m benchmarks gate --update`, and look at what changed."""
    expected = json.loads(gate.EXPECTATIONS.read_text())
    assert gate.complaints(gate.measure(), expected) == []


@pytest.fixture(scope="module")
def expected_counts() -> dict[str, int]:
    return gate.engine_counts(SMALL)


def _complaints(counts_now: dict[str, int], expected: dict[str, int]) -> list[str]:
    measured = {"counts": {"tiny": counts_now}, "time": {}, "imagenet": {}}
    return gate.complaints(measured, {"counts": {"tiny": expected}})


def test_gate_sees_a_second_source_pass(expected_counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    once = L2T.source_features

    def twice(self: L2T, x: torch.Tensor) -> list[torch.Tensor]:
        once(self, x)
        return once(self, x)

    monkeypatch.setattr(L2T, "source_features", twice)
    found = _complaints(gate.engine_counts(SMALL), expected_counts)
    assert any("flops" in complaint for complaint in found)
    assert any("launches" in complaint for complaint in found)


def test_gate_sees_more_memory(expected_counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    forward, kept = L2T.all_target_outputs, []

    def hoarding(self: L2T, *args: Any, **options: Any) -> Any:
        kept.append(torch.zeros(expected_counts["saved_bytes"] // 40))
        return forward(self, *args, **options)

    monkeypatch.setattr(L2T, "all_target_outputs", hoarding)
    found = _complaints(gate.engine_counts(SMALL), expected_counts)
    assert any("saved_bytes" in complaint for complaint in found)


@pytest.mark.parametrize(("times", "red"), [(1.0, False), (1.1, False), (2.0, True)])
def test_gate_sees_lost_time_beyond_noise(times: float, red: bool) -> None:
    before = [0.5, 0.52, 0.54, 0.55, 0.56, 0.58, 0.6, 0.62, 0.9]
    expected = {"time": {"tiny": vars(gate.interval(before))}, "counts": {}}
    measured = {
        "time": {"tiny": vars(gate.interval([times * ratio for ratio in before]))},
        "counts": {},
        "imagenet": {},
    }
    assert bool(gate.complaints(measured, expected)) is red


def test_gate_sees_flops_of_the_imagenet_case() -> None:
    good = {"counts": {}, "time": {}, "imagenet": {"step": 12.2, "meta_gradient": 10.3}}
    assert gate.complaints(good, {}) == []
    bad = {"counts": {}, "time": {}, "imagenet": {"step": 12.4, "meta_gradient": float("nan")}}
    assert len(gate.complaints(bad, {})) == 2


# Counts and floors


def test_counts() -> None:
    x = torch.zeros(1000)

    def call() -> torch.Tensor:
        y = (x + 1)[:10].view(2, 5)  # 4000 bytes that stay with y, a launch and two views
        torch.nn.functional.nll_loss(y, torch.tensor([0, 1]))
        return y @ y.T

    found = counts.count(call)
    assert found.flops == 2 * 2 * 5 * 2
    assert 4000 <= found.saved_bytes < 4100
    assert found.launches < found.calls


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_floor_of_an_iteration_is_just_below_what_the_engine_computes(inner_steps: int) -> None:
    case = replace(SMALL, inner_steps=inner_steps)
    least, found = floors.Floors(case, "fp32").iteration.flops, gate.engine_counts(case)["flops"]
    assert 0.999 * found <= least <= found


def test_shapes_of_the_operators_are_those_of_the_networks() -> None:
    assert CASES["tiny"].shapes() == operators.CASES["tiny"]
    assert CASES["cifar"].shapes() == aot.CASES["cifar"]


# Contenders


@pytest.fixture(scope="module")
def judge() -> iterations.Judge:
    return iterations.Judge(SMALL, CPU, batches=1)


RATES = {"copy": 1e10, "fp32": 1e11}


def test_an_incorrect_contender_gets_no_speedup(judge: iterations.Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [iterations.REFERENCE, iterations.Way()]
    rows = list(iterations.iteration_rows(SMALL, ways, RATES, 2, CPU, judge))
    assert [row["correct"] for row in rows] == [True, True]
    assert rows[1]["speedup_over_reference"] > 0
    assert all(row["flops"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert rows[1]["error_float64"] < 1e-9

    monkeypatch.setattr(iterations, "Engine", partial(Engine, beta=0.4995))
    rows = list(iterations.iteration_rows(SMALL, ways, RATES, 2, CPU, judge))
    assert [row["correct"] for row in rows] == [True, False]
    assert not any(name.startswith("speedup") for name in rows[1])
    assert "inexact" in report.table(report.SECTIONS["iteration"][2], rows)


def test_what_cannot_be_had_is_a_row(judge: iterations.Judge) -> None:
    ways = [iterations.Way(mode="graph"), iterations.Way("official")]
    rows = list(iterations.iteration_rows(SMALL, ways, RATES, 1, CPU, judge))
    assert ["L2TError" in row["unavailable"] for row in rows] == [True, True]


def test_other_libraries_agree_or_say_that_they_are_missing(judge: iterations.Judge) -> None:
    rows = {row["by"]: row for row in iterations.meta_gradient_rows(SMALL, RATES, 1, CPU, judge)}
    assert sorted(rows) == ["engine", "higher", "reference", "torchopt"]
    for name in ("higher", "torchopt"):
        assert rows[name].get("correct") or rows[name]["unavailable"].startswith("ModuleNotFoundError")


# Telemetry


def fake_nvml(reasons: int = 0) -> Any:
    """A GPU of 250 W that has used 100 J more at each look."""
    energy = iter(range(0, 10**9, 100_000))
    bits = {name: 1 << i for i, name in enumerate(THROTTLES.values())}
    return SimpleNamespace(
        **bits,
        NVMLError=RuntimeError,
        NVML_CLOCK_SM=0,
        NVML_CLOCK_MEM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1980 - kind,
        nvmlDeviceGetTemperature=lambda handle, sensor: 60,
        nvmlDeviceGetPowerUsage=lambda handle: 250_000,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=2**30),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(energy),
    )


def test_telemetry() -> None:
    with Telemetry(CPU, fake_nvml()).watch(iterations=10, images=500) as row:
        assert row == {}
    assert row["joules_per_iteration"] == 10
    assert row["images_per_joule"] == 5
    assert row["telemetry"]["watts"] == 250
    assert row["throttled"] == []
    assert report.notes(row) == ""


def test_throttling_marks_the_row() -> None:
    with Telemetry(CPU, fake_nvml(reasons=1)).watch() as row:
        pass
    assert row["throttled"] == ["power"]
    assert report.notes(row) == "**throttled: power**"


def test_absent_nvml_is_said() -> None:
    def fails() -> None:
        raise RuntimeError("Driver Not Loaded")

    for telemetry in (Telemetry(CPU), Telemetry(CPU, SimpleNamespace(nvmlInit=fails))):
        with telemetry.watch(1, 1) as row:
            pass
        assert set(row) == {"telemetry"}
        assert row["telemetry"].startswith("no NVML: ")


# Times


def test_speedup_is_that_of_turns_which_belong_together() -> None:
    base, mine = [10.0, 100.0, 10.0], [5.0, 50.0, 5.0]
    assert timing.speedup(base, mine) == {"speedup": 2, "speedup_p20": 2, "speedup_p80": 2}
    assert timing.summary([3.0, 1.0, 2.0])["ms_median"] == 2


# Files and reports


def _iteration(T: int, by: str, ms: float, **more: Any) -> dict[str, Any]:
    row = {"kind": "iteration", "case": "tiny", "batch": 4, "inner_steps": T, "by": by, "mode": "eager"}
    row |= {"precision": "fp32", "memory": "save", "correct": True, "telemetry": "no NVML: x", "rounds": 3}
    row |= {"ms_median": ms, "ms_p20": ms, "ms_p80": ms, "peak_bytes": 10**6 * T, "flops": 10**9}
    row |= {"floor_ms": 1.0, "floor_bound": "flops", "floor_bytes": 1e6, "floor_flops": 1e9, "floor_fraction": 0.1}
    return row | more


TWICE = {"speedup_over_reference": 2.0, "speedup_p20_over_reference": 1.9, "speedup_p80_over_reference": 2.1}
FIXTURE = [
    {"kind": "run", "device": "Some GPU", "threads": 2, "torch": "2.11.0", "commit": "abc", "time": "2026"},
    {"kind": "rates", "rates": {"copy": 3e12, "fp32": 5e13}},
    _iteration(1, "reference", 30.0),
    _iteration(1, "engine", 15.0, **TWICE),
    _iteration(2, "reference", 40.0),
    _iteration(2, "engine", 20.0, **TWICE),
    {"kind": "iteration", "case": "tiny", "by": "official", "unavailable": "no checkout"},
]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_report_of_a_file(tmp_path: Path) -> None:
    written = report.write(_write(tmp_path / "run.jsonl", FIXTURE))
    content = written.read_text()
    assert "Some GPU" in content
    assert "| tiny | 4 | 2 | engine eager | 20 (20 – 20) | **2.00** (1.90 – 2.10) |" in content
    assert "no checkout" in content
    assert "no NVML: x" in content
    pictures = {path.name for path in written.parent.glob("*.png")}
    assert pictures == {"speedups.png", "roofline.png", "time_against_T.png", "memory_against_T.png"}
    assert all(f"]({picture})" in content for picture in pictures)


def test_numbers_of_the_readme_come_from_the_file_it_names() -> None:
    content = report.README.read_text()
    name = content.split(report.MARKERS[0].split("{}")[0])[1].split(" ")[0]
    assert report.readme_block(results.RESULTS / name) in content


def test_update_of_a_readme(tmp_path: Path) -> None:
    file, readme = _write(tmp_path / "run.jsonl", FIXTURE), tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKERS[0].format('old.jsonl')}\n17.3 ms\n{report.MARKERS[1]}\nafter\n")
    report.update_readme(file, readme)
    content = readme.read_text()
    assert content.startswith("before\n<!-- measured: run.jsonl -->")
    assert content.endswith("<!-- /measured -->\nafter\n")
    assert "17.3" not in content
    readme.write_text("no markers")
    with pytest.raises(L2TError, match="0 places"):
        report.update_readme(file, readme)


def test_comparison_of_two_files(tmp_path: Path) -> None:
    faster = [
        {**row, **{name: 0.5 * row[name] for name in ("ms_median", "ms_p20", "ms_p80")}}
        if row.get("by") == "engine"
        else row
        for row in FIXTURE
    ]
    compared = report.compare(_write(tmp_path / "a.jsonl", FIXTURE), _write(tmp_path / "b.jsonl", faster))
    lines = [line for line in compared.splitlines() if "tiny" in line]
    assert [("2.00 | differ" in line, "1.00 | within noise" in line) for line in lines] == [
        (False, True),
        (True, False),
    ] * 2
    with pytest.raises(L2TError, match="no measurement in common"):
        report.compare(tmp_path / "a.jsonl", _write(tmp_path / "c.jsonl", FIXTURE[:1]))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("[]\n")
    with pytest.raises(L2TError, match="no results file"):
        results.read(path)


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    """The operators are many rows: the run is killed as soon as the first of them is there."""
    output = tmp_path / "run.jsonl"
    command = [sys.executable, "-m", "benchmarks.suites.operators", "--device", "cpu", "--cases", "minute"]
    command += ["--no-compile", "--precisions", "fp32", "--rounds", "100000", "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (output.exists() and len(output.read_text().splitlines()) > 1):
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with output.open("a") as file:
        file.write('{"kind": "operator", "case": "min')  # what a kill in the middle of a line leaves
    first, rows = results.read(output)
    assert first["config"]["benchmark"] == "operators"
    assert rows[0]["kind"] == "rates"
    assert "Some" not in report.write(output).read_text()


def test_a_stage_out_of_time_is_killed_and_said(tmp_path: Path) -> None:
    from benchmarks.__main__ import Stage, carry_out

    output = tmp_path / "run.jsonl"
    sleeper = Stage("timeit", ("-n", "1", "-r", "1", "import time; time.sleep(60)"), 1.0, writes=False)
    failing = Stage("timeit", ("1/0",), 60.0, writes=False)
    assert not carry_out([sleeper, failing], [], output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["killed after 1 s", "ended with 1"]


def test_without_a_gpu_gpu_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import __main__ as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    assert command.main() == 2
    assert "there is no GPU here" in capsys.readouterr().err


# What a meta-gradient carries, and trainings side by side


def test_sensitivity_finds_dead_pairs_and_the_share_of_the_matching_loss() -> None:
    of = engine(lr=0.02)
    with torch.no_grad():
        of.learner.where[0].bias.fill_(-1e3)  # λ = 0 on every image
        of.learner.where[1].bias.fill_(1e3)  # λ = 6
    row = sensitivity.measure(of, [batch(i) for i in range(3)])
    assert row["dead"] == pytest.approx(2 / 15)
    assert row["pair_weights"][:2] == [0, 6]
    assert -1 <= row["cosine"] <= 1
    assert row["noise"] > 0
    assert 0 < row["share"] < 1
    of.beta *= 10
    assert sensitivity.measure(of, [batch(i) for i in range(2)])["share"] == pytest.approx(
        10 * row["share"] / (1 + 9 * row["share"])  # the norm of the matching loss's gradient is 10 times as large
    )
    same = sensitivity.measure(of, [batch(0), batch(0)])
    assert same["cosine"] == pytest.approx(1)


def test_side_by_side_begins_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of jobs trains the same cells, in turn."""
    seen: list[tuple[int, int, int]] = []

    def run(config: TableConfig, console: object) -> None:
        folder = config.runs / str(config.name)
        done = len(list(folder.glob("digits-*/*/seed-*")))
        seen.append((config.jobs or 0, config.threads or 0, done))
        for method in config.method:
            (folder / "digits-vgg9_bn-10" / method / "seed-0").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(side_by_side.table, "run", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    given = SimpleNamespace(methods=["scratch", "l2t-ww"], seeds=1, epochs=1, rounds=2, jobs=[1, 2])
    found = list(side_by_side.rows(given, CPU))
    assert seen == [(1, 4, 0), (2, 2, 0), (1, 4, 0), (2, 2, 0), (1, 4, 0), (2, 2, 0)]  # sources, then two rounds
    assert [(row["jobs"], row["round"]) for row in found] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert all(row["trainings_per_minute"] == pytest.approx(60 * 2 / row["seconds"]) for row in found)
