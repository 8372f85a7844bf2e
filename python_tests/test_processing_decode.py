"""Choosing and decoding the frames of videos."""

from __future__ import annotations

import numpy as np
import pytest
from processing_helpers import (
    flat,
    gray_ramp,
    noise,
    one_thread,  # noqa: F401
    vendor_1_5,
    write_video,
)

from keye_ops.processing import (
    ProcessingConfig,
    ShortVideoError,
    decode_frames,
    frame_timestamps,
    probe_video,
    process_video,
    sample_indices,
)

av = pytest.importorskip("av")

RELEASED = ProcessingConfig(version="1.5")
TOKEN = 784


@pytest.mark.parametrize(
    ("video", "options", "preview", "released"),
    [
        ((90, 30), {}, [0, 18, 36, 53, 71, 89], [0, 18, 36, 53, 71, 89]),
        # 3.5 s at 2 a second: 7, made even for Preview.
        ((105, 30), {}, [0, 21, 42, 62, 83, 104], [0, 17, 35, 52, 69, 87, 104]),
        # A third of a second: Preview takes 4 at least, 1.5 would take none.
        ((10, 30), {}, [0, 3, 6, 9], [0]),
        ((8, 1), {}, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        ((40, 10), {"fps": 1}, [0, 13, 26, 39], [0, 13, 26, 39]),
        ((40, 10), {"max_frames": 5}, [0, 13, 26, 39], [0, 10, 20, 29, 39]),
        ((40, 10), {"video_start": 1, "video_end": 2}, [10, 13, 17, 20], [10, 20]),
    ],
)
def test_known_indices(video, options, preview, released):
    assert sample_indices(*video, version="preview", **options) == preview
    assert sample_indices(*video, version="1.5", **options) == released


def test_long_videos_are_capped():
    preview = sample_indices(100_000, 25, version="preview")
    released = sample_indices(100_000, 25, version="1.5")
    assert (len(preview), len(released)) == (768, 1365)
    for indices in (preview, released):
        assert (indices[0], indices[-1]) == (0, 99_999)
        assert indices == sorted(set(indices))
    assert len(sample_indices(100_000, 25, version="1.5", min_pixels=96 * TOKEN)) == 682
    assert len(sample_indices(100_000, 25, version="1.5", total_pixels=480 * TOKEN)) == 10


def test_explicit_number_of_frames():
    # round(7 / 2) is 4: ties go to even.
    assert len(sample_indices(90, 30, version="preview", num_frames=7)) == 8
    assert len(sample_indices(90, 30, version="preview", num_frames=5)) == 4


def test_number_of_frames_equals_the_released_one(monkeypatch):
    vendor = vendor_1_5(monkeypatch)
    for total in (1, 2, 17, 300, 4000):
        for rate in (0.5, 23.976, 25, 59.94):
            for options in ({}, {"fps": 1.5}, {"fps": 60.0}, {"max_frames": 9}):
                expected = vendor.smart_nframes(options, total, rate)
                indices = sample_indices(total, rate, version="1.5", **options)
                assert len(indices) == max(expected, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_frames": 0}, "total_frames must be positive, got 0"),
        ({"video_fps": 0.0}, r"video_fps must be positive, got 0\.0"),
        ({"fps": -1.0}, r"fps must be positive, got -1\.0"),
        ({"max_frames": 0}, "max_frames must be positive, got 0"),
        ({"fps": 1.0, "num_frames": 4}, r"give fps or num_frames, not both, got 1\.0 and 4"),
        ({"num_frames": 200}, r"the number of frames must be in \[2, 90\], got 200"),
        ({"total_frames": 1}, r"the number of frames must be in \[2, 1\], got 0"),
        ({"video_start": 2.5, "video_end": 1.0}, r"range 2\.5 s to 1\.0 s holds no two"),
        ({"video_start": 99.0}, r"of 3\.00 s \(90 frames, 30 a second\)"),
        ({"version": "2"}, "version must be 'preview' or '1.5', got '2'"),
    ],
)
def test_bad_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_indices(**{"total_frames": 90, "video_fps": 30.0, "version": "preview", **arguments})


