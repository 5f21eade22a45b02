"""`.ci/gpu.py`, the driver of a GPU's tests and measurements, on stages made up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="what is driven are Triton's kernels")

from benchmarks import gpu

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """`.ci/gpu.py`, with results of its own and OUT beside them."""
    spec = importlib.util.spec_from_file_location("gpu_driver", ROOT / ".ci" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "rows_file", lambda session: tmp_path / "results" / "gpu-x.csv")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return module


def test_driver_goes_on_after_failed_tests_and_a_lost_device(driver, tmp_path, monkeypatch, capsys):
    asked = []

    def command(self, module, *arguments):
        if module == "benchmarks.gpu_tools.counters":
            return [sys.executable, "-c", "print('counted')"]
        asked.append(arguments)
        code = {2: gpu.TRY_AGAIN, 3: 0}.get(len(asked), 0)  # the first call is the one that warms
        return [sys.executable, "-c", f"print('row'); raise SystemExit({code})"]

    monkeypatch.setattr(driver.Session, "command", command)
    failing = [sys.executable, "-c", "print('1 failed'); raise SystemExit(1)"]
    monkeypatch.setattr(driver, "test_command", lambda rehearse, part: failing)
    printing = [sys.executable, "-c", "print('done')"]
    monkeypatch.setattr(driver, "build_command", lambda rehearse: printing)
    monkeypatch.setattr(driver, "cuda_test_command", lambda rehearse, part: printing)
    monkeypatch.setattr(driver, "sanitizer_command", lambda rehearse, tool: printing)
    assert driver.run(driver.Session(300, rehearse=True)) == 1
    assert [a[0] for a in asked] == ["--warm", "--budget", "--budget"]
    assert asked[1][-1].endswith("gpu-x.csv")
    assert asked[2][-1] == "--resume"
    told = capsys.readouterr().out
    assert "tests: exit code 1; benchmark: exit code 0; sanitizer: 0 failed" in told
    assert "done\nsanitizer: gpu-racecheck: exit code 0" in told
    assert "counted\ncounters: exit code 0" in told
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "gpu-warm.log",
        "gpu-tests-0.log",
        "gpu-tests-1.log",
        "gpu-benchmark.log",
        "gpu-build.log",
        "gpu-counters.log",
        "gpu-cuda-tests-0.log",
        "gpu-memcheck.log",
        "gpu-racecheck.log",
    }


def test_driver_tells_of_faults_and_of_an_object_that_was_not_built(driver, monkeypatch, capsys):
    def ends(code: int, told: str = "") -> list[str]:
        return [sys.executable, "-c", f"print({told!r}); raise SystemExit({code})"]

    monkeypatch.setattr(driver.Session, "command", lambda *_: ends(0))
    monkeypatch.setattr(driver, "test_command", lambda rehearse, part: ends(0))
    monkeypatch.setattr(driver, "cuda_test_command", lambda rehearse, part: ends(0))
    tools = {"memcheck": ends(1), "racecheck": ends(255, "Device not supported")}
    monkeypatch.setattr(driver, "sanitizer_command", lambda rehearse, tool: tools[tool])
    monkeypatch.setattr(driver, "build_command", lambda rehearse: ends(0))
    assert driver.run(driver.Session(300, rehearse=True)) == 1
    assert "sanitizer: 1 failed" in capsys.readouterr().out
    monkeypatch.setattr(driver, "build_command", lambda rehearse: ends(1))
    assert driver.run(driver.Session(300, rehearse=True)) == 1
    told = capsys.readouterr().out
    assert "the CUDA object was not built: its part is left out" in told
    assert "build: exit code 1; tests: exit code 0" in told


def test_driver_tunes_for_its_whole_time_and_keeps_the_table(driver, tmp_path, monkeypatch, capsys):
    def command(self, module, *arguments):
        assert module == "benchmarks.gpu_tools.tune"
        assert 200 < float(arguments[arguments.index("--budget") + 1]) < 300
        path = arguments[arguments.index("--out") + 1]
        return [sys.executable, "-c", f"open({path!r}, 'w').write('{{}}')"]

    monkeypatch.setattr(driver.Session, "command", command)
    assert driver.tune(driver.Session(300, rehearse=True)) == 0
    assert "layouts: results/gpu-tuned.json" in capsys.readouterr().out
    assert (tmp_path / "out" / "gpu-tuned.json").read_text() == "{}"


def test_driver_ends_what_outlasts_its_time(driver):
    session = driver.Session(100, rehearse=True)
    forever = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = session.start(forever, driver.RESULTS / "gpu-x.log")
    assert session.wait(process, 0.5) == 124
    assert process.poll() is not None


def test_driver_commands_name_what_is_there(driver, request):
    assert request.config.getoption("--part") is None  # ValueError where conftest.py lacks it
    session = driver.Session(100, rehearse=False)
    assert session.benchmark("--warm", "0/1")[1:] == ["-m", "benchmarks.gpu", "--warm", "0/1"]
    command = driver.test_command(rehearse=False, part="1/4")
    assert command[-4:] == ["--part", "1/4", "--device", "cuda"]
    assert (ROOT / driver.test_command(rehearse=True, part="0/2")[-1]).exists()
    command = driver.cuda_test_command(rehearse=False, part="1/4")
    assert command[-6:] == ["--part", "1/4", "--device", "cuda", "--backend", "cuda"]
    assert (ROOT / driver.cuda_test_command(rehearse=True, part="0/1")[-1]).exists()
    assert (ROOT / driver.build_command(rehearse=False)[1]).exists()
    assert (ROOT / driver.sanitizer_command(rehearse=False, tool="memcheck")[-1]).exists()
    assert (ROOT / driver.Session(100, rehearse=True).benchmark()[1]).exists()
    for module in ("benchmarks.gpu_tools.counters", "benchmarks.gpu_tools.tune"):
        assert importlib.util.find_spec(session.command(module)[2]) is not None
