# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Procedural scenes in COCO format: the embedded data of the demo.

Every scene is drawn from one integer seed: a textured ground under a random
light, six classes of solid or hollow shapes with their own texture, shading
and cast shadow, unlabelled clutter, occluding bars, blur and sensor noise.
Image ``i`` of a split is a function of ``(split, i)`` alone, so a split can be
rendered again, anywhere, to the same pixels.

    python demo/scenes.py --split val --out demo/data

From a rendered split, :func:`write_semantic` makes the label maps of the
segmentor and :func:`write_crops` the class folders of the classifiers.
"""
import argparse
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CLASSES = ('disc', 'square', 'triangle', 'star', 'ring', 'cross')
SPLITS = {'train': (0, 3000), 'val': (1_000_000, 120)}
"""Split name -> (first seed, number of images)."""
SIZE = 224
"""Height and width of a scene in pixels."""
_SS = 2  # supersampling factor of the renderer


def _noise(rng: np.random.Generator, size: int, octaves: int) -> np.ndarray:
    """Smooth value noise in [0, 1] with shape of (size, size)."""
    out = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = 2**(octave + 2)
        grid = rng.random((cells, cells), dtype=np.float32)
        out += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) * 0.55**octave
    out -= out.min()
    return out / max(float(out.max()), 1e-6)


def _unit_outline(name: str) -> List[np.ndarray]:
    """Outlines of a class in the unit disc; the second, if any, is a hole."""
    def polygon(angles: np.ndarray, radii: np.ndarray) -> np.ndarray:
        return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)

    turn = 2 * np.pi
    if name == 'disc':
        return [polygon(np.linspace(0, turn, 48, False), np.ones(48))]
    if name == 'ring':
        angles = np.linspace(0, turn, 48, False)
        return [polygon(angles, np.ones(48)), polygon(angles, np.full(48, 0.55))]
    if name == 'square':
        return [polygon(np.arange(4) * turn / 4 + turn / 8, np.ones(4))]
    if name == 'triangle':
        return [polygon(np.arange(3) * turn / 3, np.ones(3))]
    if name == 'star':
        return [polygon(np.arange(10) * turn / 10, np.where(np.arange(10) % 2, 0.45, 1.0))]
    if name == 'cross':
        w = 0.3
        return [np.array([[w, w], [w, 1], [-w, 1], [-w, w], [-1, w], [-1, -w], [-w, -w],
                          [-w, -1], [w, -1], [w, -w], [1, -w], [1, w]], np.float64)]
    raise KeyError(name)


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A surface pattern in [0, 1] with shape of (size, size)."""
    kind = rng.integers(4)
    if kind == 0:
        return np.full((size, size), 0.5, np.float32)
    if kind == 1:
        return _noise(rng, size, 4)
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 24) * _SS
    along = xs * np.cos(angle) + ys * np.sin(angle)
    stripes = 0.5 + 0.5 * np.sin(2 * np.pi * along / period)
    if kind == 2:
        return stripes
    across = -xs * np.sin(angle) + ys * np.cos(angle)
    return stripes * (0.5 + 0.5 * np.sin(2 * np.pi * across / period))


def _draw(outlines: List[np.ndarray], size: int) -> np.ndarray:
    """Fill outlines by the even-odd rule; float mask of (size, size)."""
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.round(o).astype(np.int32) for o in outlines], 1)
    return mask.astype(np.float32)


