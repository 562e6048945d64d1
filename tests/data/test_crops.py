"""The crops of an evaluation: against torchvision's, against crops made by hand, and on images that show where they are."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from concentration.data.crops import CropReader, decode_crops
from concentration.data.sample_targets import LabelTargets


def encode(image: Image.Image, extension: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, extension)
    return buffer.getvalue()


def draw_noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def draw_map(width: int, height: int) -> Image.Image:
    """A picture whose red says how far right a pixel is, and whose green how far down: 0 to 250."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (250 * (x + 0.5) / width, 250 * (y + 0.5) / height, np.zeros((height, width)))
    return Image.fromarray(np.stack(channels, axis=2).round().astype(np.uint8))


def read_boxes(crops: np.ndarray, width: int, height: int) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of each crop of a map, in its pixels."""
    size = crops.shape[-1]
    boxes = []
    for crop in crops.astype(float):
        columns, rows = crop[0].mean(0) * width / 250, crop[1].mean(1) * height / 250
        half = (columns[-2] - columns[1]) / (size - 3) / 2, (rows[-2] - rows[1]) / (size - 3) / 2
        # Of the second pixels from the edge: at the edge of the image the filter sees the inside alone.
        boxes.append(
            (columns[1] - 3 * half[0], rows[1] - 3 * half[1], columns[-2] + 3 * half[0], rows[-2] + 3 * half[1])
        )
    return boxes


@pytest.mark.parametrize("size", [(320, 256), (256, 320), (256, 256)])
def test_ten_crops_are_torchvisions_of_the_square_in_the_middle(size):
    image = draw_noise(*size)  # its shorter side is 256 already, so nothing is resized
    expected = [np.asarray(crop).transpose(2, 0, 1) for crop in tv.ten_crop(tv.center_crop(image, 256), 224)]
    in_our_order = [*range(5), 6, 5, 8, 7, 9]  # torchvision mirrors the image, and then begins at its top left
    np.testing.assert_array_equal(decode_crops(encode(image), 224, 10), np.stack(expected)[in_our_order])


@pytest.mark.parametrize("size", [(72, 48), (48, 72), (48, 48), (120, 40)])
def test_144_crops_are_those_of_section_7_made_one_by_one(size):
    """Resized by Pillow to the four sizes, all of them whole numbers; squares, crops and mirror images cut by hand."""
    image = draw_noise(*size)
    expected = []
    for shorter_side in (32, 36, 40, 44):
        scale = shorter_side / min(size)
        resized = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BILINEAR)
        room_x, room_y = resized.width - shorter_side, resized.height - shorter_side
        for share in (0, 0.5, 1):
            left, top = round(share * room_x), round(share * room_y)
            square = resized.crop((left, top, left + shorter_side, top + shorter_side))
            room = shorter_side - 28
            for x, y in ((0, 0), (room, 0), (0, room), (room, room), (room // 2, room // 2)):
                expected.append(square.crop((x, y, x + 28, y + 28)))
            expected.append(square.resize((28, 28), Image.Resampling.BILINEAR))
    expected += [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in expected]
    found = decode_crops(encode(image), 28, 144)
    assert found.shape == (144, 3, 28, 28)
    differences = np.abs(found.astype(int) - np.stack([np.asarray(e).transpose(2, 0, 1) for e in expected]))
    assert differences.max() <= 1  # of rounding, where a square and the whole image are resized


def test_crops_lie_where_the_paper_says():
    """On a picture that shows its coordinates: 640 x 480, so that one pixel of the smallest size is 480/256 of its."""
    width, height = 640, 480
    boxes = read_boxes(decode_crops(encode(draw_map(width, height)), 224, 144)[:72], width, height)
    expected = []
    for shorter_side, left in itertools.product((256, 288, 320, 352), (0, 80, 160)):
        crop = 480 * 224 / shorter_side
        room = 480 - crop
        for x, y in ((0, 0), (room, 0), (0, room), (room, room), (room / 2, room / 2)):
            expected.append((left + x, y, left + x + crop, y + crop))
        expected.append((left, 0, left + 480, 480))
    np.testing.assert_allclose(boxes, expected, atol=2.5)  # a grey level is 2.6 columns


def test_the_second_half_are_the_mirror_images():
    for num_crops in (10, 144):
        crops = decode_crops(encode(draw_noise(50, 40)), 28, num_crops)
        assert len(crops) == num_crops
        np.testing.assert_array_equal(crops[num_crops // 2 :], crops[: num_crops // 2, :, :, ::-1])


def test_the_ten_crops_are_among_the_144():
    content = encode(draw_noise(60, 50))
    ten, many = decode_crops(content, 28, 10), decode_crops(content, 28, 144)
    np.testing.assert_array_equal(ten[:5], many[6:11])
    np.testing.assert_array_equal(ten[5:], many[72 + 6 : 72 + 11])


def test_a_photograph_is_decoded_shrunk_but_keeps_the_pixels_of_the_largest_size():
    image = draw_map(1600, 1200)
    found, exact = (decode_crops(encode(image, extension), 28, 144).astype(int) for extension in ("jpeg", "png"))
    assert np.abs(found - exact).mean() < 3


@pytest.mark.parametrize(("mode", "size"), [("L", (40, 30)), ("RGBA", (40, 30)), ("RGB", (1, 3000)), ("RGB", (5, 5))])
def test_any_image_gives_its_crops(mode, size):
    crops = decode_crops(encode(draw_noise(*size, mode)), 28, 144)
    assert (crops.shape, crops.dtype) == ((144, 3, 28, 28), np.uint8)


def test_a_reader_gives_the_crops_of_a_sample_one_after_the_other(tmp_path: Path, make_split):
    split = make_split(tmp_path, [[["gull"], ["osprey", "tram"], ["soup"]]])
    targets = LabelTargets(split, smear=False)
    reader = CropReader(split, targets, 14, 10)
    read = reader.read(np.array([2, 0]), epoch=0)
    expected = np.concatenate([decode_crops(reader.read_encoded(ordinal), 14, 10) for ordinal in (2, 0)])
    assert torch.equal(read.images, torch.from_numpy(expected))
    assert torch.equal(read.targets.index_BK, targets.lookup(np.array([2, 0])).index_BK)
    assert read.skipped_B.tolist() == [False, False]


def test_a_damaged_image_is_skipped_and_black(tmp_path: Path, make_split, monkeypatch):
    split = make_split(tmp_path, [[["gull"], ["tram"]]])
    reader = CropReader(split, LabelTargets(split, smear=False), 14, 10)
    whole = reader.read_encoded(1)
    monkeypatch.setattr(reader, "read_encoded", lambda ordinal: b"no image" if ordinal == 0 else whole)
    read = reader.read(np.array([0, 1]), epoch=0)
    assert read.skipped_B.tolist() == [True, False]
    assert not read.images[:10].any()
    assert read.images[10:].any()
