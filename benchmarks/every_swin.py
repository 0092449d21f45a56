# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Every Swin config of mmdet and mmseg: load, quantize, test, export, compare.

    python benchmarks/every_swin.py                  # runs what has no row yet
    python benchmarks/every_swin.py --only rtmdet    # configs whose names contain it, again
    python benchmarks/every_swin.py --table          # docs/every_swin.md from the rows

Weights are random. Backbones have two blocks a stage, a width of 32 and their own windows,
transformers of heads two layers: what differs from one config to the next is in their parts
and how these are joined. W8A8 in scope ``model``, weights rounded to nearest, on two images of
two steps. GLIP and Grounding DINO need ``transformers``, and get a BERT of one layer. No image
runs through onedl-mmdetection 3.5.1's Grounding DINO, which encodes boxes as its DINO does, in
twice the values that its own layer takes: that layer is made as wide as DINO's.

Through many layers of random weights a difference of float32's rounding grows until nothing is
alike. Where parity is low, the simulation is compared with itself, what is rounded to integers
moved by a relative 1e-6 before, and the float model is exported too, in which no value is rounded.

Configs that make the same model, module by module, share what was found of the first.

It is run before a release; a row takes seconds of CPU, and is kept in
``work_dirs/every_swin.json``.
"""
import argparse
import hashlib
import importlib
import inspect
import json
import logging
import re
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.logging import MMLogger
from published_layouts import to_swin_authors_detection
from torch import Tensor, nn

import psaq_mm
from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.tested_size import tested_size
from psaq_mm.checkpoint import load_float_weights, save_json
from psaq_mm.deploy import export_graphs
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.parity import lowest_sqnr, parity_images
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops, unquantized_weights
from psaq_mm.ops.plan import Plan
from psaq_mm.quantization import QuantSpec, sqnr_db

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / 'work_dirs' / 'every_swin.json'
TABLE = ROOT / 'docs' / 'every_swin.md'
WIDTH = 32
SIZE = (96, 96)
LOWEST_PARITY = 20.
"""In decibels; below it a graph is judged by the two other figures."""
WORDS = ('disc', 'square', 'star')
RECIPE = psaq_mm.Recipe.shipped('w8a8').changed(dict(
    synthesis=dict(num_images=2, steps=2), calibration=dict(image_size=None),
    quantization=dict(scope='model', weight=dict(rounding='nearest'))))


def swin_configs() -> Iterator[Tuple[str, str]]:
    """Package and name of each config whose model has a Swin, in the order of names."""
    for package in ('mmdet', 'mmseg'):
        root = Path(importlib.import_module(package).__file__ or '').parent / '.mim' / 'configs'
        for path in sorted(root.rglob('*.py')):
            if '_base_' in path.parts or 'swin' not in (path.name + path.read_text()).lower():
                continue
            try:
                config = load_config(path)
            except UserError:  # a dataset, or for what is not installed
                continue
            if 'SwinTransformer' in repr(config.model):
                yield package, str(path.relative_to(root))


def shrink(section: Any, old_width: int, language: str) -> None:
    """Make a model's section smaller, in place: see above."""
    for key, value in list(section.items()):
        if key in ('init_cfg', 'pretrained'):
            section[key] = None
        elif key in ('num_layers', 'num_blocks', 'num_dyhead_blocks') and isinstance(value, int):
            section[key] = min(value, 2)
        elif key == 'num_cp':
            section[key] = 0
        elif key in ('lang_model_name', 'name') and value == 'bert-base-uncased':
            section[key] = language
        elif key == 'in_channels' and (isinstance(value, (list, tuple)) or section.get(
                'in_index') is not None and isinstance(value, int)):
            widths = value if isinstance(value, (list, tuple)) else [value]
            widths = [width * WIDTH // old_width for width in widths]
            section[key] = widths if isinstance(value, (list, tuple)) else widths[0]
        elif key == 'num_queries':
            section[key] = min(value, 60)
        elif key in ('max_per_img', 'nms_pre'):
            section[key] = min(value, 20)
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, dict) and key != 'backbone':
                shrink(part, old_width, language)


