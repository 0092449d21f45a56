# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Write the graphs of a model to a folder, and check each by running it."""
import copy
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Union

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import ensure_writable_dir
from psaq_mm.errors import UserError
from psaq_mm.quantization.placement import ROLES
from psaq_mm.runtime.engines import FORMATS, Engine
from psaq_mm.runtime.export_manifest import MANIFEST, file_digest
from psaq_mm.runtime.images import read_image
from psaq_mm.runtime.packages import require_package
from psaq_mm.version import __version__

from .agreement import (
    BOUND,
    ExportError,
    check_decisions,
    describe_agreement,
    require_agreement,
)
from .export_manifest import write_export
from .file_info import file_info, metadata, resize_rule
from .hosts import find_subgraph
from .onnx_export import save_onnx, trace
from .openvino_export import save_openvino
from .parity import MINIMUM_SQNR, compare, lowest_sqnr, parity_images
from .subgraph import Size, Subgraph


def choose_sizes(subgraph: Subgraph, sizes: Sequence[Size]) -> List[Optional[Size]]:
    """Choose the image sizes of the graphs to write.

    Args:
        subgraph (Subgraph): Knows whether the model accepts one size only.
        sizes (Sequence[tuple[int, int]]): What the user asks for.

    Returns:
        list: Heights and widths; None stands for one graph for all sizes.

    Raises:
        UserError: If the model does not accept a size.
    """
    fixed = subgraph.fixed_size
    for size in sizes:
        if fixed is not None and tuple(size) != fixed:
            raise UserError(f'--size {size[0]} {size[1]}: the model accepts images of '
                            f'{fixed[0]} x {fixed[1]} only')
        if min(size) < 1:
            raise UserError(f'--size {size[0]} {size[1]}: expected two positive numbers')
        find_adapter(subgraph.model).check_image_size(subgraph.model, (size[0], size[1]), '--size')
    if fixed is not None:
        return [fixed]
    return list(dict.fromkeys((int(s[0]), int(s[1])) for s in sizes)) or [None]


