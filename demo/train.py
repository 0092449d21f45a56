# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Train the demo detector from scratch: the script behind its checkpoint.

    python demo/train.py --work-dir work_dirs/demo_train        # --resume goes on

Renders the scenes, trains demo/mask_rcnn_swin_demo.py with the settings in
that file, evaluates, and writes the weights alone (no optimizer, no history)
to ``--out``.
"""
import argparse
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from scenes import CLASSES, SPLITS, write_split

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--work-dir', default='work_dirs/demo_train')
    parser.add_argument('--out', type=Path, default=None,
                        help='weights to write (default: <work-dir>/mask_rcnn_swin_demo.pth)')
    parser.add_argument('--resume', action='store_true')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()

    for split in SPLITS:
        if not (HERE / 'data' / f'{split}.json').exists():
            print(f'rendering {SPLITS[split][1]} scenes of {split} ...', flush=True)
            write_split(split, HERE / 'data')
    cfg = Config.fromfile(str(HERE / 'mask_rcnn_swin_demo.py'))
    cfg.work_dir = args.work_dir
    cfg.resume = args.resume
    cfg.randomness = dict(seed=0)
    cfg.env_cfg = dict(
        cudnn_benchmark=False,
        mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
        dist_cfg=dict(backend='gloo'))
    torch.set_num_threads(args.threads)
    runner = Runner.from_cfg(cfg)
    runner.train()
    out = args.out or Path(args.work_dir) / 'mask_rcnn_swin_demo.pth'
    weights = {k: v.detach().cpu() for k, v in runner.model.state_dict().items()}
    torch.save(dict(meta=dict(dataset_meta=dict(classes=CLASSES)), state_dict=weights), out)
    print(f'weights: {out}, {out.stat().st_size / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
