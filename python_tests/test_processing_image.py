"""Reading, resizing, normalising and cutting images."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from processing_helpers import noise, vendor_1_5

from keye_ops.processing import (
    ProcessingConfig,
    load_image,
    normalize,
    patchify,
    process_image,
    unpatchify,
)

Image = pytest.importorskip("PIL.Image")

PREVIEW, RELEASED = ProcessingConfig(version="preview"), ProcessingConfig(version="1.5")
SIZES = [(1, 1), (1, 150), (27, 29), (56, 56), (100, 333), (641, 479), (1080, 1920)]


def oracle(picture, config):
    """The same processing by a processor of another model with the same layout."""
    module = pytest.importorskip(
        "transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl"
    )
    processor = module.PaddleOCRVLImageProcessorPil(
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        resample=config.resample,
    )
    out = processor(picture, return_tensors="pt")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("config", [PREVIEW, RELEASED], ids=lambda c: c.version)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_are_bit_equal_to_the_oracle(size, config):
    picture = Image.fromarray(noise(*size))
    # The oracle has no reading step, so it is given what that step makes by Pillow.
    height, width = {
        (1, 1): (56, 56),
        (1, 150): (28, 140),
        (27, 29): (56, 84),
        (56, 56): (56, 56),
        (100, 333): (112, 336),
        (641, 479): (644, 476),
        (1080, 1920): (1092, 1932),
    }[size]
    expected, grid = oracle(picture.resize((width, height)), config)
    ours = process_image(picture, config)
    assert ours.grid_thw == grid
    assert ours.pixel_values.dtype == torch.float32
    assert torch.equal(ours.pixel_values, expected)


def test_large_image_is_resized_twice():
    picture = Image.fromarray(noise(1080, 1920))
    out = process_image(picture, PREVIEW, keep_uint8=True)
    assert out.grid_thw == (1, 52, 94)
    twice = picture.resize((1932, 1092)).resize((1316, 728))
    once = picture.resize((1316, 728))
    rebuilt = unpatchify(out.pixel_values, out.grid_thw)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(rebuilt, np.asarray(twice))
    assert not np.array_equal(rebuilt, np.asarray(once))


def test_reading_equals_the_released_utilities(monkeypatch):
    vendor = vendor_1_5(monkeypatch)
    for size in ((33, 91), (640, 480)):
        for mode in ("RGB", "RGBA", "L", "P", "LA", "CMYK", "1"):
            picture = Image.fromarray(noise(*size)).convert(mode)
            expected = np.asarray(vendor.fetch_image({"image": picture}))
            out = process_image(picture, RELEASED, keep_uint8=True)
            assert np.array_equal(
                unpatchify(out.pixel_values, out.grid_thw)[0].permute(1, 2, 0).numpy(), expected
            )


def test_patchify_is_raster_order():
    frames = torch.arange(2 * 3 * 28 * 42).reshape(2, 3, 28, 42)
    patches, grid = patchify(frames)
    assert grid == (2, 2, 3)
    for index, (t, row, column) in enumerate(np.ndindex(2, 2, 3)):
        rows, columns = slice(14 * row, 14 * row + 14), slice(14 * column, 14 * column + 14)
        assert torch.equal(patches[index], frames[t, :, rows, columns])
    assert torch.equal(unpatchify(patches, grid), frames)
    assert torch.equal(patchify(frames.permute(0, 2, 3, 1))[0], patches)
    assert torch.equal(patchify(frames.permute(0, 2, 3, 1).numpy())[0], patches)


def test_patchify_of_no_frames_is_empty():
    patches, grid = patchify(torch.empty(0, 3, 28, 28))
    assert patches.shape == (0, 3, 14, 14)
    assert grid == (0, 2, 2)


def test_normalize_maps_bytes_to_minus_one_to_one():
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    out = normalize(ramp, RELEASED)
    assert out.dtype == torch.float32
    assert (out[0, 0, 0, 0].item(), out[0, 0, 15, 15].item()) == (-1.0, 1.0)
    torch.testing.assert_close(out, ramp / 127.5 - 1, rtol=0, atol=1e-6)
    config = ProcessingConfig(image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 2.0))
    ends = normalize(ramp, config)[0, :, 15, 15]
    torch.testing.assert_close(ends, torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_alpha(version):
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 128
    pixel = np.asarray(load_image(rgba, version=version))[0, 0].tolist()
    # Preview pastes on white: 200 * a + 255 * (1 - a) with a = 128 / 255.
    assert pixel == ([227, 127, 127] if version == "preview" else [200, 0, 0])
    opaque = Image.fromarray(noise(8, 8)).convert("P")
    expected = np.asarray(opaque.convert("RGB"))
    assert np.array_equal(np.asarray(load_image(opaque, version=version)), expected)


def test_sixteen_bit_grayscale_keeps_its_range(tmp_path):
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(deep).save(path)
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(load_image(path))[0, 2].tolist() == [128] * 3


def test_array_and_tensor_layouts_agree():
    picture = noise(20, 30)
    expected = np.asarray(load_image(Image.fromarray(picture)))
    chw = np.ascontiguousarray(picture.transpose(2, 0, 1))
    for image in (picture, chw, torch.from_numpy(picture), torch.from_numpy(chw)):
        assert np.array_equal(np.asarray(load_image(image)), expected)
    gray = noise(20, 30, channels=0)
    for image in (gray, gray[None], gray[:, :, None], torch.from_numpy(gray)):
        loaded = np.asarray(load_image(image))
        assert np.array_equal(loaded, gray[:, :, None].repeat(3, axis=2))
    # Both readings fit: an array is channels last, a tensor channels first.
    both = noise(3, 5)
    assert load_image(both).size == (5, 3)
    assert load_image(torch.from_numpy(both)).size == (3, 5)


def test_sources_agree(tmp_path):
    picture = Image.fromarray(noise(40, 50))
    path = tmp_path / "a.png"
    picture.save(path)
    raw = path.read_bytes()
    address = "data:image/png;base64," + base64.b64encode(raw).decode()
    for source in (path, str(path), f"file://{path}", raw, address):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(picture))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(noise(40, 80)).save(path, exif=exif)
    assert load_image(path).size == (80, 40)


def test_options_change_the_size():
    picture = noise(300, 400)
    assert process_image(picture, max_pixels=100 * 784).grid_thw == (1, 16, 22)
    assert process_image(picture, min_pixels=400 * 784).grid_thw == (1, 36, 48)
    assert process_image(picture, resized_height=280, resized_width=420).grid_thw == (1, 20, 30)
    with pytest.raises(ValueError, match="go together, got 280 and None"):
        process_image(picture, resized_height=280)


def test_unreadable_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load_image: no such file: .*missing\.png"):
        load_image(tmp_path / "missing.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ValueError, match=r"load_image: cannot read .*broken\.png as an image"):
        load_image(broken)
    buffer = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(buffer, "PNG")
    broken.write_bytes(buffer.getvalue()[:20000])
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png as an image \(.*truncated"):
        load_image(str(broken))
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png as an image"):
        load_image(broken)
    with pytest.raises(ValueError, match="cannot read <bytes> as an image"):
        load_image(b"no image")
    with pytest.raises(ValueError, match=r"addresses are not fetched; download http://x/a\.png"):
        load_image("http://x/a.png")
    with pytest.raises(ValueError, match="must start with data:image"):
        load_image("data:text/plain,hello")
    with pytest.raises(ValueError, match="not valid base64"):
        load_image("data:image/png;base64,*")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "arrays must be uint8, got float32"),
        (torch.zeros(3, 4, 4), "arrays must be uint8, got float32"),
        (np.zeros((5, 4, 2), np.uint8), r"with C of 1, 3 or 4, got \(5, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"must be non-empty .* got \(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got \(1, 4, 4, 3\)"),
        (7, "need a path, bytes, a PIL image, an array or a tensor, got int"),
        (Image.new("F", (4, 4)), "need 8-bit or 16-bit pixels, got mode 'F'"),
        (Image.new("I", (4, 4)), "need 8-bit or 16-bit pixels, got mode 'I'"),
    ],
)
def test_bad_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image)


def test_bad_patches_are_refused():
    with pytest.raises(ValueError, match=r"patchify: frames must be .* got \(3, 28, 28\)"):
        patchify(torch.zeros(3, 28, 28))
    with pytest.raises(ValueError, match="must be multiples of 14, got 28x30"):
        patchify(torch.zeros(1, 3, 28, 30))
    with pytest.raises(ValueError, match=r"for grid \(1, 2, 2\), got \(5, 3, 14, 14\)"):
        unpatchify(torch.zeros(5, 3, 14, 14), (1, 2, 2))
    with pytest.raises(ValueError, match=r"must be uint8, got torch\.float32"):
        normalize(torch.zeros(1, 3, 14, 14), RELEASED)
    with pytest.raises(ValueError, match=r"side ratio must be <= 200, got 1x300"):
        process_image(noise(1, 300))
    with pytest.raises(ValueError, match=r"version must be 'preview' or '1\.5', got '3'"):
        load_image(noise(4, 4), version="3")