def render(seed: int) -> Tuple[np.ndarray, List[Dict]]:
    """Render one scene.

    Args:
        seed (int): The only source of randomness.

    Returns:
        tuple: The BGR image, uint8 of shape (SIZE, SIZE, 3), and the list of
        its COCO annotations (``bbox``, ``segmentation`` as compressed RLE of
        the *visible* part, ``area``, ``category_id``, ``iscrowd``).
    """
    rng = np.random.default_rng(seed)
    size = SIZE * _SS
    ground = rng.uniform(30, 190, (2, 3)).astype(np.float32)
    blend = _noise(rng, size, int(rng.integers(2, 6)))[..., None]
    image = ground[0] * blend + ground[1] * (1 - blend)
    light = rng.uniform(0, 2 * np.pi)
    light_dir = np.array([np.cos(light), np.sin(light)])

    for _ in range(rng.integers(3, 12)):  # clutter under the objects: scratches
        start = rng.uniform(0, size, 2)
        end = start + rng.normal(0, 60 * _SS, 2)
        colour = tuple(float(c) for c in rng.uniform(20, 230, 3))
        cv2.line(image, tuple(int(v) for v in start), tuple(int(v) for v in end), colour,
                 int(rng.integers(1, 3 * _SS)), cv2.LINE_AA)

    owner = np.full((size, size), -1, np.int32)  # which object is on top
    labels, full_area = [], []
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    for _ in range(int(rng.integers(3, 10))):
        distractor = rng.random() < 0.15
        name = str(rng.choice(CLASSES))
        if distractor:  # an irregular blob: a shape of no class
            count = int(rng.integers(6, 10))
            angles = np.sort(rng.uniform(0, 2 * np.pi, count))
            outlines = [np.stack([np.cos(angles), np.sin(angles)], 1)
                        * rng.uniform(0.35, 1, count)[:, None]]
        else:
            outlines = _unit_outline(name)
        radius = np.exp(rng.uniform(np.log(10), np.log(46))) * _SS
        angle = rng.uniform(0, 2 * np.pi)
        stretch = np.diag([1.0, rng.uniform(0.65, 1.0)])
        rot = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shear_angle = rng.uniform(0, 2 * np.pi)
        shear = np.array([[np.cos(shear_angle), -np.sin(shear_angle)],
                          [np.sin(shear_angle), np.cos(shear_angle)]])
        centre = rng.uniform(0.3 * radius, size - 0.3 * radius, 2)
        outlines = [o @ (shear @ stretch @ rot).T * radius + centre for o in outlines]
        mask = _draw(outlines, size)

        offset = light_dir * radius * rng.uniform(0.05, 0.25)  # cast shadow
        shadow = _draw([o + offset for o in outlines], size)
        shadow = cv2.GaussianBlur(shadow, (0, 0), 2.0 * _SS)[..., None]
        image = image * (1 - rng.uniform(0.2, 0.6) * shadow)

        colours = rng.uniform(20, 250, (2, 3)).astype(np.float32)
        pattern = _texture(rng, size)[..., None]
        surface = colours[0] * pattern + colours[1] * (1 - pattern)
        slope = ((xs - centre[0]) * light_dir[0] + (ys - centre[1]) * light_dir[1]) / radius
        surface = surface * (1 - rng.uniform(0.1, 0.4) * slope[..., None])
        image = np.where(mask[..., None] > 0, surface, image)
        if distractor:
            owner[mask > 0] = -1
        else:
            owner[mask > 0] = len(labels)
            labels.append(CLASSES.index(name))
            full_area.append(float(mask.sum()))

    for _ in range(rng.integers(0, 3)):  # occluding bars, on top of everything
        start, end = rng.uniform(0, size, 2), rng.uniform(0, size, 2)
        bar = np.zeros((size, size), np.uint8)
        cv2.line(bar, tuple(int(v) for v in start), tuple(int(v) for v in end), 1,
                 int(rng.integers(2 * _SS, 6 * _SS)))
        image = np.where(bar[..., None] > 0, rng.uniform(10, 240, 3), image)
        owner[bar > 0] = -1

    falloff = 1 - rng.uniform(0, 0.4) * (((xs / size - 0.5)**2 + (ys / size - 0.5)**2) * 2)
    image = image * falloff[..., None] * rng.uniform(0.6, 1.2)
    image = cv2.resize(image.astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.0))
    image = image + rng.normal(0, rng.uniform(1, 10), image.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)

    annotations = []
    for index, label in enumerate(labels):
        visible = (owner == index).astype(np.float32)
        if visible.sum() < 0.35 * full_area[index]:
            continue
        small = cv2.resize(visible, (SIZE, SIZE), interpolation=cv2.INTER_AREA) > 0.5
        if small.sum() < 60:
            continue
        rle = coco_mask.encode(np.asfortranarray(small.astype(np.uint8)))
        annotations.append(dict(
            category_id=label + 1,
            bbox=[float(v) for v in coco_mask.toBbox(rle)],
            area=float(small.sum()),
            segmentation=dict(size=list(rle['size']), counts=rle['counts'].decode()),
            iscrowd=0))
    return image, annotations