def small_model(package: str, name: str, language: str) -> Tuple[Any, nn.Module]:
    """The config, and its model with random weights."""
    config = load_config(f'{package}::{name}')
    backbone = config.model.backbone
    shrink(config.model, backbone.get('embed_dims', 96), language)
    stages = len(backbone.get('depths', (2, 2, 6, 2)))
    backbone.update(embed_dims=WIDTH, depths=[2] * stages, init_cfg=None, with_cp=False,
                    num_heads=[2 ** stage for stage in range(stages)])
    backbone.pop('convert_weights', None)
    torch.manual_seed(0)
    model: Any = build_float_model(config)
    if package == 'mmdet' and 'GroundingDINO' in config.model.type:
        from mmdet.models.layers import MLP, DinoTransformerDecoder
        width = model.decoder.embed_dims
        if 'embed_dims * 4' in inspect.getsource(DinoTransformerDecoder._init_layers):
            model.decoder.ref_point_head = MLP(4 * width, width, width, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().amax() < 100:  # memory that only init_weights() would fill
                parameter.normal_()
            parameter.add_(0.02 * torch.randn_like(parameter))
    return config, model


def bert(folder: Path) -> str:
    """A BERT of one layer, that knows a few words."""
    try:
        from transformers import BertConfig, BertModel, BertTokenizer
    except ImportError:
        return 'bert-base-uncased'
    letters = [chr(code) for code in range(ord('a'), ord('z') + 1)]
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', *WORDS, *letters,
             *(f'##{letter}' for letter in letters)]
    folder.mkdir()
    (folder / 'vocab.txt').write_text('\n'.join(words))
    BertTokenizer(str(folder / 'vocab.txt')).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=1, intermediate_size=64)) \
        .save_pretrained(folder)
    # Grounding DINO gives masks of pairs of tokens, which torch's own attention does not take.
    BertModel._supports_sdpa = False
    return str(folder)


def predict(model: Any, size: Tuple[int, int]) -> List[Tensor]:
    """All tensors that a model predicts for two made-up images, by its ``test_step``."""
    generator = torch.Generator().manual_seed(1)
    channels = find_adapter(model).valid_range(model)[0].shape[1]
    found: List[Tensor] = []
    for _ in range(2):
        image = torch.randint(0, 256, (channels, *size), dtype=torch.uint8, generator=generator)
        meta = dict(img_id=0, img_path='', img_shape=size, ori_shape=size, pad_shape=size,
                    scale_factor=(1., 1.), text=WORDS, custom_entities=True)
        if hasattr(model, 'encode_decode'):
            from mmseg.structures import SegDataSample as Sample
        else:
            from mmdet.structures import DetDataSample as Sample
        with torch.no_grad():
            samples = model.test_step(dict(inputs=[image], data_samples=[Sample(metainfo=meta)]))
        for sample in samples:
            for field in sample.all_items():
                found += [v for v in getattr(field[1], 'values', list)()
                          if isinstance(v, Tensor)]
    if not found or not all(v.isfinite().all() for v in found if v.is_floating_point()):
        raise ValueError('predicts nothing, or values that are not finite')
    return found


