"""What is measured is the size of what transformers' `load_image` gives, and what that would change
without a word is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from helpers.image_files import image_bytes, picture, turned_bytes
from luthier.data.images.decode import decode_image, measure_image
from luthier.data.rows import RowError


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_of_declared_size(width, height):
    """A PNG of one pixel whose header says another size."""
    chunk = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    data = bytearray(image_bytes("PNG", 1, 1))
    data[16:29] = chunk
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    return bytes(data)


def animation(format):
    frames = [picture(colour=colour) for colour in ("red", "green", "white")]
    return saved(frames[0], format, save_all=True, append_images=frames[1:])


def with_late_orientation(data, orientation):
    """A PNG with its EXIF behind the pixels, where the format allows it."""
    exif = Image.Exif()
    exif[274] = orientation
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + body))
    end = data.rindex(b"IEND") - 4
    return data[:end] + chunk + data[end:]


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)

WHOLE = {
    "a PNG": image_bytes("PNG"),
    "a JPEG": image_bytes("JPEG"),
    "a progressive JPEG": image_bytes("JPEG", progressive=True),
    "a JPEG with bytes behind its end": image_bytes("JPEG") + bytes(40),
    "a WebP": image_bytes("WEBP"),
    "a GIF": image_bytes("GIF"),
    "a BMP": image_bytes("BMP"),
    "a TIFF": image_bytes("TIFF"),
    "an AVIF": image_bytes("AVIF"),
    "a palette": image_bytes("PNG", mode="P"),
    "a palette with transparency": image_bytes("PNG", mode="P", transparency=0),
    "transparent pixels": image_bytes("PNG", mode="RGBA"),
    "grey": image_bytes("PNG", mode="L"),
    "black and white": image_bytes("PNG", mode="1"),
    "a CMYK JPEG": image_bytes("JPEG", mode="CMYK"),
    "a JPEG that EXIF turns by 90 degrees": turned_bytes(6),
    "a JPEG that EXIF mirrors": turned_bytes(2),
    "a JPEG that EXIF turns and mirrors": turned_bytes(5),
    "a PNG that EXIF turns": turned_bytes(8, "PNG"),
    "a WebP that EXIF turns": turned_bytes(6, "WEBP"),
    "a TIFF that its tags turn": turned_bytes(6, "TIFF"),
    "a PNG that EXIF behind its pixels turns": with_late_orientation(image_bytes("PNG"), 6),
    "a JPEG that XMP turns": image_bytes("JPEG", xmp=XMP),
    "a WebP that XMP turns": image_bytes("WEBP", xmp=XMP),
    "an AVIF that EXIF turns": turned_bytes(6, "AVIF"),
    "a JPEG with an orientation that does not exist": turned_bytes(9),
    "grey with transparency": image_bytes("PNG", mode="LA"),
    "a colour that is transparent": image_bytes("PNG", transparency=(255, 0, 0)),
    "a TIFF in CIELAB": image_bytes("TIFF", mode="LAB"),
    "one pixel": image_bytes("PNG", 1, 1),
    "one row": image_bytes("PNG", 900, 1),
}


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE.keys())
def test_an_image_is_measured_and_decoded_as_transformers_does(data, tmp_path):
    from transformers.image_utils import load_image

    (tmp_path / "image").write_bytes(data)
    expected = load_image(str(tmp_path / "image"))
    assert measure_image(data) == expected.size
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))


BROKEN = {
    "no bytes": (b"", "it is empty: it has no bytes"),
    "half a PNG": (image_bytes("PNG", 300, 200)[:300], "it is broken: "),
    "half a JPEG": (image_bytes("JPEG", 300, 200)[:900], "it is broken: image file is truncated"),
    "a JPEG without its end mark": (image_bytes("JPEG")[:-2], "it is broken: image file is"),
    "half a WebP": (image_bytes("WEBP", 300, 200)[:100], "it is broken: "),
    "half a GIF": (image_bytes("GIF", 300, 200)[:90], "it is broken: "),
    "half a BMP": (image_bytes("BMP", 300, 200)[:900], "it is broken: image file is truncated"),
    "a PNG with a changed byte": (
        (lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:])(image_bytes("PNG", 300, 200)),
        "it is broken: ",
    ),
    "a page in place of a picture": (
        b"<!DOCTYPE html>\n<html>Not found</html>",
        "it is not a picture but markup ('<!DOCTYPE html> <html>Not found</html>')",
    ),
    "a PDF": (b"%PDF-1.7 ...", "it is not a picture that can be read (it begins with b'%PDF-1.7'"),
    "an EPS, which runs Ghostscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "it is not a picture that can be",
    ),
    "a bomb": (
        png_of_declared_size(30_000, 30_000),
        "it says that it has more than 178,956,970 pixels",
    ),
    "a smaller bomb": (
        png_of_declared_size(10_000, 10_000),
        "it says that it has 10000 x 10000 pixels, more than 89,478,485; make it smaller",
    ),
    "an animated GIF": (animation("GIF"), "it has 3 frames or pages"),
    "an animated PNG": (animation("PNG"), "it has 3 frames or pages"),
    "an animated WebP": (animation("WEBP"), "it has 3 frames or pages"),
    "a TIFF of several pages": (animation("TIFF"), "it has 3 frames or pages"),
    "16 bits of grey, which Pillow would clip to white": (
        saved(Image.new("I;16", (4, 4), 40_000), "PNG"),
        "it has more than 8 bits a pixel (Pillow's mode I;16), and would be clipped to white",
    ),
    "numbers of floating point": (saved(Image.new("F", (4, 4)), "TIFF"), "(Pillow's mode F)"),
}


@pytest.mark.parametrize(("data", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_what_no_model_could_see_rightly_is_refused(data, words, recwarn):
    with pytest.raises(RowError) as error:
        measure_image(data)
    assert words in str(error.value)
    assert not recwarn.list


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_no_pixel_of_a_whole_file_is_decoded(format, monkeypatch):
    data = image_bytes(format)

    def refuse(*args):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert measure_image(data) == (32, 24)
