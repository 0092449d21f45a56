# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Write the graphs of a model to a folder, each checked by running it."""
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Union

import torch
from mmengine.logging import print_log
from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import ensure_writable_dir, save_bytes, save_json
from psaq_mm.errors import UserError
from psaq_mm.quantization.placement import ROLES
from psaq_mm.version import __version__

from .engines import ENGINE_OF_FORMAT, ENGINES
from .export_forms import FORMATS
from .graph_part import GraphPart, Size
from .hosts import graph_part
from .onnx_export import check_onnx, describe_onnx, trace
from .openvino_export import save_openvino
from .packages import require_package
from .parity import MINIMUM_SQNR, compare, lowest_sqnr, parity_images

MANIFEST = 'export.json'
"""Name of the file that describes a folder of graphs."""


def choose_sizes(part: GraphPart, sizes: Sequence[Size]) -> List[Optional[Size]]:
    """Sizes of the graphs to write; None is one graph for all sizes.

    Raises:
        UserError: If the model takes other sizes only.
    """
    fixed = part.fixed_size
    for size in sizes:
        if fixed is not None and tuple(size) != fixed:
            raise UserError(f'--size {size[0]} {size[1]}: the model takes images of '
                            f'{fixed[0]} x {fixed[1]} only')
        if min(size) < 1:
            raise UserError(f'--size {size[0]} {size[1]}: expected two positive numbers')
    if fixed is not None:
        return [fixed]
    return list(dict.fromkeys((int(s[0]), int(s[1])) for s in sizes)) or [None]


def export_graphs(model: nn.Module, folder: Union[str, Path], target: str,
                  sizes: Sequence[Size] = (), float_roles: Collection[str] = (),
                  about: Optional[Mapping[str, Any]] = None,
                  check_size: Size = (224, 224)) -> Dict[str, Any]:
    """Export a model, run what was written, and say how far it is off.

    Args:
        model (nn.Module): A quantized model, switched on; or a float one.
        folder (str or Path): Where the files go.
        target (str): ``onnx`` or ``openvino``.
        sizes (Sequence[tuple[int, int]]): Heights and widths of images, one
            graph for each; empty for one graph that takes all. Defaults to
            empty.
        float_roles (Collection[str]): Roles whose quantizers are left out:
            this is then no longer the checkpoint's arithmetic. Defaults to
            none.
        about (Mapping, optional): What to record of the source. Defaults to
            None.
        check_size (tuple[int, int]): Size of the images that a graph for all
            sizes is checked on. Defaults to (224, 224).

    Returns:
        dict: What is written to ``export.json``, last of all files.

    Raises:
        UserError: If a package is missing, or the model cannot be exported.
    """
    if target not in FORMATS:
        raise UserError(f'--format must be one of {", ".join(FORMATS)}, got {target!r}')
    for role in float_roles:
        if role not in ROLES:
            raise UserError(f'--float-roles: unknown role {role!r}; known: {", ".join(ROLES)}')
    engine = ENGINES[ENGINE_OF_FORMAT[target]]
    for package in ('onnx', engine.package):
        require_package(package)
    part = graph_part(model)
    chosen = choose_sizes(part, sizes)
    folder = Path(folder)
    ensure_writable_dir(folder)
    # Until the new graphs are whole nothing may vouch for what is in the folder.
    (folder / MANIFEST).unlink(missing_ok=True)
    low, high = find_adapter(model).valid_range(model)
    source = dict(about or {}, psaq_mm_version=__version__)
    graphs = []
    for size in chosen:
        graph = trace(part, size, target, float_roles)
        name = 'model' if size is None else f'model_{size[0]}x{size[1]}'
        path = folder / f'{name}{engine.suffix}'
        record = {key: str(value) for key, value in source.items()}
        if target == 'onnx':
            check_onnx(graph)
            describe_onnx(graph, record)
            data = graph.SerializeToString()
            save_bytes(data, path)
            written = len(data)
        else:
            written = save_openvino(graph, path, record)
        images = parity_images(size or check_size, low, high)
        with torch.no_grad():
            simulated = part.run(images)
        outputs = [torch.from_numpy(o) for o in engine(path).run(images.numpy())]
        rows = compare(part.output_names, simulated, outputs)
        graphs.append(dict(file=path.name, size=None if size is None else list(size),
                           bytes=written, parity=dict(image_size=list(images.shape[2:]),
                                                      outputs=rows)))
        _report(path, written, rows)
    manifest = dict(format=target, part=part.name, output_names=list(part.output_names),
                    float_roles=sorted(float_roles), source=source,
                    engine=f'{engine.name} {engine.version()}', torch=torch.__version__,
                    graphs=graphs)
    save_json(manifest, folder / MANIFEST)
    return manifest


def _report(path: Path, written: int, rows: Sequence[Dict[str, Any]]) -> None:
    print_log(f'{path} ({written / 1e6:.2f} MB); against the simulation:', logger='current')
    for row in rows:
        ratio = 'equal' if row['sqnr_db'] is None else f'SQNR {row["sqnr_db"]:.1f} dB'
        print_log(f'  {row["output"]}: max {row["max"]:.2e}, mean {row["mean"]:.2e}, {ratio}',
                  logger='current')
    lowest = lowest_sqnr(rows)
    if lowest is not None and lowest < MINIMUM_SQNR:
        print_log(f'  {lowest:.1f} dB is less than the {MINIMUM_SQNR:.0f} dB that 8 bits give as '
                  'a rule: roundings that fall the other way add up', logger='current')
