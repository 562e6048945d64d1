"""Views against plain Pillow, images of every kind and damage, and the distribution of drawn views."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from concentration.data.decoding import UNDECODABLE
from concentration.data.views import (
    CentreView,
    DrawnViews,
    StoredViews,
    View,
    ViewConfig,
    Views,
    decode_view,
    draw_views,
)

CENTRE = CentreView()
#: What is drawn of every view; distortions have tests of their own.
ARRAYS = [name for name in DrawnViews.__dataclass_fields__ if name not in ("distortions", "crop_of")]
DISTORTION = {
    "rotate": 20,
    "shear": 0.2,
    "scale": 0.2,
    "shift": 0.1,
    "stroke": 0.5,
    "blur": 1,
    "erase": 0.2,
    "noise": 0.2,
}
PHOTO = {"crop_area": 0.3, "crop_aspect": 2.0, "flip": 0.25, "brightness": 0.4, "contrast": 0.2, "saturation": 0.3,
         "light": True, "interpolation": "random"}  # fmt: skip
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "area": Image.Resampling.BOX, "nearest": Image.Resampling.NEAREST,
           "cubic": Image.Resampling.BICUBIC}  # fmt: skip


def one_view(
    area=1.0, aspect=1.0, x=0.5, y=0.5, flip=False, brightness=1.0, contrast=1.0, saturation=1.0, light=0, interpolation=0,
    crop_of="square",
) -> DrawnViews:  # fmt: skip
    values = (area, aspect, x, y, flip, brightness, contrast, saturation, light, interpolation)
    return DrawnViews(*(np.array([value]) for value in values), crop_of)


def see(content: bytes, views: Views, size: int) -> np.ndarray:
    return decode_view(content, views, 0, size)[0]


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def centre_slowly(content: bytes, size: int) -> np.ndarray:
    """The centre view by Pillow's own functions: upright, RGB, cut out, made smaller."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box)).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """48 wide and 36 high; no two parts of it look alike."""
    noise = np.random.default_rng(5).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((48, 36), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("image_size", [(48, 36), (36, 48), (30, 30), (31, 200), (1, 50), (300, 7)])
def test_the_centre_view_is_the_largest_square_in_the_middle(format, image_size, picture):
    content = encode(picture.resize(image_size), format)
    view = see(content, CENTRE, 30)
    assert view.dtype == np.uint8
    assert view.shape == (3, 30, 30)
    np.testing.assert_array_equal(view, centre_slowly(content, 30))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_png_of_the_right_size_is_seen_as_it_is(mode, picture):
    pixels = np.asarray(picture.resize((32, 32)).convert(mode))
    view = see(encode(Image.fromarray(pixels), "png"), CENTRE, 32)
    expected = pixels.transpose(2, 0, 1) if mode == "RGB" else np.stack([pixels] * 3)
    np.testing.assert_array_equal(view, expected)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "png"), ("1", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("L", "jpeg"),
     ("CMYK", "jpeg"), ("YCbCr", "jpeg"), ("P", "gif"), ("RGB", "bmp")],
)  # fmt: skip
def test_every_mode_becomes_the_rgb_of_pillow(mode, format, picture):
    image = picture.convert(mode)
    content = encode(image, format)
    assert Image.open(io.BytesIO(content)).mode == ("RGB" if mode == "YCbCr" else mode)
    np.testing.assert_array_equal(see(content, CENTRE, 20), centre_slowly(content, 20))


def test_grey_of_16_bits_keeps_its_contrast(picture):
    """Pillow alone clips: a scan whose greys go to 65,535 would be white."""
    grey = np.asarray(picture.convert("L").resize((20, 20)))
    deep = encode(Image.fromarray(grey.astype(np.uint16) * 256 + 77), "png")
    assert Image.open(io.BytesIO(deep)).mode == "I;16"
    np.testing.assert_array_equal(see(deep, CENTRE, 20), np.stack([grey] * 3))


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_images_are_turned_upright(format, orientation, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture, format, exif=exif)
    view = see(content, CENTRE, 24)
    np.testing.assert_array_equal(view, centre_slowly(content, 24))
    if orientation in (2, 3, 4, 5, 6, 7, 8):
        assert (view != see(encode(picture, format), CENTRE, 24)).any()


