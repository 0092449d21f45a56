# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Detectors with queries, quantized beside float: a small Mask2Former and a small DINO.

    python benchmarks/query_detectors.py                     # both; goes on where it stopped
    python benchmarks/query_detectors.py --models dino --seeds 0
    python benchmarks/query_detectors.py --table             # what is measured so far

Models are mmdet's own, made small, for the scenes of the demo; their Swin is that of the demo
detector, and stays it. One that has no checkpoint is trained first; a training that was cut off
goes on. Quantized as ``default`` does, from the checkpoint alone, and tested on the 120
validation scenes. DINO of this width needs onedl-mmdetection: upstream's has 256.
"""
import argparse
from pathlib import Path
from typing import Any, Dict, Iterator, Sequence

from accuracy import experiment_of
from experiment import (
    DEMO,
    MEASURED,
    METRICS,
    MODELS,
    ROOT,
    TRAINED,
    Results,
    Subject,
    cell,
    print_note_once,
    quiet,
)
from mmengine.config import Config
from scenes import write_split
from train import train

from psaq_mm.engine import load_config

WIDTH = 64
"""Of tokens and queries."""
CHANNELS = [32, 64, 128, 256]
"""Of the feature maps of the demo detector's Swin."""
_FFN = dict(embed_dims=WIDTH, feedforward_channels=256)
_ATTENTION = dict(embed_dims=WIDTH, num_heads=4)
_SAMPLED = dict(_ATTENTION, num_levels=3)

HOSTS = dict(
    mask2former=('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py', dict(
        data_preprocessor=dict(batch_augments=None),
        backbone=dict(frozen_stages=4),
        panoptic_head=dict(
            in_channels=CHANNELS, feat_channels=WIDTH, out_channels=WIDTH, num_things_classes=6,
            num_queries=20, positional_encoding=dict(num_feats=WIDTH // 2),
            pixel_decoder=dict(
                encoder=dict(num_layers=1, layer_cfg=dict(
                    self_attn_cfg=_SAMPLED, ffn_cfg=_FFN)),
                positional_encoding=dict(num_feats=WIDTH // 2)),
            transformer_decoder=dict(num_layers=3, layer_cfg=dict(
                self_attn_cfg=_ATTENTION, cross_attn_cfg=_ATTENTION, ffn_cfg=_FFN)),
            loss_cls=dict(class_weight=[1.] * 6 + [0.1])),
        panoptic_fusion_head=dict(num_things_classes=6),
        train_cfg=dict(num_points=1024),
        test_cfg=dict(max_per_image=20))),
    dino=('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', dict(
        num_queries=60,
        data_preprocessor=dict(pad_size_divisor=32),
        backbone=dict(out_indices=(1, 2, 3), frozen_stages=4),
        num_feature_levels=3,
        neck=dict(in_channels=CHANNELS[1:], out_channels=WIDTH, num_outs=3),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=_SAMPLED, ffn_cfg=_FFN)),
        decoder=dict(num_layers=3, layer_cfg=dict(
            self_attn_cfg=_ATTENTION, cross_attn_cfg=_SAMPLED, ffn_cfg=_FFN)),
        positional_encoding=dict(num_feats=WIDTH // 2),
        bbox_head=dict(num_classes=6, embed_dims=WIDTH),
        dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
        test_cfg=dict(max_per_img=60))))
"""Name to mmdet's config, and what is changed in its model."""

ITERATIONS = dict(mask2former=6000, dino=1500)
SETTINGS = (('w8a8', 'backbone'), ('w8a8', 'model'), ('w4a8', 'backbone'))


def config_of(name: str) -> Config:
    """The demo detector's data and training, with another model."""
    config, host = load_config(DEMO / 'mask_rcnn_swin_demo.py'), load_config(HOSTS[name][0])
    host.model.backbone = config.model.backbone
    host.merge_from_dict(dict(model=HOSTS[name][1]))
    config.model = host.model
    config.merge_from_dict(dict(
        load_from=str(DEMO / 'mask_rcnn_swin_demo.pth'), max_iters=ITERATIONS[name],
        optim_wrapper=dict(
            optimizer=dict(lr=5e-4, weight_decay=1e-4),
            clip_grad=dict(max_norm=0.1)),
        train_dataloader=dict(batch_size=2),
        train_cfg=dict(max_iters=ITERATIONS[name], val_interval=ITERATIONS[name])))
    config.param_scheduler[0].end = config.param_scheduler[1].begin = 200
    config.param_scheduler[1].end = ITERATIONS[name]
    if 'panoptic_head' not in config.model:
        config.val_evaluator.metric = config.test_evaluator.metric = ['bbox']
        for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
            loader.dataset.pipeline = [
                {k: v for k, v in step.items() if k != 'with_mask'}
                for step in loader.dataset.pipeline]
    return config


def prepare(name: str) -> None:
    """Write the config of a model, and train it if there are no weights."""
    folder = TRAINED / name
    file, weights = MODELS[name] = (folder / f'{name}.py', folder / f'{name}.pth')
    folder.mkdir(parents=True, exist_ok=True)
    config_of(name).dump(file)
    if not weights.exists():
        for split in ('train', 'val'):
            if not (DEMO / 'data' / f'{split}.json').exists():
                write_split(split, DEMO / 'data')
        train(file, argparse.Namespace(
            work_dir=folder, out=weights, half=False, threads=1,
            resume=(folder / 'last_checkpoint').exists()))


def rows_of(name: str, results: Results, seeds: Sequence[int]) -> Iterator[str]:
    """Rows of the table of a model."""
    yield row_of(name, 'float', '', [results.get(None, 'float') or {}])
    for setting, scope in SETTINGS:
        found = results.over_seeds(seeds, experiment_of('default', setting, scope), 'default',
                                   setting, scope)
        yield row_of(name, setting.upper(), scope, found, len(seeds))


def row_of(name: str, bits: str, scope: str, found: Sequence[Dict[str, Any]], seeds: int = 0) \
        -> str:
    """A row: metrics that were measured."""
    cells = '; '.join(f'{METRICS[key][0]} {cell(list(found), key, seeds)}' for key in METRICS
                      if any(key in value for value in found))
    return f'| {name} | {bits} | {scope} | {cells} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--models', nargs='+', choices=list(HOSTS), default=list(HOSTS))
    parser.add_argument('--seeds', type=int, nargs='*', default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'accuracy')
    parser.add_argument('--table', action='store_true', help='measure nothing, print')
    args = parser.parse_args()
    lines = ['| model | bits | scope | metrics |', '|---|---|---|---|']
    tables = {name: Results(MEASURED / f'{name}.json') for name in args.models}
    for name, results in tables.items():
        if not args.table:
            prepare(name)
            quiet()
            subject = Subject(name, args.work_dir)
            results.float_model(subject)
            for setting, scope in SETTINGS:
                results.fill(['default'], [setting], scope, args.seeds, experiment_of,
                             subject.measure)
        lines += rows_of(name, results, args.seeds)
    print(f'seeds {args.seeds}: mean (lowest to highest seed)\n')
    print('\n'.join(lines))
    print_note_once(tables.values())


if __name__ == '__main__':
    main()