def check_layouts(model: nn.Module, folder: Path) -> List[str]:
    """Names of the layouts that weights were read from, to the last bit."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    read = []
    for name, weights in (('OpenMMLab', state), ('Swin authors', to_swin_authors_detection(state)),
                          ('DDP', {f'module.{key}': value for key, value in state.items()})):
        torch.save(dict(state_dict=weights, meta={}), folder / 'float.pth')
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        load_float_weights(model, str(folder / 'float.pth'))
        if all(torch.equal(value, state[key]) for key, value in model.state_dict().items()):
            read.append(name)
        model.load_state_dict(state)
    return read


def in_words(error: Exception) -> str:
    """The first line of an error; of a bug its class too."""
    text = re.sub(r'of config \S*/|/tmp/\S*/|quantization.scope=.model.: |; quantize its '
                  'backbone.*', '', ' '.join(str(error).split()))[:200]
    return text if isinstance(error, UserError) else f'{type(error).__name__}: {text}'


def examine(model: nn.Module, folder: Path) -> Dict[str, Any]:
    """What is the same for all configs of one model."""
    row: Dict[str, Any] = dict(type=type(model).__name__, layouts=check_layouts(model, folder))
    size = find_adapter(model).taken_size(model, SIZE)
    row['image_size'] = list(size)
    try:
        before = predict(model, size)
    except Exception as error:  # a host's model is a program
        row['float_test'] = in_words(error)
        traceback.print_exc()
        before = []
    student = quantized(model, row)
    adapter = find_adapter(model)
    ops = [name for name, _ in named_quant_ops(student)]
    row['quantized'] = dict(backbone=sum(n.startswith('backbone.') for n in ops),
                            others=sum(not n.startswith('backbone.') for n in ops))
    plan: Plan = {name: dict.fromkeys(op.quantizers, QuantSpec(8))
                  for name, op in named_quant_ops(student)}
    row['left'] = unquantized_weights(model, plan, adapter, 'model')
    low, high = adapter.valid_range(model)
    images = low + (high - low) * torch.rand(1, low.shape[1], *size)
    with torch.no_grad():
        row['features_db'] = round(min(sqnr_db(a, b) for a, b in zip(
            adapter.forward_backbone(model, images), adapter.forward_backbone(student, images))),
            1)
    if before:
        row['tested'] = len(predict(student, size)) == len(before)
    try:
        row['export'], row['parity_db'] = exported(student, folder / 'export', size)
        if row['parity_db'] is not None and row['parity_db'] < LOWEST_PARITY:
            row['itself_db'] = parity_with_itself(student, size)
            row['float_db'] = exported(model, folder / 'float', size)[1]
    except UserError as error:
        row['export_reason'] = in_words(error)
    return row


def exported(model: nn.Module, folder: Path, size: Tuple[int, int]) \
        -> Tuple[str, Optional[float]]:
    """What is in the ONNX graph of a model, and the parity of its worst output."""
    manifest = export_graphs(model, folder, 'onnx', [size])
    return manifest['modules'], lowest_sqnr(manifest['graphs'][0]['parity']['outputs'])


def parity_with_itself(student: nn.Module, size: Tuple[int, int]) -> float:
    """Of the worst output, where what is rounded to integers is moved by a relative 1e-6."""
    subgraph = find_subgraph(student)
    images = parity_images(size, *find_adapter(student).valid_range(student))
    with torch.no_grad(), ExitStack() as hooks:
        expected = subgraph.run(images)
        for _, op in named_quant_ops(student):
            for role, quantizer in op.quantizers.items():
                if role != 'weight':
                    hooks.enter_context(quantizer.register_forward_pre_hook(
                        lambda module, args: (
                            args[0] * (1 + 1e-6 * torch.randn_like(args[0])), *args[1:])))
        found = subgraph.run(images)
    return round(min(200., *(sqnr_db(a, b) for a, b in zip(expected, found))), 2)


def quantized(model: nn.Module, row: Dict[str, Any]) -> nn.Module:
    """The student in scope ``model``, or of the backbone with the reason in the row."""
    recipe = RECIPE.changed(dict(synthesis=dict(image_size=row['image_size'])))
    try:
        return psaq_mm.quantize(model, recipe)
    except UserError as error:
        row['scope_reason'] = in_words(error)
        return psaq_mm.quantize(model, recipe.changed(dict(
            quantization=dict(scope='backbone'))))


def timed_out(*args: Any) -> None:
    raise TimeoutError('took too long')


def grouped(names: List[str]) -> str:
    """Names of modules that stay float, shortened to their kinds."""
    kinds: Dict[str, int] = {}
    for name in names:
        path, kind = name[:-1].split(' (')
        top = '.'.join(part for part in path.split('.')[:2] if not part.isdigit())
        kinds[f'{top} {kind}'] = kinds.get(f'{top} {kind}', 0) + 1
    shown = sorted(kinds.items(), key=lambda item: -item[1])[:3]
    return ', '.join(f'{count} {kind}' for kind, count in shown) \
        + (', ...' if len(kinds) > 3 else '') or 'nothing'


HEAD = """# Every Swin config of mmdet and mmseg

Made by `benchmarks/every_swin.py`, which says what is shrunk: W8A8 in scope `model`, random
weights. Each config is read in the layouts of OpenMMLab, of the Swin authors and of DDP, quantized
on two images of two steps, tested on two images and exported to ONNX.

All figures are SQNR in decibels, of the worst output. *Features*: quantized feature maps against
float ones. *Parity*: graph against simulation. Through many layers of random weights a difference
of float32's rounding grows, so where parity is low there are two more: *itself*, the simulation
against itself with all that is rounded to integers moved by a relative 1e-6 before, and *float*,
the parity of the float model, in which nothing is rounded to integers.

{right} of {rows} configs went through: all layouts read, heads run and quantized, tested as the
float model is, exported, and a parity of {lowest:.0f} dB or more, or one no lower than that of the
simulation with itself less 3 dB while that of the float model is over 60 dB. Configs whose models
are the same, module by module, were run once. Images are of 96x96; of RTMDet P6 of 128x128, since
the levels of its neck, to stride 64, must fit each other.

- Grounding DINO of onedl-mmdetection 3.5.1 cannot be run as it is installed: its decoder encodes
  a box in 4 x 256 values (`dino_layers.py` takes `num_feats=query.shape[2]`), and its
  `ref_point_head` takes 2 x 256 (`grounding_dino_layers.py`). Its rows are of a model whose layer
  is as wide as DINO's. Upstream mmdet 3.3 encodes a box in the 2 x 256 values
  that the layer takes.
