"""Video files to pictures of a bucket: frames at a fixed rate, resized and cut to one of the sizes of a list."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from sgmd_dist.errors import UserError

TOLERANCE_S = Fraction(1, 2000)  # of a frame's time: Matroska and WebM store whole milliseconds
_DECODERS = {"err_detect": "explode"}  # by default damaged pictures are patched up from their neighbours
_LONGEST_REORDERING_S = 5  # between a packet's turn in the file and its turn on the screen

Frame = TypeVar("Frame")


class UnreadableVideo(Exception):
    """A file that is no whole video; the message is the reason, for the list of skipped rows."""


@dataclass(frozen=True, order=True)
class Bucket:
    """What every video of a shard has: frames, and pixels of height and width."""

    num_frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def parse_buckets(text: str) -> list[Bucket]:
    """The buckets of "81x480x832,81x832x480": frames x height x width each.

    Raises:
        UserError: an entry is none, or is there twice.
    """
    buckets = []
    for entry in text.split(","):
        sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", entry.strip())
        if sizes is None or "0" in sizes.groups():
            raise UserError(
                f"--buckets '{text}': '{entry}' is no bucket; write frames x height x width, as 81x480x832,81x832x480"
            )
        bucket = Bucket(*(int(size) for size in sizes.groups()))
        if bucket in buckets:
            raise UserError(f"--buckets '{text}': {bucket.name} is there twice; write it once")
        buckets.append(bucket)
    return buckets


def nearest_bucket(buckets: Sequence[Bucket], num_frames: int, height: float, width: float) -> Bucket | None:
    """The bucket for a video: among those that its frames fill the one of the nearest aspect ratio (of the logarithm,
    so that tall and wide are treated alike), of these the longest, of these the one of the nearest area.

    None where the video is too short for all. The order of `buckets` does not matter.
    """

    def distance(bucket: Bucket) -> tuple[float, int, float, Bucket]:
        shape = abs(math.log(bucket.width / bucket.height) - math.log(width / height))
        area = abs(math.log(bucket.width * bucket.height) - math.log(width * height))
        return round(shape, 6), -bucket.num_frames, round(area, 6), bucket

    return min((bucket for bucket in buckets if bucket.num_frames <= num_frames), key=distance, default=None)


@dataclass(frozen=True)
class Cover:
    """A picture resized to `height` x `width` holds the bucket's size at rows from `top` and columns from `left`."""

    height: int
    width: int
    top: int
    left: int


def cover(height: float, width: float, bucket: Bucket) -> Cover:
    """The least enlargement (or greatest reduction) of a picture that covers the bucket, cut at the centre."""
    scale = max(bucket.height / height, bucket.width / width)
    resized_height = max(bucket.height, round(height * scale))
    resized_width = max(bucket.width, round(width * scale))
    return Cover(
        resized_height,
        resized_width,
        top=(resized_height - bucket.height) // 2,
        left=(resized_width - bucket.width) // 2,
    )


# ------------------------------------------------------------------------------------------------------ frame rates


def count_frames(duration: Fraction, frames_per_second: Fraction) -> int:
    """How many frames a video of `duration` seconds has at another rate: number k is there if it begins before the end.

    The end is the sum of a time and a length, each known to TOLERANCE_S.
    """
    return max(0, math.ceil((duration - 2 * TOLERANCE_S) * frames_per_second))


def resample(
    frames: Iterable[tuple[Fraction, Frame]], duration: Fraction, frames_per_second: Fraction, count: int
) -> Iterator[Frame]:
    """The first `count` frames at another rate: number k is the frame on the screen k / `frames_per_second` seconds
    after the first one, as a player shows it; frames are repeated or left out, never mixed.

    Args:
        frames: (seconds, frame), in order. Not read further than needed.
        duration: seconds from the first frame to the end of the last one.

    Raises:
        UnreadableVideo: the frames end before, or their times run backwards.
    """
    num_given = 0
    last_frames = count_frames(duration, frames_per_second)
    start = shown_since = None
    shown: Frame | None = None
    for time, frame in frames:
        if start is None or shown_since is None or shown is None:
            start = time
        else:
            if time < shown_since:
                raise UnreadableVideo(f"times run backwards: {float(time):g} s after {float(shown_since):g} s")
            while num_given < count and start + num_given / frames_per_second < time - TOLERANCE_S:
                yield shown
                num_given += 1
        if num_given == count:
            return
        shown_since, shown = time, frame
    while shown is not None and num_given < min(count, last_frames):
        yield shown
        num_given += 1
    if num_given < count:
        raise UnreadableVideo(f"ends after {num_given} of {count} frames")


