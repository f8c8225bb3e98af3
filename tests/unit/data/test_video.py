"""Video files become pictures of a bucket: frames by their times, sizes by the nearest shape, damage by name."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from sgmd_dist.data.video import (
    Bucket,
    UnreadableVideo,
    count_frames,
    cover,
    nearest_bucket,
    parse_buckets,
    probe,
    read_clip,
    resample,
)
from sgmd_dist.errors import UserError

WriteClip = Callable[..., None]
WIDE, TALL, SQUARE = Bucket(13, 32, 48), Bucket(13, 48, 32), Bucket(13, 32, 32)


def read(path: Path, bucket: Bucket, rate: int = 16) -> Tensor:
    fps = Fraction(rate)
    return read_clip(path, probe(path, bucket.num_frames / fps), fps, bucket)


# Buckets


def test_buckets_are_frames_height_and_width() -> None:
    assert parse_buckets("81x480x832, 49x832x480") == [Bucket(81, 480, 832), Bucket(49, 832, 480)]
    assert Bucket(81, 480, 832).name == "81x480x832"


@pytest.mark.parametrize("text", ["", "81x480", "81x480x832,", "81x480x0", "-1x2x3", "81*480*832", "1x2x3x4"])
def test_what_is_no_bucket_is_named(text: str) -> None:
    with pytest.raises(UserError, match=r"--buckets .* is no bucket; write frames x height x width, as 81x480x832"):
        parse_buckets(text)


def test_a_bucket_is_written_once() -> None:
    with pytest.raises(UserError, match="13x32x48 is there twice"):
        parse_buckets("13x32x48,13x32x48")


@pytest.mark.parametrize(
    "height, width, expected",
    [(720, 1280, WIDE), (1280, 720, TALL), (500, 480, SQUARE), (100, 1000, WIDE), (1000, 100, TALL)],
)
def test_the_nearest_bucket_has_the_nearest_aspect_ratio(height: int, width: int, expected: Bucket) -> None:
    for buckets in ([WIDE, TALL, SQUARE], [SQUARE, TALL, WIDE]):
        assert nearest_bucket(buckets, 100, height, width) == expected


def test_tall_and_wide_are_treated_alike() -> None:
    buckets = [Bucket(5, 100, 100), Bucket(5, 100, 400), Bucket(5, 400, 100)]
    for size in range(101, 400, 7):
        wide, tall = nearest_bucket(buckets, 5, 100, size), nearest_bucket(buckets, 5, size, 100)
        assert wide is not None and tall is not None
        assert (wide.height, wide.width) == (tall.width, tall.height)
        assert (wide.width == 400) == (size > 200)


def test_of_one_shape_the_longest_that_is_filled_then_the_nearest_area() -> None:
    buckets = [Bucket(5, 32, 48), Bucket(13, 32, 48), Bucket(13, 64, 96), Bucket(81, 32, 48)]
    assert nearest_bucket(buckets, 80, 30, 45) == Bucket(13, 32, 48)
    assert nearest_bucket(buckets, 80, 60, 90) == Bucket(13, 64, 96)
    assert nearest_bucket(buckets, 12, 60, 90) == Bucket(5, 32, 48)
    assert nearest_bucket(buckets, 81, 60, 90) == Bucket(81, 32, 48)
    assert nearest_bucket(buckets, 4, 60, 90) is None


def test_a_video_too_short_for_its_own_shape_takes_another() -> None:
    assert nearest_bucket([Bucket(81, 32, 48), Bucket(13, 48, 32)], 40, 32, 48) == Bucket(13, 48, 32)


# Geometry


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (64, 96, (32, 48, 0, 0)),
        (64, 192, (32, 96, 0, 24)),
        (192, 96, (96, 48, 32, 0)),
        (16, 24, (32, 48, 0, 0)),
        (1080, 1920, (32, 57, 0, 4)),
        (33, 48, (33, 48, 0, 0)),
    ],
)
def test_a_picture_is_resized_until_it_covers_and_cut_at_its_centre(
    height: int, width: int, expected: tuple[int, int, int, int]
) -> None:
    fit = cover(height, width, WIDE)
    assert (fit.height, fit.width, fit.top, fit.left) == expected


def test_a_cover_keeps_the_shape_and_wastes_one_side_at_most() -> None:
    for height in range(1, 2000, 97):
        for width in range(1, 2000, 89):
            fit = cover(height, width, WIDE)
            assert fit.height == 32 or fit.width == 48
            assert fit.height >= 32 and fit.width >= 48
            scale = max(32 / height, 48 / width)
            assert abs(fit.height - height * scale) <= 0.5 + 1e-9 and abs(fit.width - width * scale) <= 0.5 + 1e-9
            assert 0 <= (fit.height - 32) - 2 * fit.top <= 1 and 0 <= (fit.width - 48) - 2 * fit.left <= 1


def thirds(number: int, height: int, width: int) -> np.ndarray:
    """Red, green and blue thirds beside each other."""
    picture = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        picture[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
    return picture


def strongest(pictures: Tensor) -> list[list[int]]:
    """The strongest channel of each pixel of the first picture."""
    return pictures[0].argmax(dim=-1).tolist()


def test_the_middle_of_a_wide_picture_is_kept(tmp_path: Path, clips: WriteClip) -> None:
    clips(tmp_path / "wide.mp4", 13, height=64, width=192, paint=thirds)
    pictures = read(tmp_path / "wide.mp4", SQUARE)
    assert pictures.shape == (13, 32, 32, 3)
    assert strongest(pictures) == [[1] * 32] * 32
    whole = strongest(read(tmp_path / "wide.mp4", Bucket(13, 16, 48)))
    assert [whole[8][x] for x in (1, 14, 17, 30, 33, 46)] == [0, 0, 1, 1, 2, 2]


def test_the_middle_of_a_tall_picture_is_kept(tmp_path: Path, clips: WriteClip) -> None:
    clips(tmp_path / "tall.webm", 13, height=192, width=64, paint=lambda n, h, w: thirds(n, w, h).transpose(1, 0, 2))
    assert strongest(read(tmp_path / "tall.webm", SQUARE)) == [[1] * 32] * 32


def test_pixels_that_are_not_square_count_as_they_are_shown(tmp_path: Path, clips: WriteClip) -> None:
    clips(tmp_path / "anamorphic.mp4", 13, height=64, width=96, pixel_aspect=Fraction(2), paint=thirds)
    clip = probe(tmp_path / "anamorphic.mp4", Fraction(1))
    assert (clip.height, clip.width, clip.stored) == (64, 192, (64, 96))
    assert strongest(read(tmp_path / "anamorphic.mp4", SQUARE)) == [[1] * 32] * 32


@pytest.mark.parametrize("matrix, columns_become", [((0, 1, -1, 0), [0, 1, 2]), ((0, -1, 1, 0), [2, 1, 0])])
def test_a_video_that_a_phone_took_upright_is_turned(
    tmp_path: Path, clips: WriteClip, matrix: tuple[int, ...], columns_become: list[int]
) -> None:
    """QuickTime: x' = a x + c y, y' = b x + d y, rows growing downwards; (0, 1, -1, 0) turns right to down."""
    path = tmp_path / "turned.mp4"
    clips(path, 13, height=64, width=96, paint=thirds)
    data = bytearray(path.read_bytes())
    start = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    clip = probe(path, Fraction(1))
    assert (clip.height, clip.width, clip.stored) == (96, 64, (64, 96))
    shown = strongest(read(path, Bucket(13, 48, 32)))
    assert [shown[y][16] for y in (8, 24, 40)] == columns_become


@pytest.mark.parametrize("tag, name", [(1, "ITU709"), (5, "ITU601")])
def test_colours_are_those_that_the_file_s_matrix_says(tmp_path: Path, tag: int, name: str) -> None:
    path, colour = tmp_path / "colour.mp4", [200, 40, 120]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, 1
        picture = np.full((32, 32, 3), colour, np.uint8)
        for _ in range(13):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=name)))
        container.mux(stream.encode())
    assert (read(path, SQUARE)[5, 16, 16] - torch.tensor(colour)).abs().max() <= 2


# Frame rates


def timed(rate: Fraction, count: int, first: Fraction = Fraction(0)) -> Iterator[tuple[Fraction, int]]:
    return ((first + number / rate, number) for number in range(count))


@pytest.mark.parametrize(
    "rate, expected",
    [
        (Fraction(16), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Fraction(24), [0, 1, 3, 4, 6, 7, 9, 10]),
        (Fraction(30), [0, 1, 3, 5, 7, 9, 11, 13]),
        (Fraction(8), [0, 0, 1, 1, 2, 2, 3, 3]),
        (Fraction(60), [0, 3, 7, 11, 15, 18, 22, 26]),
    ],
)
@pytest.mark.parametrize("first", [Fraction(0), Fraction(-1, 3), Fraction(1000)])
def test_each_frame_is_the_one_on_the_screen(rate: Fraction, expected: list[int], first: Fraction) -> None:
    assert list(resample(timed(rate, 60, first), 60 / rate, Fraction(16), 8)) == expected


def test_uneven_times_are_followed() -> None:
    frames = [(Fraction(time, 10), name) for time, name in ((0, "a"), (1, "b"), (9, "c"), (10, "d"))]
    assert "".join(resample(frames, Fraction(11, 10), Fraction(10), 11)) == "abbbbbbbbcd"


@pytest.mark.parametrize("rate", [10, 12, 15, 16, 20, 24, 25, 30, 48, 50, 60, 120])
def test_times_in_whole_milliseconds_change_nothing(rate: int) -> None:
    exact = list(timed(Fraction(rate), 4 * rate))
    rounded = [(Fraction(round(time * 1000), 1000), number) for time, number in exact]
    duration = Fraction(4)
    count = count_frames(duration, Fraction(16))
    assert count == 64 == count_frames(duration - Fraction(1, 1000), Fraction(16))
    chosen = list(resample(rounded, duration, Fraction(16), count))
    assert chosen == list(resample(exact, duration, Fraction(16), count))


def test_frames_are_not_read_further_than_needed() -> None:
    def frames() -> Iterator[tuple[Fraction, int]]:
        yield from timed(Fraction(16), 9)
        raise AssertionError("read too far")

    assert list(resample(frames(), Fraction(100), Fraction(16), 8)) == list(range(8))


def test_too_few_frames_and_times_that_run_backwards_are_named() -> None:
    with pytest.raises(UnreadableVideo, match="ends after 5 of 8 frames"):
        list(resample(timed(Fraction(16), 5), Fraction(5, 16), Fraction(16), 8))
    with pytest.raises(UnreadableVideo, match="ends after 0 of 8 frames"):
        list(resample([], Fraction(1), Fraction(16), 8))
    with pytest.raises(UnreadableVideo, match=r"times run backwards: 0\.5 s after 1 s"):
        list(resample([(Fraction(t, 2), t) for t in (0, 2, 1, 3)], Fraction(2), Fraction(16), 20))


@pytest.mark.parametrize("ending", [".mp4", ".webm", ".mkv"])
@pytest.mark.parametrize("rate", [8, 16, 24, 30])
def test_frames_of_a_counted_clip(tmp_path: Path, clips: WriteClip, ending: str, rate: int) -> None:
    path = tmp_path / f"counted{ending}"
    clips(path, 40, rate=rate)
    clip = probe(path, Fraction(100))
    num_frames = count_frames(clip.duration, Fraction(16))
    assert num_frames == -(-40 * 16 // rate)
    assert clip.frames_per_second == pytest.approx(rate) and clip.stored == (32, 48)
    pictures = read_clip(path, clip, Fraction(16), Bucket(num_frames, 32, 48))
    numbers = [round(level / 4) for level in pictures.float().mean(dim=(1, 2, 3)).tolist()]
    assert numbers == [k * rate // 16 for k in range(num_frames)]


# Files that are no whole videos


def moving(number: int, height: int, width: int) -> np.ndarray:
    """Noise, so that every packet has bytes to damage."""
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def blanked(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) // 4) + data[len(data) * 3 // 4 :]


@pytest.mark.parametrize("damage", [cut, blanked, lambda data: b"", lambda data: b"no video" * 100])
def test_a_damaged_video_is_unreadable(tmp_path: Path, clips: WriteClip, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "damaged.mp4"
    clips(path, 24, height=64, width=96, paint=moving)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UnreadableVideo):
        read(path, Bucket(21, 64, 96))


def test_a_video_cut_off_has_the_frames_that_are_there(tmp_path: Path, clips: WriteClip) -> None:
    path = tmp_path / "cut.webm"
    clips(path, 48, height=64, width=96, paint=moving)
    path.write_bytes(cut(path.read_bytes()))
    clip = probe(path, Fraction(10))
    assert 13 <= count_frames(clip.duration, Fraction(16)) < 40
    assert read_clip(path, clip, Fraction(16), WIDE).shape == (13, 32, 48, 3)


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match="no such file"):
        probe(tmp_path / "nowhere.mp4", Fraction(1))
    with pytest.raises(UnreadableVideo, match="no such file"):
        probe(tmp_path, Fraction(1))
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UnreadableVideo, match="holds no video"):
        probe(path, Fraction(1))
