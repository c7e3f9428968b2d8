"""Bytes of real images, made by Pillow."""

import io

from PIL import Image, ImageDraw


def picture(width=32, height=24, colour="red", mode="RGB"):
    """A picture with a mark at its top left, so that a turn of it shows."""
    image = Image.new("RGB", (width, height), colour)
    ImageDraw.Draw(image).rectangle((0, 0, 5, 3), fill="blue")
    return image.convert(mode) if mode != "RGB" else image


def image_bytes(format="PNG", width=32, height=24, colour="red", mode="RGB", **options):
    """The bytes of a small picture as a file of this format."""
    file = io.BytesIO()
    picture(width, height, colour, mode).save(file, format, **options)
    return file.getvalue()


def turned_bytes(orientation, format="JPEG", **options):
    """The bytes of a picture that EXIF says to turn."""
    exif = Image.Exif()
    exif[274] = orientation
    return image_bytes(format, exif=exif, **options)
