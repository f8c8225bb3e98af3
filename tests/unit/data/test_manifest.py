"""Manifests and folders become rows; what a row lacks is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgmd_dist.data.manifest import Row, read_captions, read_videos
from sgmd_dist.errors import UserError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"video": "a/0.mp4", "caption": "a ball", "width": 3}, {"video": "1.mp4", "caption": "über,\n“all”"}]
    path = write(tmp_path / "m.jsonl", "\n\n".join(json.dumps(row) for row in rows) + "\n")
    manifest = read_videos(path)
    assert manifest.rows == [Row(0, "a/0.mp4", "a ball"), Row(1, "1.mp4", "über,\n“all”")]
    assert manifest.path(manifest.rows[0]) == tmp_path / "a/0.mp4"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path: Path, encoding: str) -> None:
    text = 'caption,video,fps\r\n"a ball, red",0.mp4,16\r\n"two\nlines",1.mp4,\r\n,2.mp4,3\r\n'
    path = write(tmp_path / "m.csv", text, encoding)
    assert read_videos(path).rows == [
        Row(0, "0.mp4", "a ball, red"),
        Row(1, "1.mp4", "two\nlines"),
        Row(2, "2.mp4", ""),
    ]


def test_absolute_paths_stay(tmp_path: Path) -> None:
    manifest = read_videos(write(tmp_path / "m.csv", "video,caption\n/data/0.mp4,x\n"))
    assert manifest.path(manifest.rows[0]) == Path("/data/0.mp4")


def test_a_folder_s_videos_have_captions_beside_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "a.WEBM", "sub/c.mov", "notes.md", "sub/other.txt"):
        write(tmp_path / name, "")
    write(tmp_path / "b.txt", " a ball\n", "utf-8-sig")
    write(tmp_path / "sub/c.txt", "")
    assert read_videos(tmp_path).rows == [Row(0, "a.WEBM", None), Row(1, "b.mp4", "a ball"), Row(2, "sub/c.mov", "")]


def test_a_split_is_chosen_and_keeps_its_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "video,caption,split\n0.mp4,x,train\n1.mp4,y,test\n2.mp4,z,train\n3.mp4,u,\n")
    assert [row.number for row in read_videos(path, "train").rows] == [0, 2]
    assert read_videos(path, "test").rows == [Row(1, "1.mp4", "y", "test")]
    with pytest.raises(UserError, match=r"m\.csv: has the splits test, train; choose one with --split"):
        read_videos(path)
    with pytest.raises(UserError, match=r"--split dev: .*m\.csv has no such rows; splits: test, train"):
        read_videos(path, "dev")


def test_a_split_of_a_manifest_without_splits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--split train: .* has no such rows; splits: none"):
        read_videos(write(tmp_path / "m.csv", "video,caption\n0.mp4,x\n"), "train")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("m.jsonl", '{"video": "a", "caption": "b"}\n{"video": "a"', r"m\.jsonl, line 2: is not JSON"),
        ("m.jsonl", '\n["a", "b"]', r"m\.jsonl, line 2: is a JSON list; write one object per line"),
        ("m.jsonl", '{"caption": "b"}', r"m\.jsonl, line 1: no 'video'; a row needs video and caption"),
        ("m.jsonl", '{"video": "b", "text": "x"}', r"m\.jsonl, line 1: no 'caption'"),
        ("m.jsonl", '{"video": 3, "caption": "b"}', r"m\.jsonl, line 1: 'video' is 3; expected a text"),
        ("m.jsonl", '{"video": "a", "caption": ["b"]}', r"line 1: 'caption' is \['b'\]; expected a text"),
        ("m.jsonl", '{"video": "a", "caption": null}', "line 1: 'caption' is null"),
        ("m.jsonl", '{"video": "", "caption": "b"}', "line 1: 'video' is empty"),
        ("m.jsonl", "", r"m\.jsonl: holds no rows"),
        ("m.jsonl", "[" * 100_000, r"m\.jsonl, line 1: is not JSON"),
        ("m.csv", "", r"m\.csv: holds no rows"),
        ("m.csv", "video,caption\n", r"m\.csv: holds no rows"),
        ("m.csv", "path,caption\na,b\n", r"m\.csv, line 2: no 'video'"),
        ("m.csv", "video,caption\na,a ball, red\n", r"m\.csv, line 2: has not the header's 2 columns; quote captions"),
        ("m.csv", "video,caption\na,b\nc\n", r"m\.csv, line 3: has not the header's 2 columns"),
        ("m.csv", 'video,caption\na,"b\n', r"m\.csv: is no UTF-8 text after 0 rows"),
        ("m.txt", "a", r"m\.txt: expected a folder of videos or a manifest that ends in \.jsonl or \.csv"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_videos(write(tmp_path / name, text))


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "folder"])
def test_a_missing_source_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: (no such file or folder|expected a folder)"):
        read_videos(tmp_path / name)


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"video,caption\n\xff\xfe,\x00\n")
    with pytest.raises(UserError, match=r"m\.csv: is no UTF-8 text"):
        read_videos(tmp_path / "m.csv")


def test_a_folder_without_videos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no videos \(\.mp4, "):
        read_videos(tmp_path)


def test_captions_alone(tmp_path: Path) -> None:
    assert read_captions(write(tmp_path / "p.txt", "a\n\n b \n")) == [Row(0, None, "a"), Row(1, None, "b")]
    path = write(tmp_path / "p.jsonl", '{"caption": "a"}\n{"caption": "b", "video": "1.mp4"}\n')
    assert read_captions(path) == [Row(0, None, "a"), Row(1, "1.mp4", "b")]
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file"):
        read_captions(tmp_path / "nowhere.txt")
