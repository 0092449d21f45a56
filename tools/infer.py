# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Draw what a float or quantized checkpoint predicts on images.

    python tools/infer.py configs/mask_rcnn_swin_s_w8a8.py work_dirs/.../quantized.pth photos/ \\
        --float mask_rcnn_swin_s.pth
"""
import argparse
import io
import os
import re
from pathlib import Path

from tqdm import tqdm

from psaq_mm.checkpoint import ensure_writable_dir, save_bytes, save_json
from psaq_mm.engine import init_model, load_config, resolve_device
from psaq_mm.engine.command_line import choose_work_dir, run_tool, tool_parser
from psaq_mm.engine.inference import (
    Predictor,
    compare_predictions,
    find_images,
    input_pipeline,
    read_rgb,
)
from psaq_mm.engine.runner import describe_checkpoint
from psaq_mm.errors import UserError
from psaq_mm.runtime.images import picture_paths


def parse_args() -> argparse.Namespace:
    parser = tool_parser(
        'Draw what a float or quantized checkpoint predicts: a picture for each image, and '
        'predictions.json.', config='ours, or a plain config of mmdet or mmseg',
        checkpoint='quantized.pth, or a float checkpoint')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files, and folders of '
                        'them, which are searched with their subfolders')
    parser.add_argument('--float', dest='float_checkpoint', metavar='CHECKPOINT',
                        help='draw what this float checkpoint predicts beside it')
    parser.add_argument('--out-dir', metavar='DIR', help='where to write '
                        '(default: <work-dir>/infer)')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='least score of a detection (default: 0.3)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.cfg_options)
    device = resolve_device(args.device)
    prepare = input_pipeline(config)
    images = find_images(args.images)
    out_dir = args.out_dir or os.path.join(choose_work_dir(args.work_dir, config), 'infer')
    pictures = picture_paths(images, out_dir)
    models = {}
    for path in filter(None, (args.float_checkpoint, args.checkpoint)):
        kind = describe_checkpoint(path, trust=args.trust_checkpoint)
        if path == args.float_checkpoint and kind != 'float':
            raise UserError(f'--float {path} is {kind}; expected a float checkpoint')
        bits = re.search(r'W\d', kind) and re.findall(r'W\dA\d|W\d', kind)[0]
        title = f'quantized, {bits}' if bits else kind
        if title in models:
            title = f'{title}: {Path(path).name}'
        choice = {} if kind != 'float' and args.float_checkpoint else \
            dict(averaged=args.averaged, prefix=args.prefix)
        model = init_model(config, path, device, trust=args.trust_checkpoint, **choice)
        models[title] = Predictor(model, model.dataset_meta, config)
    ensure_writable_dir(out_dir)

    rows = []
    for image, picture in tqdm(list(zip(images, pictures)), desc='inference', unit='image',
                               disable=len(images) == 1):
        drawn, found = compare_predictions(models, prepare(image), read_rgb(image),
                                           args.score_thr)
        file = io.BytesIO()
        drawn.save(file, format='PNG')
        save_bytes(file.getbuffer(), picture)
        rows.append(dict(image=str(image), picture=picture.name, predictions=found))
    save_json(rows, os.path.join(out_dir, 'predictions.json'))
    print(f'{out_dir}: {len(images)} picture(s) and predictions.json')


if __name__ == '__main__':
    run_tool(main)
