"""What is to be encoded: the rows of a manifest, or the videos of a folder with their captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgmd_dist.data.sources import captions_in
from sgmd_dist.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".m4v", ".avi", ".ts", ".gif")
_VIDEO, _CAPTION, _SPLIT = "video", "caption", "split"


@dataclass(frozen=True)
class Row:
    """One caption, with or without its video.

    Attributes:
        number: its place in the whole manifest, from 0; the sample's key.
        video: as the manifest names it, relative to the manifest's folder; None in a list of captions.
        caption: None where a video of a folder has none.
        split: the part of the data set that it belongs to, if the manifest says.
    """

    number: int
    video: str | None
    caption: str | None
    split: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The rows of one data set, and the folder that their videos' names start from."""

    folder: Path
    rows: list[Row]

    def path(self, row: Row) -> Path:
        """Where the video of `row` lies."""
        assert row.video is not None
        return self.folder / row.video


def read_videos(source: Path, split: str | None = None) -> Manifest:
    """The rows of a `.jsonl` or `.csv` manifest, or the videos of a folder (and its subfolders) by name.

    A manifest's rows have `video` and `caption`, and `split` if they like; further columns are not looked at. A folder
    has NAME.txt beside NAME.mp4.

    Args:
        split: take the rows of this split only; they keep their numbers.

    Raises:
        UserError: there is no such source, a row lacks something, or `split` does not fit the rows.
    """
    if source.is_dir():
        manifest = Manifest(source, _videos_of(source))
    else:
        manifest = Manifest(source.parent, list(_manifest_rows(source, [_VIDEO, _CAPTION])))
    return Manifest(manifest.folder, _chosen(manifest.rows, split, source))


def read_captions(source: Path, split: str | None = None) -> list[Row]:
    """The captions of a text file, one per line, or of a `.jsonl` or `.csv` manifest; videos are not looked at.

    Raises:
        UserError: as `read_videos`.
    """
    if source.suffix in (".jsonl", ".csv"):
        rows = list(_manifest_rows(source, [_CAPTION]))
    else:
        lines = captions_in(str(source), str(source))
        rows = [Row(number, None, caption) for number, caption in enumerate(lines)]
    return _chosen(rows, split, source)


def _videos_of(folder: Path) -> list[Row]:
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    rows = []
    for number, video in enumerate(videos):
        beside = video.with_suffix(".txt")
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{beside}: cannot be read as UTF-8 text ({error}); mend or remove it") from None
        rows.append(Row(number, video.relative_to(folder).as_posix(), caption))
    if not rows:
        raise UserError(f"{folder}: holds no videos ({', '.join(VIDEO_SUFFIXES)}); give another folder or a manifest")
    return rows


def _manifest_rows(path: Path, required: Sequence[str]) -> Iterator[Row]:
    readers = {".jsonl": json_lines, ".csv": _csv_lines}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected a folder of videos or a manifest that ends in {' or '.join(readers)}")
    number = -1
    try:
        for number, (line, values) in enumerate(readers[path.suffix](path)):
            where = f"{path}, line {line}"
            for name in required:
                if name not in values:
                    raise UserError(f"{where}: no '{name}'; a row needs {' and '.join(required)}")
            found = {name: _text(values.get(name), name, where) for name in (_VIDEO, _CAPTION, _SPLIT)}
            if _VIDEO in required and not found[_VIDEO]:
                raise UserError(f"{where}: 'video' is empty; name the file")
            if found[_CAPTION] is None:
                raise UserError(f"{where}: 'caption' is null; write a text, \"\" for none")
            yield Row(number, found[_VIDEO] or None, found[_CAPTION], found[_SPLIT] or None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder (working directory {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no UTF-8 text after {number + 1} rows ({error}); mend the file") from None
    if number < 0:
        raise UserError(f"{path}: holds no rows; write one per video")


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSON Lines file with the numbers of their lines, from 1.

    Raises:
        UserError: a line is no object.
        OSError, UnicodeDecodeError: the file cannot be read.
    """
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {line}: is not JSON ({error}); write one object per line") from None
            if not isinstance(values, dict):
                raise UserError(f"{path}, line {line}: is a JSON {type(values).__name__}; write one object per line")
            yield line, values


def _csv_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for values in reader:
            if None in values or None in values.values():
                raise UserError(
                    f"{path}, line {reader.line_num}: has not the header's {len(reader.fieldnames or [])} columns;"
                    " quote captions that hold commas"
                )
            yield reader.line_num, values


def _text(value: Any, name: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: '{name}' is {value!r}; expected a text")
    return value


def _chosen(rows: list[Row], split: str | None, source: Path) -> list[Row]:
    splits = sorted({row.split for row in rows if row.split is not None})
    if split is None:
        if splits:  # a test split must not slip into training
            raise UserError(f"{source}: has the splits {', '.join(splits)}; choose one with --split, a folder for each")
        return rows
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        raise UserError(f"--split {split}: {source} has no such rows; splits: {', '.join(splits) or 'none'}")
    return chosen
