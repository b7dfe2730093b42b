"""`embedkit doctor` on this machine and on machines that are made up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from embedkit.cli import environment
from embedkit.cli.environment import Finding, examine
from embedkit.runtime import machine
from tests.cli.command import embedkit


class MadeUp:
    """A machine with these packages, whose probes answer as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packages = {
            "numpy": "2.4.0",
            "pillow": "13.0.0",
            "faiss-cpu": "1.15.1",
            "rich": "15.0",
            "typer": "0.29.2",
            "onnxruntime": "1.31.1",
        }
        self.answers = {
            "onnxruntime": ('["1.31.1", ["CPUExecutionProvider"]]', ""),
            "faiss": ('["1.15.1", ["AVX2"]]', ""),
            "cuda": ("CUDAExecutionProvider\n", ""),
            "tensorrt": ("11.4.0\n", ""),
            "tensorrt_rtx": ("1.7.1\n", ""),
        }
        self.smi: tuple[str, str] | None = None
        monkeypatch.setattr(environment, "installed", self.packages.get)
        monkeypatch.setattr(environment, "_probe", self.answers.__getitem__)
        monkeypatch.setattr(environment, "_run", lambda command: self.smi)
        monkeypatch.setattr(
            environment.shutil, "which", lambda name: name if self.smi is not None else None
        )

    def findings(self) -> dict[str, Finding]:
        return {one.name: one for one in examine(Path.cwd())}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MadeUp:
    monkeypatch.chdir(tmp_path)
    return MadeUp(monkeypatch)


def test_here_it_ends_well_and_names_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    torch_before = sys.modules.get("torch")
    assert embedkit("doctor", "--json", "--require", "cpu") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "embedkit.doctor/1"
    found = {one["name"]: one for one in document["findings"]}
    assert found["onnxruntime"]["status"] == "ok"
    assert "CPU" in found["onnxruntime"]["told"]
    assert found["faiss"]["status"] == "ok"
    assert found["numpy"]["told"]
    assert document["works"]["cpu"] is True
    assert document["missing"] == []
    assert {one["status"] for one in document["findings"]} <= {"ok", "warn", "bad", "absent"}
    assert sys.modules.get("torch") is torch_before


def test_a_light_machine_is_well_and_is_told_how_to_train(
    made_up: MadeUp, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert embedkit("doctor") == 0
    out, err = capsys.readouterr()
    assert 'pip install "embedkit[train]"' in out
    assert "works     cpu\n" in err
    assert max(map(len, out.splitlines())) <= 80
    assert made_up.findings()["torch"].status == "absent"


def test_what_was_required_and_is_missing_ends_with_6_and_the_line_to_type(
    made_up: MadeUp, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedkit("doctor", "--require", "cpu,train") == 6
    err = capsys.readouterr().err
    assert "error: train was required" in err
    assert 'try: pip install "embedkit[train]"' in err
    assert embedkit("doctor", "--require", "cuda", "--json") == 6
    assert json.loads(capsys.readouterr().out)["missing"] == ["cuda"]
    del made_up.packages["onnxruntime"]
    assert embedkit("doctor", "--require", "cpu") == 6
    assert 'try: pip install "embedkit[cpu]"' in capsys.readouterr().err


def test_an_unknown_requirement_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert embedkit("doctor", "--require", "cdua") == 2
    assert "did you mean 'cuda'?" in capsys.readouterr().err


def test_a_package_below_its_floor_is_named_with_the_floor(made_up: MadeUp) -> None:
    made_up.packages |= {"pillow": "9.5", "onnxruntime": "1.20.1"}
    found = made_up.findings()
    assert found["pillow"].status == "bad"
    assert found["pillow"].hint == 'pip install --upgrade "pillow>=12.3"'
    assert found["onnxruntime"].status == "bad"
    assert "1.27" in found["onnxruntime"].told


def test_two_onnxruntime_wheels_are_a_clash(made_up: MadeUp) -> None:
    made_up.packages["onnxruntime-gpu"] = "1.31.1"
    clash = made_up.findings()["onnxruntime"]
    assert clash.status == "bad"
    assert clash.hint.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && ")


def test_a_library_that_takes_its_process_down_is_a_finding(made_up: MadeUp) -> None:
    made_up.answers["faiss"] = ("", "the process was ended by signal 4")
    found = made_up.findings()["faiss"]
    assert found.status == "bad"
    assert "signal 4" in found.told
    assert found.hint == "pip install --force-reinstall faiss-cpu"


GPU = "NVIDIA L4, 560.35, 8.9, 23034 MiB\n"


def test_a_gpu_is_described_and_cuda_is_believed_only_when_it_started(made_up: MadeUp) -> None:
    made_up.smi = (GPU, "")
    del made_up.packages["onnxruntime"]
    made_up.packages |= {"onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0"}
    found = made_up.findings()
    assert found["NVIDIA driver"].told == "560.35: NVIDIA L4, compute 8.9, 23034 MiB"
    assert found["CUDA"].status == "ok"
    assert found["tensorrt"].status == "ok"
    made_up.answers["cuda"] = ("CPUExecutionProvider\n", "")
    assert made_up.findings()["CUDA"].status == "bad"
    made_up.answers["cuda"] = ("", "libcudnn.so.9: cannot open shared object file")
    assert "libcudnn" in made_up.findings()["CUDA"].told


def test_a_gpu_without_its_wheel_and_a_driver_that_is_silent_are_told(made_up: MadeUp) -> None:
    made_up.smi = (GPU, "")
    found = made_up.findings()["CUDA"]
    assert (found.status, found.hint.split(" && ")[1]) == ("warn", 'pip install "embedkit[gpu]"')
    made_up.smi = ("", "NVIDIA-SMI has failed because it could not communicate")
    found = made_up.findings()["NVIDIA driver"]
    assert found.status == "bad"
    assert "could not communicate" in found.told
    assert made_up.findings()["CUDA"].status == "absent"


def test_a_folder_that_cannot_be_written_is_a_finding(tmp_path: Path) -> None:
    found = {one.name: one for one in environment._disk(tmp_path / "gone")}
    assert found["write here"].status == "bad"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "what"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_is_read_from_either_kind_of_cgroup(
    files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine.cpu_limit(tmp_path) == cores


def test_the_graph_of_the_cuda_probe_is_valid_and_runs() -> None:
    data = bytes.fromhex(environment._IDENTITY)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    assert ort.InferenceSession(data, providers=["CPUExecutionProvider"]).get_inputs()[0].name


def test_versions_are_compared_by_number() -> None:
    assert environment._numbers("2.15.0+cu132") == (2, 15, 0)
    assert environment._numbers("1.9") < environment._numbers("1.27")
    assert environment._numbers("") == ()
