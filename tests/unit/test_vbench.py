"""Names and calls as VBench takes them. What stands in for VBench here writes down how it was called, and no more."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sgmd_dist import vbench
from sgmd_dist.errors import UserError


def prompt_of(name: str) -> str:
    """What VBench takes for the prompt of a file."""
    return re.sub(r"-\d+$", "", Path(name).stem)


# Names


@pytest.mark.parametrize("prompt", ["a red ball moving left", "A 3D model of a 1800s victorian house.", "Zürich, -5"])
def test_a_prompt_that_can_be_a_name_is_it(prompt: str) -> None:
    (stem,) = vbench.file_stems([prompt])
    assert prompt_of(f"{stem}-0.mp4") == prompt


def test_other_prompts_get_names_of_their_own(tmp_path: Path) -> None:
    prompts = ["on/off", "on_off", "é" * 200, "é" * 201, "x" * 400, "x" * 401]
    stems = vbench.file_stems(prompts)
    assert len(set(stems)) == len(prompts) and stems[1] == "on_off"
    for stem in stems:
        (tmp_path / f"{stem}-0.mp4").touch()
    assert len(list(tmp_path.iterdir())) == len(prompts)


def test_every_prompt_has_so_many_numbered_videos() -> None:
    videos = vbench.Videos(["a", "b"], 3, (3, 2, 4, 4), 4, 5.0)
    assert videos.names == ["a-0.mp4", "b-0.mp4", "a-1.mp4", "b-1.mp4", "a-2.mp4", "b-2.mp4"]


# Calls


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a command `vbench` of another environment first in PATH; returns the file in which its python, a stand-in,
    records arguments."""
    python, called = tmp_path / "env" / "bin" / "python3.10", tmp_path / "called"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done > "{called}"\nexit ${{VBENCH_CODE:-0}}\n')
    python.chmod(0o755)
    script = python.with_name("vbench")
    script.write_text(f"#!{python}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(python.parent), prepend=":")
    return called


def test_the_command_in_path_leads_to_its_python(recorder: Path) -> None:
    python = vbench.find_python()
    assert python is not None and Path(python).name == "python3.10"


def test_vbench_is_called_with_the_folder_and_its_prompts(recorder: Path, tmp_path: Path) -> None:
    python = vbench.find_python()
    assert python is not None
    vbench.run(vbench.command(python, tmp_path / "my videos", ["motion_smoothness", "dynamic_degree"], False))
    words = recorder.read_text().splitlines()
    assert words[:5] == ["-m", "vbench.launch.evaluate", "--dimension", "motion_smoothness", "dynamic_degree"]
    options = dict(zip(words[5::2], words[6::2], strict=True))
    assert options == {
        "--videos_path": f"{tmp_path}/my videos/videos",
        "--output_path": f"{tmp_path}/my videos/results",
        "--mode": "custom_input",
        "--prompt_file": f"{tmp_path}/my videos/prompts.json",
    }


def test_prompts_of_its_own_it_knows_by_name(tmp_path: Path) -> None:
    words = vbench.command("python", tmp_path, ["color"], True)
    assert "--prompt_file" not in words and words[-2:] == ["--mode", "vbench_standard"]


def test_its_failure_is_one_message(recorder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VBENCH_CODE", "3")
    with pytest.raises(UserError, match=r"VBench ended with exit code 3"):
        vbench.run(vbench.command(str(vbench.find_python()), tmp_path, ["color"], True))


def test_where_there_is_none_it_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vbench.find_python() is None
    assert json.dumps(vbench.ANY_PROMPT)