def export_graphs(model: nn.Module, folder: Union[str, Path], target: str,
                  sizes: Sequence[Size] = (), float_roles: Collection[str] = (),
                  about: Optional[Mapping[str, Any]] = None, check_size: Size = (224, 224),
                  part: str = 'features', config: Optional[Config] = None,
                  classes: Sequence[str] = (), check_images: Sequence[Union[str, Path]] = (),
                  least_share: float = BOUND, device: str = 'CPU') -> Dict[str, Any]:
    """Export a model, run what was written, and compare it with the simulation.

    The model is copied to the CPU, in float32 and evaluation mode: it may be on
    any device and in any mode, and is not changed.

    Args:
        model (nn.Module): A calibrated quantized model, or a float one.
        folder (str or Path): Where to write.
        target (str): ``onnx``, ``openvino``, or ``tensorrt`` for ONNX as TensorRT wants it.
        sizes (Sequence[tuple[int, int]]): Heights and widths of images, one
            graph for each; empty for one graph for all sizes. Defaults to
            empty.
        float_roles (Collection[str]): Roles whose quantizers are left out; the
            graph then computes something else than the checkpoint. Defaults to
            none.
        about (Mapping, optional): What to record of the source. Defaults to
            None.
        check_size (tuple[int, int]): Size of the images on which a graph for
            all sizes is checked. Defaults to (224, 224).
        part (str): ``model`` for all of it, from pixels to results, or
            ``features``. Defaults to ``features``.
        config (Config, optional): Of a whole model: its test pipeline says how
            images are resized. Defaults to None: ``model.cfg``, if there is one.
        classes (Sequence[str]): Of a whole model: names of its classes.
            Defaults to those of ``model.dataset_meta``, or none.
        check_images (Sequence[str or Path]): Image files on which a whole model
            is checked. Defaults to none: made up.
        least_share (float): Least share of the simulation's decisions that the
            engine must reach. Defaults to 0.8.
        device (str): Device of the engine that checks. Defaults to ``CPU``.

    Returns:
        dict: What ``export.json`` says. It is written last.

    Raises:
        UserError: If a package is missing, or the model cannot be exported.
        ExportError: If an engine decides something else than the simulation.
            All files are written.
    """
    if target not in FORMATS:
        raise UserError(f'--format must be one of {", ".join(FORMATS)}, got {target!r}')
    for role in float_roles:
        if role not in ROLES:
            raise UserError(f'--float-roles: unknown role {role!r}; known: {", ".join(ROLES)}')
    engine = FORMATS[target]
    for package in ('onnx', engine.package):
        require_package(package)
    engine.require_device(device)
    config = config if config is not None else getattr(model, 'cfg', None)
    classes = classes or (getattr(model, 'dataset_meta', None) or {}).get('classes') or ()
    if part == 'features' and check_images:
        raise UserError('--check-images is of whole models; leave it out with --part features, '
                        'where outputs are compared')
    rule = resize_rule(config) if check_images else {}
    if rule.get('mode') == 'unknown':
        raise UserError('--check-images: the config does not say how images are resized '
                        f'({rule["step"]}); leave it out')
    for path in check_images:
        read_image(path)  # one that cannot be read is an error before the work
    model = _cpu_copy(model)
    subgraph = find_subgraph(model, part)
    chosen = choose_sizes(subgraph, sizes)
    subgraph.for_sizes(chosen)
    check_size = find_adapter(model).taken_size(model, check_size)
    if subgraph.in_torch:
        print_log(f'in the graph: {subgraph.modules}; stays in torch: '
                  f'{", ".join(subgraph.in_torch)}', logger='current')
    folder = Path(folder)
    ensure_writable_dir(folder)
    # An interrupted export must not leave a manifest of older graphs.
    (folder / MANIFEST).unlink(missing_ok=True)
    low, high = find_adapter(model).valid_range(model)
    source = dict(about or {}, psaq_mm_version=__version__)
    graphs, failed = [], None
    for size in chosen:
        graph = trace(subgraph, size, target, float_roles)
        name = 'model' if size is None else f'model_{size[0]}x{size[1]}'
        path = folder / f'{name}{engine.suffix}'
        save = save_openvino if target == 'openvino' else save_onnx
        texts = {key: str(value) for key, value in source.items()}
        info = file_info(subgraph, size, classes, config) if part == 'model' else None
        if info is not None:
            texts.update(metadata(info))
        files = save(graph, path, texts)
        written = sum(file.stat().st_size for file in files)
        entry: Dict[str, Any] = dict(
            file=path.name, size=None if size is None else list(size), bytes=written,
            sha256={file.name: file_digest(file) for file in files})
        loaded = engine(path, device=device)
        if info is None:
            entry['parity'] = _compare_outputs(subgraph, loaded, size or check_size, low, high)
            _report(path, written, entry['parity']['outputs'])
        else:
            entry['agreement'] = row = check_decisions(subgraph, loaded, info, check_images,
                                                       size or check_size)
            print_log(f'{path} ({written / 1e6:.2f} MB); against the simulation: '
                      f'{describe_agreement(row)}', logger='current')
            try:
                require_agreement(row, path, least_share)
            except ExportError as error:
                failed = error  # the other graphs and the manifest are written all the same
        graphs.append(entry)
    manifest = dict(format=engine.format, target=target, part=part, modules=subgraph.modules,
                    in_torch=list(subgraph.in_torch),
                    output_names=list(subgraph.output_names), float_roles=sorted(float_roles),
                    source=source, engine=f'{engine.name} {engine.version()}',
                    torch=torch.__version__, graphs=graphs)
    write_export(manifest, folder)
    if failed is not None:
        raise failed
    return manifest


def _compare_outputs(subgraph: Subgraph, engine: Engine, size: Size, low: Tensor,
                     high: Tensor) -> Dict[str, Any]:
    """How far the outputs of an engine are from the simulation."""
    images = parity_images(size, low, high)
    with torch.no_grad():
        simulated = subgraph.run(images)
    outputs = [torch.from_numpy(output) for output in engine.run(images.numpy())]
    return dict(image_size=list(images.shape[2:]),
                outputs=compare(subgraph.output_names, simulated, outputs))


def _cpu_copy(model: nn.Module) -> nn.Module:
    """Copy a model to the CPU, in float32 and evaluation mode."""
    copies: Dict[int, Any] = {}  # straight to the CPU: a second one may not fit on the device
    for tensor in [*model.parameters(), *model.buffers()]:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        copied = tensor.detach().to('cpu', dtype, copy=True)
        copies[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) \
            if isinstance(tensor, nn.Parameter) else copied
    twin = copy.deepcopy(model, copies)
    twin.eval()  # mmdet's Swin Transformer returns None here
    return twin


def _report(path: Path, written: int, rows: Sequence[Dict[str, Any]]) -> None:
    """Log how far the outputs of a graph are from the simulation."""
    print_log(f'{path} ({written / 1e6:.2f} MB); against the simulation:', logger='current')
    for row in rows:
        ratio = 'equal' if row['sqnr_db'] is None else f'SQNR {row["sqnr_db"]:.1f} dB'
        print_log(f'  {row["output"]}: max {row["max"]:.2e}, mean {row["mean"]:.2e}, {ratio}',
                  logger='current')
    lowest = lowest_sqnr(rows)
    if lowest is not None and lowest < MINIMUM_SQNR:
        print_log(f'  {lowest:.1f} dB is less than the {MINIMUM_SQNR:.0f} dB expected at 8 bits: '
                  'values halfway between two integers were rounded to the other one',
                  logger='current')