- For the same reason a DINO or DDQ of upstream has another shape of `decoder.ref_point_head` than
  one of onedl-mmdetection 3.5.1: checkpoints of one do not fit the other,
  and the tools say so.
- Where 0 others are quantized, no image alone runs the heads; the last column says why.
- Deformable convolutions and embeddings stay float. mmcv exports the former as operators of
  its own, which no engine knows, so a neck or head with one (DyHead, TOOD, VFNet, RepPoints)
  stays in torch, and what is behind it.
- A parity of about 130 dB is float32's rounding alone; where it is lower, some values fell on
  the other side of a rounding step.
"""


def is_right(row: Dict[str, Any]) -> bool:
    """Whether all was done, heads included, and what was exported agrees.

    Where the simulation does not agree with itself, a graph is no farther from it than 3 dB
    more, and the float model's agrees.
    """
    if any(row.get(key) for key in ('error', 'scope_reason', 'float_test', 'export_reason')) \
            or not row['tested'] or len(row['layouts']) < 3:
        return False
    parity = row['parity_db']
    return parity is None or parity >= LOWEST_PARITY or (
        parity >= row['itself_db'] - 3 and (row['float_db'] is None or row['float_db'] > 60))


def table(rows: Dict[str, Dict[str, Any]]) -> str:
    """The table of all rows."""
    right = sum(map(is_right, rows.values()))
    lines = [
        HEAD.format(rows=len(rows), right=right, lowest=LOWEST_PARITY),
        '| config | quantized: backbone + others | left in float | features, dB | in the graph '
        '| parity, dB | itself | float | what is not possible |', '|---' * 9 + '|']
    for name, row in rows.items():
        quantized = row.get('quantized')
        reasons = [row[key] for key in (
            'error', 'scope_reason', 'float_test', 'export_reason') if row.get(key)]
        if row.get('layouts') is not None and len(row['layouts']) < 3:
            reasons.append(f'read only from {", ".join(row["layouts"])}')
        cells = [name.replace('.py', ''),
                 f'{quantized["backbone"]} + {quantized["others"]}' if quantized else '',
                 grouped(row['left']) if 'left' in row else '', row.get('features_db', ''),
                 row.get('export', ''),
                 'equal' if 'export' in row and row['parity_db'] is None
                 else row.get('parity_db', ''), row.get('itself_db', ''), row.get('float_db', ''),
                 '; '.join(reasons).replace('|', '/')]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', help='configs whose names contain this, again')
    parser.add_argument('--table', action='store_true', help='write the table and nothing else')
    parser.add_argument('--rows', type=Path, default=ROWS)
    parser.add_argument('--seconds', type=int, default=180, help='of CPU, at most for a config')
    args = parser.parse_args()
    rows: Dict[str, Dict[str, Any]] = json.loads(args.rows.read_text()) \
        if args.rows.exists() else {}
    if args.table:
        _, heading, rest = TABLE.read_text().partition('\n## ')  # of query_detectors.py
        TABLE.write_text(table(rows) + heading + rest)
        return
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGPROF, timed_out)
    with tempfile.TemporaryDirectory() as temporary:
        language = bert(Path(temporary) / 'bert')
        # One of each folder first: the others most often make models that are known then.
        within: Counter = Counter()
        configs = []
        for package, name in swin_configs():
            within[Path(name).parent] += 1
            configs.append((within[Path(name).parent], package, name))
        for _, package, name in sorted(configs):
            key = f'{package}/{name}'
            if args.only is None and key in rows or args.only is not None and args.only not in key:
                continue
            folder = Path(temporary) / 'work'
            folder.mkdir()
            start = time.process_time()
            row: Dict[str, Any] = {}
            signal.setitimer(signal.ITIMER_PROF, args.seconds)
            try:
                config, model = small_model(package, name, language)
                row.update(tested_size=str(tested_size(config)),
                           model=hashlib.sha256(repr(model).encode()).hexdigest())
                known = next((dict(other) for other in rows.values() if args.only is None
                              and other.get('model') == row['model'] and 'left' in other), None)
                row = {**(known or examine(model, folder)), **row}
            except Exception as error:
                row['error'] = in_words(error)
                traceback.print_exc()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                shutil.rmtree(folder)
            row['seconds'] = round(time.process_time() - start, 1)
            rows[key] = row
            save_json(rows, args.rows)
            print(key, json.dumps({k: v for k, v in row.items() if k != 'left'}), flush=True)


if __name__ == '__main__':
    main()
