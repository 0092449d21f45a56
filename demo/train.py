# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Train a demo model from scratch: the script behind the demo's checkpoints.

    python demo/train.py demo/mask_rcnn_swin_demo.py          # --resume goes on

Renders the scenes, trains the config with the settings in that file,
evaluates, and writes the weights alone (no optimizer, no history) to ``--out``.
"""
import argparse
from pathlib import Path

import torch
from mmengine.runner import Runner
from scenes import SPLITS, render_split

from psaq_mm.engine import load_config

HERE = Path(__file__).resolve().parent


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of a training: where it leaves what, and whether it goes on."""
    parser.add_argument('--work-dir', type=Path, default=None,
                        help='default: work_dirs/train/<name of the config>')
    parser.add_argument('--out', type=Path, default=None,
                        help='weights to write (default: <work-dir>/<name of the config>.pth)')
    parser.add_argument('--half', action='store_true',
                        help='write the weights as float16, in half of the size')
    parser.add_argument('--resume', action='store_true')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())


def train(config: Path, args: argparse.Namespace) -> None:
    """Train a config and write its weights.

    Args:
        config (Path): Its data is there.
        args (Namespace): As of :func:`add_options`.
    """
    cfg = load_config(config)
    work_dir = args.work_dir or Path('work_dirs/train') / config.stem
    cfg.work_dir = str(work_dir)
    cfg.resume = args.resume
    if args.resume:
        cfg.load_from = None  # else mmengine would resume from what training began with
    cfg.randomness = dict(seed=0)
    cfg.env_cfg = dict(
        cudnn_benchmark=False,
        mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
        dist_cfg=dict(backend='gloo'))
    torch.set_num_threads(args.threads)
    runner = Runner.from_cfg(cfg)
    runner.train()
    out = args.out or work_dir / f'{config.stem}.pth'
    weights = {k: v.detach().cpu() for k, v in runner.model.state_dict().items()}
    if args.half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    meta = dict(dataset_meta=dict(runner.val_dataloader.dataset.metainfo))
    torch.save(dict(meta=meta, state_dict=weights), out)
    print(f'weights: {out}, {out.stat().st_size / 1e6:.1f} MB')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', type=Path, nargs='?', default=HERE / 'mask_rcnn_swin_demo.py')
    add_options(parser)
    args = parser.parse_args()
    for split in SPLITS:
        render_split(split, HERE / 'data')
    train(args.config, args)


if __name__ == '__main__':
    main()