def write_split(split: str, out: Path, count: int = 0) -> Path:
    """Render a split as PNG files with one COCO json beside them.

    Args:
        split (str): ``train`` or ``val``.
        out (Path): Folder that receives ``<split>/*.png`` and ``<split>.json``.
        count (int): Number of images; 0 means the whole split. Defaults to 0.

    Returns:
        Path: The annotation file.
    """
    first, total = SPLITS[split]
    count = count or total
    (out / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        pixels, instances = render(first + index)
        name = f'{index:06d}.png'
        cv2.imwrite(str(out / split / name), pixels)
        images.append(dict(id=index + 1, file_name=name, height=SIZE, width=SIZE))
        for instance in instances:
            annotations.append(dict(instance, id=len(annotations) + 1, image_id=index + 1))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    path = out / f'{split}.json'
    path.write_text(json.dumps(
        dict(images=images, annotations=annotations, categories=categories)))
    return path


def render_split(split: str, out: Path, count: int = 0) -> None:
    """Render a split in all its forms; what is there already stays.

    Args:
        split (str): ``train`` or ``val``.
        out (Path): Folder of the scenes.
        count (int): Images that are needed; 0 means the whole split. Defaults
            to 0.
    """
    count = count or SPLITS[split][1]
    path = out / f'{split}.json'
    rendered = path.exists() and len(json.loads(path.read_text())['images']) >= count
    if not rendered:
        print(f'rendering {count} scenes of {split} ...', flush=True)
        for form in _FORMS:  # those of fewer scenes
            shutil.rmtree(out / f'{split}_{form}', ignore_errors=True)
        write_split(split, out, count)
    # The demo needs the scenes alone, so the other forms may be missing.
    for form, write in _FORMS.items():
        if not (out / f'{split}_{form}').exists():
            write(split, out)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of ``folder`` at the end, so that
    what is there is whole."""
    part = Path(tempfile.mkdtemp(prefix=f'{folder.name}.', dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_semantic(split: str, out: Path) -> Path:
    """Label maps of a rendered split: 0 is the ground, class i is i + 1.

    Args:
        split (str): ``train`` or ``val``; its COCO json must be there.
        out (Path): Folder that receives ``<split>_semantic/*.png``.

    Returns:
        Path: The folder of the maps.
    """
    coco = json.loads((out / f'{split}.json').read_text())
    folder = out / f'{split}_semantic'
    labels = {image['id']: np.zeros((SIZE, SIZE), np.uint8) for image in coco['images']}
    for instance in coco['annotations']:
        visible = coco_mask.decode(instance['segmentation']).astype(bool)
        labels[instance['image_id']][visible] = instance['category_id']
    with _whole_folder(folder) as part:
        for image in coco['images']:
            cv2.imwrite(str(part / image['file_name']), labels[image['id']])
    return folder


def write_crops(split: str, out: Path, size: int = 112, smallest: float = 20.) -> Path:
    """The objects of a rendered split, one a crop, in class folders.

    What is not the object is grey: with clutter around it, small classifiers
    take hours to begin to learn its shape.

    Args:
        split (str): ``train`` or ``val``; its images and json must be there.
        out (Path): Folder that receives ``<split>_crops/<class>/*.png``.
        size (int): Side of a crop in pixels. Defaults to 112.
        smallest (float): Objects whose box is smaller, in pixels, are left
            out. Defaults to 20.

    Returns:
        Path: The folder of the class folders.
    """
    coco = json.loads((out / f'{split}.json').read_text())
    folder = out / f'{split}_crops'
    with _whole_folder(folder) as part:
        for name in CLASSES:
            (part / name).mkdir(parents=True, exist_ok=True)
        files = {image['id']: image['file_name'] for image in coco['images']}
        for instance in coco['annotations']:
            x, y, width, height = instance['bbox']
            side = max(width, height)
            if side < smallest:
                continue
            side *= 1.3
            corner = np.array([x + width / 2 - side / 2, y + height / 2 - side / 2])
            image = cv2.imread(str(out / split / files[instance['image_id']]))
            scale = size / side
            move = np.array([[scale, 0, -corner[0] * scale], [0, scale, -corner[1] * scale]])
            visible = coco_mask.decode(instance['segmentation']).astype(bool)
            image[~visible] = 127
            crop = cv2.warpAffine(image, move, (size, size), flags=cv2.INTER_LINEAR,
                                  borderMode=cv2.BORDER_CONSTANT, borderValue=(127, 127, 127))
            name = CLASSES[instance['category_id'] - 1]
            cv2.imwrite(str(part / name / f'{instance["id"]:06d}.png'), crop)
    return folder


_FORMS = dict(semantic=write_semantic, crops=write_crops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--split', choices=sorted(SPLITS), default='val')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'data')
    parser.add_argument('--count', type=int, default=0, help='images to render (0: all)')
    args = parser.parse_args()
    print(write_split(args.split, args.out, args.count))


if __name__ == '__main__':
    main()
