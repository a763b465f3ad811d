import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from components.data.crops import load_image, open_image
from components.data.pixels import Loaded
from components.data.shards import MAX_PIXELS, ImageError, decode_image, decode_noted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SCENE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
SCENE[:1] = 255
GRAY = SCENE[..., 0]


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, photometric: str = "rgb", planar: str = "contig", **options) -> bytes:
    """As an independent library writes it; planes come first for `separate`."""
    buffer = io.BytesIO()
    options |= {"photometric": photometric, "planarconfig": planar if pixels.ndim == 3 else None}
    tifffile.imwrite(buffer, pixels, metadata=None, **options)
    return buffer.getvalue()


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a sample, [H, W, 2 to 4], which Pillow cannot write."""
    import struct
    import zlib

    height, width, channels = pixels.shape
    rows = pixels.astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def noted(data: bytes) -> Loaded:
    """Decode, the same wherever it is done."""
    loaded = decode_noted(data, max_pixels=MAX_PIXELS)
    for other in (decode_image(data), load_image(open_image(data), shrink=8.0)):
        assert np.array_equal(np.asarray(other), np.asarray(loaded.image))
    return loaded


def note(bits: int) -> tuple[str]:
    return (f"samples of 16 bits of which {bits} are used: scaled from these to 8 bits",)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_gray_of_16_bits_is_scaled_from_the_bits_that_it_uses(bits: int) -> None:
    wide = GRAY.astype(np.uint16) << (bits - 8)
    inverse = (2**bits - 1 - wide).astype(np.uint16)
    inverse16 = (2**16 - 1 - wide).astype(np.uint16)
    files = [encode(wide), encode(wide, "TIFF"), encode(wide, "TIFF", compression="tiff_lzw"), encode(wide, "PPM")]
    files += [tiff(wide, "minisblack", byteorder=">"), tiff(wide.astype(np.uint32), "minisblack")]
    files += [tiff(wide.astype(np.int16), "minisblack")] if bits < 16 else []
    files += [tiff(inverse, "miniswhite"), tiff(inverse16, "miniswhite")]
    for data in files:
        loaded = noted(data)
        assert loaded.notes == note(bits)
        assert np.array_equal(np.asarray(loaded.image), np.repeat(GRAY[..., None], 3, 2))


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_color_of_16_bits_is_scaled_so_too(bits: int) -> None:
    wide = SCENE.astype(np.uint16) << (bits - 8)
    opaque = np.concatenate([wide, np.full((24, 40, 1), 0xFFFF, np.uint16)], 2)
    clear = np.concatenate([wide, np.full((24, 40, 1), (255 << (bits - 8)), np.uint16)], 2)
    files = [tiff(wide, compression="deflate"), tiff(wide, byteorder=">"), tiff(wide), png16(wide), png16(opaque)]
    planes = tiff(wide.transpose(2, 0, 1), planar="separate", compression="deflate")
    files += [png16(clear), *([planes] if bits == 16 else [])]
    for data in files:
        loaded = noted(data)
        assert loaded.notes == note(bits)
        assert np.array_equal(np.asarray(loaded.image), SCENE)
    if bits < 16:
        with pytest.raises(ImageError, match="3 channels of 16 bits of which 14 or fewer are used, in planes; save it"):
            decode_image(planes)
    loaded = noted(png16(opaque[..., [0, 3]]))
    assert (loaded.notes, np.array_equal(np.asarray(loaded.image)[..., 1], GRAY)) == (note(bits), True)


def test_a_few_bright_pixels_do_not_make_the_others_black() -> None:
    wide = np.tile(GRAY.astype(np.uint16) << 4, (2, 2))
    wide[5, 7] = 0xFFFF  # one pixel of 3,840
    loaded = noted(encode(wide))
    expected = np.tile(GRAY, (2, 2))
    expected[5, 7] = 255
    assert (loaded.notes, np.array_equal(np.asarray(loaded.image)[..., 0], expected)) == (note(12), True)


def test_a_stated_range_is_kept() -> None:
    dark = (GRAY >> 3).astype(np.uint16)  # of 12 bits
    head = b"P5 40 24 4095\n"
    loaded = noted(head + (dark << 4).astype(">u2").tobytes())
    assert np.abs(np.asarray(loaded.image)[..., 0].astype(int) - dark).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "detail"),
    [
        (GRAY.astype(np.float32) / 255, "floating-point gray with values from 0 to 1; scale it to whole numbers"),
        (GRAY.astype(np.int16) * 8 - 1024, "signed gray with values from -1024 to 1016; scale it"),
        (GRAY.astype(np.uint32) * 2**20, "32-bit gray with values from 0 to 2.67387e+08; scale it"),
        (GRAY.astype(np.int8), "TIFF of 1 channel of 8 signed bits; save it with samples from 0"),
        (GRAY.astype(np.float16), "TIFF of 1 channel of 16 floating-point bits; gray and RGB of 8 or 16 bits are read"),
    ],
    ids=["float", "signed", "wide", "int8", "float16"],
)
def test_gray_without_a_known_range_is_refused_with_its_range(pixels: np.ndarray, detail: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(tiff(pixels, "minisblack"))
    assert caught.value.reason == "unsupported_format"
    assert caught.value.detail.startswith(detail)


FIVE = np.concatenate([SCENE, SCENE[..., :2]], 2)


@pytest.mark.parametrize(
    ("data", "dropped"),
    [
        (tiff(FIVE, extrasamples=[0, 0]), "5 channels: 2"),
        (tiff(FIVE, extrasamples=[0, 0], compression="deflate"), "5 channels: 2"),
        (tiff(FIVE.transpose(2, 0, 1), planar="separate", extrasamples=[0, 0], compression="deflate"), "5 channels: 2"),
        (tiff(FIVE[..., :4], extrasamples=[0]), "4 channels: 1"),
        (tiff(SCENE), None),
        (tiff(SCENE.transpose(2, 0, 1), planar="separate"), None),
    ],
    ids=["five", "five-deflate", "five-planes", "four", "three", "three-planes"],
)
def test_channels_that_are_dropped_are_told(data: bytes, dropped: str | None) -> None:
    loaded = noted(data)
    assert loaded.notes == ((f"TIFF with {dropped} of them not read",) if dropped else ())
    assert np.array_equal(np.asarray(loaded.image), SCENE)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (tiff(FIVE.astype(np.uint16), extrasamples=[0, 0]), "TIFF of 5 channels of 16 bits; gray and RGB of 8 or 16"),
        (tiff(FIVE.transpose(2, 0, 1), planar="separate", extrasamples=[0, 0]), "TIFF of 5 channels of 8 bits"),
        (
            tiff(SCENE.astype(np.uint16).transpose(2, 0, 1), planar="separate"),  # Pillow reads another picture
            "TIFF of 3 channels of 16 bits, uncompressed in planes; save it interleaved",
        ),
    ],
    ids=["five-16", "five-planes", "planes-16"],
)
def test_channels_that_cannot_be_read_are_named(data: bytes, detail: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == "unsupported_format"
    assert caught.value.detail.startswith(detail)


def test_pages_are_counted_and_previews_are_not_read() -> None:
    pages = [Image.fromarray(np.roll(SCENE, shift, 0)) for shift in range(3)]
    with pytest.raises(ImageError, match="multi_page: TIFF with 3 pages; save each as a file of its own"):
        decode_image(encode(SCENE, "TIFF", save_all=True, append_images=pages[1:]))
    many = encode(GRAY[:8, :8], "TIFF", save_all=True, append_images=[Image.new("L", (2, 2))] * 40)
    with pytest.raises(ImageError, match="multi_page: TIFF with more than 32 pages"):
        decode_image(many)
    half = [page.resize((20, 12)) for page in pages[:2]]
    loaded = noted(encode(SCENE, "TIFF", save_all=True, append_images=half))
    assert loaded.notes == ("TIFF with 3 pages: the first is read, the smaller ones are not",)
    assert np.array_equal(np.asarray(loaded.image), SCENE)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = noted(encode(np.rot90(SCENE).copy(), "TIFF", exif=exif))
    assert np.array_equal(np.asarray(turned.image), SCENE)