def test_timestamps_are_rounded_to_float32():
    assert frame_timestamps([0, 3, 30], 20) == [0.0, float(np.float32(0.15)), 1.5]
    # In float64 3/20 is just below 0.15 and would read 0.1.
    assert format(frame_timestamps([3], 20)[0], ".1f") == "0.2"


# ---- decoding ----


def test_decoding_returns_the_frames_asked_for(tmp_path):
    path = write_video(tmp_path / "ramp.mp4", gray_ramp(25), fps=10)
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.name) == (25, 10.0, str(path))
    indices = [0, 1, 7, 8, 16, 24]
    for source in (path, str(path), f"file://{path}", path.read_bytes()):
        frames = list(decode_frames(source, indices))
        assert [frame.shape for frame in frames] == [(64, 96, 3)] * 6
        assert all(frame.dtype == np.uint8 for frame in frames)
        brightness = [frame.mean() for frame in frames]
        assert brightness == pytest.approx([16 + 8 * i for i in indices], abs=3)
    assert list(decode_frames(path, [])) == []


def test_rotated_files_come_out_upright(tmp_path):
    frame = flat((30, 30, 30), 64, 96)
    frame[:, :48] = 220  # bright on the left
    path = write_video(tmp_path / "phone.mp4", [frame] * 4)
    raw = bytearray(path.read_bytes())
    # The display matrix of the track header: a quarter turn clockwise, as phones write it.
    matrix = raw.index(b"tkhd") + 4 + 40
    values = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    raw[matrix : matrix + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in values)
    upright = next(decode_frames(bytes(raw), [0]))
    assert upright.shape == (96, 64, 3)
    assert upright[:40].mean() > 200
    assert upright[56:].mean() < 50


def test_missing_frames_are_reported(tmp_path):
    path = write_video(tmp_path / "ramp.mp4", gray_ramp(5))
    with pytest.raises(ShortVideoError, match=r"only 5 of the 10 frames of .*ramp\.mp4"):
        list(decode_frames(path, [0, 9]))


@pytest.fixture(scope="module")
def cut_stream(tmp_path_factory):
    """A transport stream whose first part is lost, so that it starts between two key frames."""
    folder = tmp_path_factory.mktemp("cut")
    frames = [noise(64, 96, seed) for seed in range(30)]
    path = write_video(folder / "whole.ts", frames, g="10", bf="0", sc_threshold="0")
    raw = path.read_bytes()
    start = len(raw) // 5 // 188 * 188
    path = folder / "cut.ts"
    path.write_bytes(raw[start:])
    return path


def test_damaged_stream_is_used_as_far_as_it_decodes(cut_stream):
    held = probe_video(cut_stream).num_frames
    decoded = sum(1 for _ in decode_all(cut_stream))
    assert 10 <= decoded < held
    with pytest.warns(UserWarning, match=rf"only {decoded} of the {held} frames"):
        out = process_video(cut_stream, RELEASED)
    assert len(out.is_fast) == int(decoded / probe_video(cut_stream).fps * 2)


def decode_all(path):
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                continue


def test_unreadable_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"probe_video: no such file: .*missing\.mp4"):
        probe_video(tmp_path / "missing.mp4")
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        process_video(tmp_path / "missing.mp4")
    path = tmp_path / "bad.mp4"
    for content in (b"", b"not a video at all" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*bad\.mp4 as a video"):
            process_video(path)
    whole = write_video(tmp_path / "whole.mp4", gray_ramp(5)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # the index at the end is lost
    with pytest.raises(ValueError, match=r"bad\.mp4 (as a video|has no video stream)"):
        process_video(path)
    with pytest.raises(ValueError, match="cannot read <bytes> as a video"):
        process_video(b"rubbish")
    with pytest.raises(ValueError, match=r"addresses are not fetched; download https://x/a\.mp4"):
        process_video("https://x/a.mp4")
    with pytest.raises(ValueError, match="need a path or bytes, got int"):
        probe_video(5)


def test_sound_without_pictures_is_refused(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.wav has no video stream"):
        process_video(path)


def test_video_without_frames_is_refused(tmp_path):
    path = tmp_path / "empty.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.open()
        container.start_encoding()
    with pytest.raises(ValueError, match=r"empty\.avi has a video stream without frames"):
        process_video(path)
