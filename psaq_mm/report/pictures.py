# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pictures as text that a page can hold."""
import base64
import io

from PIL import Image


def embedded(image: Image.Image, width: int = 960, quality: int = 82) -> str:
    """A picture as a ``data:`` address.

    Args:
        image (Image): RGB.
        width (int): Wider ones are scaled down, in pixels. Defaults to 960.
        quality (int): Of JPEG, from 1 to 95. Defaults to 82.
    """
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)),
                             Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.convert('RGB').save(file, format='JPEG', quality=quality, optimize=True)
    return 'data:image/jpeg;base64,' + base64.b64encode(file.getvalue()).decode()