def test_an_exif_that_cannot_be_written_again_does_no_harm(picture):
    """Pillow's `exif_transpose` fails on it: a tag that says it is a number and holds a text."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 48
    content = encode(picture, "jpeg", exif=exif)
    raw = exif.tobytes()
    # The type of the tag 0x0100, a 4-byte integer, becomes a 4-byte text.
    tag = struct.pack("<HH" if raw[6:8] == b"II" else ">HH", 0x0100, 4)
    assert raw.count(tag) == 1
    broken = content.replace(tag, tag[:2] + (b"\x02\x00" if raw[6:8] == b"II" else b"\x00\x02"))
    np.testing.assert_array_equal(see(broken, CENTRE, 24), see(content, CENTRE, 24))


@pytest.mark.parametrize("format", ["gif", "webp", "png"])
def test_of_an_animation_the_first_picture_is_seen(format, picture):
    content = encode(picture, format, save_all=True, append_images=[picture.rotate(90), picture.rotate(180)])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    first = Image.open(io.BytesIO(content)).convert("RGB")
    expected = centre_slowly(encode(first, "png"), 20)
    np.testing.assert_array_equal(see(content, CENTRE, 20), expected)


def test_a_large_photograph_is_decoded_small_but_looks_the_same(picture):
    content = encode(picture.resize((960, 720), Image.Resampling.BICUBIC), "jpeg", quality=95)
    difference = see(content, CENTRE, 64).astype(int) - centre_slowly(content, 64)
    assert np.abs(difference).max() <= 12
    assert np.abs(difference).mean() < 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_small_crop_of_a_large_photograph_is_as_sharp_as_it_can_be(orientation):
    """Stripes of 4 pixels; at an eighth of the size, as which the whole would be decoded, they are a grey area."""
    stripes = np.zeros((512, 768, 3), dtype=np.uint8)
    stripes[np.arange(512) // 4 % 2 == 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.fromarray(stripes), "jpeg", quality=95, exif=exif)
    view = see(content, one_view(area=(64 / 512) ** 2), 64)
    assert view.std() > 100
    assert see(content, CENTRE, 64).std() < 10


def test_a_crop_is_where_its_parameters_say():
    """Red is the place across and green the place down, so that a view tells where it was cut out."""
    ramp = np.zeros((200, 250, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(250)[None, :]
    ramp[..., 1] = np.arange(200)[:, None]
    content = encode(Image.fromarray(ramp), "png")

    def span(view: Views) -> list[float]:
        across, down, _ = see(content, view, 50).astype(float)
        return [across[0, 0], down[0, 0], across[-1, -1], down[-1, -1]]

    # Bilinear resizing makes of n pixels the means of n / 50 of them, but for half a filter at the edges.
    def close_to(left: float, top: float, right: float, bottom: float):
        return pytest.approx([left, top, right, bottom], abs=4)

    assert span(one_view()) == close_to(25, 0, 225, 200)
    assert span(one_view(x=0.0, y=0.9)) == close_to(0, 0, 200, 200)
    assert span(one_view(x=1.0)) == close_to(50, 0, 250, 200)
    assert span(one_view(area=0.25)) == close_to(75, 50, 175, 150)
    assert span(one_view(area=0.25, x=0.0, y=1.0)) == close_to(0, 100, 100, 200)
    assert span(one_view(area=0.25, aspect=4.0)) == close_to(25, 75, 225, 125)
    assert span(one_view(area=0.25, aspect=0.25)) == close_to(100, 0, 150, 200)
    assert span(one_view(area=1.0, aspect=4.0)) == close_to(0, 50, 250, 150), "no wider than the image"
    flipped = span(one_view(area=0.25, x=0.0, y=1.0, flip=True))
    assert flipped == close_to(100, 100, 0, 200)


@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.floats(0, 1),
    st.floats(0.1, 10),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
@example(width=50, height=50, area=0.0, aspect=1.0, x=0.0, y=0.0)
def test_no_crop_of_any_image_fails(width, height, area, aspect, x, y):
    for format in ("bmp", "jpeg"):
        content = encode(Image.new("RGB", (width, height), (9, 9, 9)), format)
        view = see(content, one_view(area, aspect, x, y), 5)
        assert view.tolist() == np.full((3, 5, 5), 9).tolist()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("brightness", "contrast"), [(1.5, 1.0), (0.5, 1.0), (1.0, 0.3), (1.2, 1.7)])
def test_brightness_scales_and_contrast_moves_away_from_the_mean(mode, brightness, contrast, picture):
    content = encode(picture.resize((20, 20)).convert(mode), "png")
    plain = see(content, CENTRE, 20).astype(float)
    view, seen, _ = decode_view(content, one_view(brightness=brightness, contrast=contrast), 0, 20)
    assert seen.brightness == pytest.approx(brightness, abs=1 / 128)
    assert seen.contrast == pytest.approx(contrast, abs=1 / 128)
    expected = (((plain - plain.mean()) * seen.contrast + plain.mean()) * seen.brightness).clip(0, 255)
    assert view.dtype == np.uint8
    assert np.abs(view - expected).max() <= 1


def repair_checksums(content: bytes) -> bytes:
    """A PNG whose chunks' checksums are right again, so that its damage reaches the decoder."""
    repaired, start = bytearray(content), 8
    while start + 12 <= len(repaired):
        size = int.from_bytes(repaired[start : start + 4], "big")
        end = start + 8 + size
        if end + 4 > len(repaired):
            break
        repaired[end : end + 4] = struct.pack(">I", zlib.crc32(repaired[start + 4 : end]))
        start = end + 4
    return bytes(repaired)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", ["png", "palette", "deep", "jpeg", "progressive", "cmyk", "webp", "gif", "bmp", "exif"]
)
def test_a_damaged_image_is_decoded_or_undecodable_and_nothing_else(kind, picture):
    """Hundreds of images with some bytes changed or missing: no other error, and never another shape or type."""
    small = picture.resize((24, 17))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0100] = 6, "maker", 48
    content = {
        "png": lambda: encode(small, "png"),
        "palette": lambda: encode(small.quantize(16), "png"),
        "deep": lambda: encode(Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 200), "png"),
        "jpeg": lambda: encode(small, "jpeg"),
        "progressive": lambda: encode(small, "jpeg", progressive=True),
        "cmyk": lambda: encode(small.convert("CMYK"), "jpeg"),
        "webp": lambda: encode(small, "webp"),
        "gif": lambda: encode(small, "gif"),
        "bmp": lambda: encode(small, "bmp"),
        "exif": lambda: encode(small, "jpeg", exif=exif),
    }[kind]()
    generator = np.random.default_rng(1)
    outcomes = {"decoded": 0, "undecodable": 0}
    for number in range(400):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), generator.integers(1, 5)):
            damaged[place] = generator.integers(0, 256)
        if number % 4 == 0:
            del damaged[generator.integers(0, len(content)) :]
        if content.startswith(b"\x89PNG") and number % 2:
            damaged = repair_checksums(damaged)
        try:
            view = see(bytes(damaged), CENTRE, 8)
        except UNDECODABLE:
            outcomes["undecodable"] += 1
        else:
            outcomes["decoded"] += 1
            assert view.shape == (3, 8, 8)
            assert view.dtype == np.uint8
    assert outcomes["undecodable"] > 20, outcomes


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_truncated_image_is_undecodable(format, picture):
    content = encode(picture, format)
    for num_bytes in (0, 1, 8, len(content) // 3, len(content) // 2, len(content) - len(content) // 10):
        with pytest.raises(UNDECODABLE):
            see(content[:num_bytes], CENTRE, 8)


def test_what_is_no_image_is_undecodable(picture):
    for content in (b"", b"text", b"<svg></svg>", bytes(1000), encode(picture, "tiff"), encode(picture, "eps")):
        with pytest.raises(UNDECODABLE):
            see(content, CENTRE, 8)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(Image.DecompressionBombError):
        see(bomb, CENTRE, 8)
    assert issubclass(Image.DecompressionBombError, UNDECODABLE)


@given(st.integers(0, 2**31), st.integers(0, 500), st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.data())
def test_a_view_depends_on_seed_epoch_and_sample_and_not_on_its_batch(seed, epoch, ordinals, data):
    config = ViewConfig(**PHOTO)
    together = draw_views(config, seed, epoch, np.array(ordinals))
    row = data.draw(st.integers(0, len(ordinals) - 1))
    alone = draw_views(config, seed, epoch, np.array(ordinals[row : row + 1]))
    for name in ARRAYS:
        assert getattr(together, name)[row] == getattr(alone, name)[0]


def test_seeds_epochs_and_samples_get_other_views():
    config = ViewConfig(**PHOTO)
    drawn = [draw_views(config, seed, epoch, np.arange(50)).area for seed in (0, 1) for epoch in (0, 1)]
    assert len(np.unique(np.concatenate(drawn))) == 200


def test_drawn_views_fill_the_ranges_of_the_config():
    views = draw_views(ViewConfig(**PHOTO), seed=3, epoch=1, ordinals=np.arange(20_000))
    for values, low, high in (
        (views.area, 0.3, 1.0),
        (np.log(views.aspect), -np.log(2), np.log(2)),
        (views.x, 0.0, 1.0),
        (views.y, 0.0, 1.0),
        (views.brightness, 0.6, 1.4),
        (views.contrast, 0.8, 1.2),
        (views.saturation, 0.7, 1.3),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        counts = np.histogram(values, bins=10, range=(low, high))[0]
        assert np.abs(counts - 2000).max() < 5 * 2000**0.5, "evenly"
    assert (views.light.min(), views.light.max()) == (1, 255)
    assert np.abs(np.bincount(views.interpolation) - 5000).max() < 5 * 5000**0.5, "each of four as often"
    assert views.flip.dtype == bool
    assert abs(views.flip.mean() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    parameters = np.stack([getattr(views, name) for name in ARRAYS]).astype(float)
    correlation = np.corrcoef(parameters) - np.eye(len(parameters))
    assert np.abs(correlation).max() < 5 / 20_000**0.5, "independent of each other"


def test_without_augmentation_only_the_place_of_the_square_is_drawn():
    views = draw_views(ViewConfig(), seed=0, epoch=0, ordinals=np.arange(100))
    for name in ("area", "aspect", "brightness", "contrast", "saturation"):
        assert (getattr(views, name) == 1).all()
    for name in ("flip", "light", "interpolation"):
        assert not getattr(views, name).any()


@pytest.mark.parametrize("format", ["png", "jpeg"])
@pytest.mark.parametrize("orientation", [1, 6])
@given(seed=st.integers(0, 2**31), size=st.tuples(st.integers(1, 300), st.integers(1, 300)))
@settings(max_examples=15, deadline=None)
def test_a_stored_view_shows_the_pixels_of_the_drawn_one(format, orientation, seed, size, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture.resize(size), format, exif=exif)
    drawn = draw_views(ViewConfig(**PHOTO), seed, 2, np.array([5]))
    pixels, view, _ = decode_view(content, drawn, 0, 20)
    record = view.encode()
    assert View.decode(record) == view, "a drawn view is what its record says"
    stored = StoredViews(np.frombuffer(record, dtype=np.uint8)[None])
    replayed, again, _ = decode_view(content, stored, 0, 20)
    assert again == view
    np.testing.assert_array_equal(replayed, pixels)


@given(seed=st.integers(0, 2**31), size=st.tuples(st.integers(1, 300), st.integers(1, 300)))
@settings(max_examples=15, deadline=None)
def test_a_stored_distorted_view_shows_the_pixels_of_the_drawn_one(seed, size, picture):
    content = encode(picture.resize(size), "png")
    config = ViewConfig(flip=0.5, brightness=0.3, contrast=0.3, distortion=DISTORTION)
    pixels, view, _ = decode_view(content, draw_views(config, seed, 2, np.array([5])), 0, 20)
    assert pixels.shape == (3, 20, 20)
    record = view.encode()
    assert View.decode(record) == view, "a drawn view is what its record says"
    replayed, again, _ = decode_view(content, StoredViews(np.frombuffer(record, dtype=np.uint8)[None]), 0, 20)
    assert again == view
    np.testing.assert_array_equal(replayed, pixels)


def test_a_distortion_of_nothing_is_the_centre_view(picture):
    content = encode(picture, "png")
    views = draw_views(ViewConfig(distortion={}), 0, 0, np.arange(1))
    np.testing.assert_array_equal(see(content, views, 20), see(content, CENTRE, 20))


def test_a_crop_beside_a_distortion_is_refused():
    with pytest.raises(ValueError, match=r"crop_area=0.5.*have no effect with a distortion"):
        ViewConfig(crop_area=0.5, distortion={})


def test_the_record_of_a_view_is_little_endian_and_fixed_for_ever():
    view = View(0.25, 0.5, 1.0, 0.75, flip=True, brightness=0.5, contrast=1.25)
    assert view.encode() == bytes.fromhex("0040 0080 ffff ffbf a0 50 00 00 00".replace(" ", ""))
    view = dataclasses.replace(view, saturation=0.5, light=7, interpolation="cubic")
    assert view.encode() == bytes.fromhex("0040 0080 ffff ffbf a0 50 e0 07 03".replace(" ", ""))
    assert View.decode(view.encode()).encode() == view.encode()
    assert (
        dataclasses.replace(View.decode(view.encode()), light=8).encode() == dataclasses.replace(view, light=8).encode()
    )
    with pytest.raises(UNDECODABLE, match="interpolation 4 of a view, expected at most 3"):
        View.decode(view.encode()[:-1] + b"\4")


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.floats(0.001, 1),
    st.floats(0.5, 2),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_crop_of_the_image_has_its_share_of_the_area_whatever_the_shape(size, area, aspect, x, y):
    """Section 6 of "Going deeper with convolutions": an even share of the area, and the aspect where that fits."""
    width, height = size
    view = one_view(area, aspect, x, y, crop_of="image").at(0, size)
    assert -1e-9 <= view.left < view.right <= 1 + 1e-9
    assert -1e-9 <= view.top < view.bottom <= 1 + 1e-9
    left, top, right, bottom = view.box(size)
    if min(width, height) > 50 and area > 0.05:
        assert (right - left) * (bottom - top) / (width * height) == pytest.approx(area, rel=2e-3)
        fits = (area * width * height * aspect) ** 0.5 <= width and (area * width * height / aspect) ** 0.5 <= height
        if fits:
            assert (right - left) / (bottom - top) == pytest.approx(aspect, rel=5e-3)


@pytest.mark.parametrize(("number", "name"), list(enumerate(FILTERS)))
def test_each_interpolation_is_pillows(number, name, picture):
    square = picture.resize((60, 60))
    expected = np.asarray(square.resize((20, 20), FILTERS[name])).transpose(2, 0, 1)
    np.testing.assert_array_equal(see(encode(square, "png"), one_view(interpolation=number), 20), expected)


def test_the_view_of_an_image_that_could_not_be_decoded_is_undecodable(picture):
    with pytest.raises(UNDECODABLE):
        see(encode(picture, "png"), StoredViews(np.zeros((1, 13), dtype=np.uint8)), 20)


@pytest.mark.parametrize(
    "values",
    [
        {"crop_area": 1.2},
        {"flip": -0.1},
        {"crop_aspect": 0.5},
        {"brightness": 2},
        {"contrast": float("nan")},
        {"saturation": 1.5},
        {"interpolation": "cubic"},
        {"crop_of": "photo"},
    ],
)
def test_ranges_that_make_no_sense_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ViewConfig(**values)