# ------------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Clip:
    """What a file's packets tell without decoding.

    Attributes:
        height, width: pixels as they are shown: square, and turned as the file says.
        stored: (height, width) in the file.
        frames_per_second: the average, or 0 where the file does not say.
        duration: seconds to the end of the last frame, or of what was looked at.
    """

    height: float
    width: float
    stored: tuple[int, int]
    frames_per_second: float
    duration: Fraction


def probe(path: Path, seconds: Fraction) -> Clip:
    """Look at the first `seconds` of a video: its packets, and one picture.

    Raises:
        UnreadableVideo: it cannot be opened, or holds no pictures.
    """
    picture, rate, aspect = _first_picture(path)
    times = _packet_times(path, seconds)
    start, (last, length) = times[0][0], times[-1]
    if length == 0:  # not in the file
        length = last - times[-2][0] if len(times) > 1 else 1 / rate if rate else Fraction(0)
    height, width = picture.height, picture.width * float(aspect)
    if picture.rotation % 180:
        height, width = width, height
    return Clip(height, width, (picture.height, picture.width), float(rate), last + length - start)


def _first_picture(path: Path) -> tuple[VideoFrame, Fraction, Fraction]:
    """The first picture, the average frames per second (0: unknown), and how wide a pixel is to its height."""
    with _opened(path) as container:
        stream = _video_stream(container)
        rate = Fraction(stream.average_rate or 0)
        try:
            picture = next(_pictures(container, stream), None)
        except (FFmpegError, OSError, ValueError) as error:
            raise _unreadable(error) from None
        if picture is None:
            raise UnreadableVideo("holds no pictures")
        return picture, rate, stream.sample_aspect_ratio or Fraction(1)


def _packet_times(path: Path, seconds: Fraction) -> list[tuple[Fraction, Fraction]]:
    """(Seconds, seconds of length) of the pictures, in the order in which they are shown."""
    times: list[tuple[Fraction, Fraction]] = []
    with _opened(path) as container:
        try:
            for packet in container.demux(_video_stream(container)):
                ticks = packet.dts if packet.pts is None else packet.pts
                if ticks is None or packet.is_discard:
                    continue
                times.append((ticks * packet.time_base, (packet.duration or 0) * packet.time_base))
                if times[-1][0] - times[0][0] > seconds + _LONGEST_REORDERING_S:
                    break
        except (FFmpegError, OSError, ValueError) as error:
            raise _unreadable(error) from None
    if not times:
        raise UnreadableVideo("its pictures have no times")
    return sorted(times)


def read_clip(path: Path, clip: Clip, frames_per_second: Fraction, bucket: Bucket) -> Tensor:
    """The beginning of a video as a bucket's pictures: uint8 `[F, H, W, 3]`, red, green, blue.

    Args:
        clip: what `probe` found.

    Raises:
        UnreadableVideo: pictures are damaged, or fewer than the packets promised.
    """
    fit = cover(clip.height, clip.width, bucket)
    pictures = []
    before: VideoFrame | None = None
    with _opened(path) as container:
        try:
            frames = _timed(_pictures(container, _video_stream(container)))
            for frame in resample(frames, clip.duration, frames_per_second, bucket.num_frames):
                if frame is not before:
                    before, picture = frame, _picture(frame, fit, bucket)
                pictures.append(picture)
        except (FFmpegError, OSError, ValueError) as error:
            raise _unreadable(error) from None
    return torch.from_numpy(np.stack(pictures))


def _opened(path: Path) -> InputContainer:
    if not path.is_file():
        raise UnreadableVideo("no such file")
    try:
        return av.open(str(path), metadata_errors="ignore")
    except (FFmpegError, OSError, ValueError) as error:
        raise _unreadable(error) from None


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise UnreadableVideo("holds no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    stream.codec_context.options = dict(_DECODERS)
    return stream


def _pictures(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise UnreadableVideo(f"picture {number} is damaged")
        yield frame


def _timed(frames: Iterable[VideoFrame]) -> Iterator[tuple[Fraction, VideoFrame]]:
    for frame in frames:
        ticks = frame.dts if frame.pts is None else frame.pts
        if ticks is None or frame.time_base is None:
            raise UnreadableVideo("its pictures have no times")
        yield ticks * frame.time_base, frame


def _picture(frame: VideoFrame, fit: Cover, bucket: Bucket) -> np.ndarray:
    """A frame as the bucket's `[H, W, 3]`, resized before it is turned."""
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    height, width = (fit.width, fit.height) if turns % 2 else (fit.height, fit.width)
    rgb = frame.reformat(width, height, format="rgb24", interpolation="BICUBIC").to_ndarray()
    turned = np.rot90(rgb, turns)
    return turned[fit.top : fit.top + bucket.height, fit.left : fit.left + bucket.width]


def _unreadable(error: BaseException) -> UnreadableVideo:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UnreadableVideo(" ".join(str(text).split())[:200])
