"""What stands around an edit in the worker: its settings, its log line, the line to its caller."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import SHORT, FakeEngine, answered, editor

from tav_opt.config import InputError, WorkerConfig
from tav_opt.contract import to_tensors
from tav_opt.repository import model_files
from tav_opt.serving import caller, opening
from tav_opt.serving.report import Report

# The log line and the settings.


def test_the_log_line_has_the_settings_and_no_prompt_unless_asked():
    config = replace(SHORT, prompts=("a secret\npanda",), negative_prompt="hush")
    _, report = answered(editor(FakeEngine()), to_tensors("toy", config))
    line = report.line(prompts=False)
    assert "clip='toy'" in line and "steps=3" in line and "sample=" in line
    assert "secret" not in line and "hush" not in line
    assert "secret" in report.line(prompts=True) and "hush" in report.line(prompts=True)
    assert "\n" not in report.line(prompts=True)
    assert Report().line(prompts=True)


def test_settings_survive_the_configuration_file(tmp_path):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = WorkerConfig(instances=2, queue_seconds=1.5, cache=Path('/x/"y" \\z'), log_prompts=True, cache_mib=7)
    model_files.write_model_files(tmp_path, config)
    text = (tmp_path / "tune_a_video_stream" / "config.pbtxt").read_text()
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert parsed.instance_group[0].count == 2
    assert parsed.dynamic_batching.default_queue_policy.default_timeout_microseconds == 1_500_000
    parameters = {name: {"string_value": value.string_value} for name, value in parsed.parameters.items()}
    assert model_files.read_parameters({"parameters": parameters}) == config
    assert model_files.read_parameters({}) == WorkerConfig()


@pytest.mark.parametrize("change", [{"instances": 0}, {"queue_size": 0}, {"queue_seconds": float("nan")}])
def test_settings_out_of_range_are_named(tmp_path, change):
    with pytest.raises(InputError, match=next(iter(change)).replace("_", " ")):
        model_files.write_model_files(tmp_path, WorkerConfig(**change))


def test_the_caches_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert opening.cache_folder(WorkerConfig()) == tmp_path / "tav-opt" / "inversions"
    assert opening.cache_folder(WorkerConfig(cache=Path("here"))) == Path("here")
    assert opening.cache_folder(WorkerConfig(cache_mib=0)) is None


# Between the two models.


def test_a_caller_that_hangs_up_is_noticed_and_one_that_never_was_too():
    asking = caller.Caller()
    line = caller.Line(asking.name)
    assert not line.is_hung_up()
    asking.hang_up()
    assert line.is_hung_up()
    for name in (asking.name, "0" * 32, "../../etc", "", None, 7, "x" * 10_000):
        assert caller.Line(name).is_hung_up(), name


def test_the_unary_face_needs_no_torch():
    code = "import sys, tav_opt.serving.unary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
