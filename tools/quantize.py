# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantize a Swin model without data, from its float checkpoint alone.

    python tools/quantize.py configs/mask_rcnn_swin_s_w8a8.py checkpoint.pth
"""
import argparse
from typing import Any, Dict

from mmengine.dist import is_main_process

from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import ensure_writable_dir, load_float_weights, sha256_of_file
from psaq_mm.engine import (
    PSAQRunner,
    build_float_model,
    load_config,
    load_images,
    read_recipe,
    resolve_device,
)
from psaq_mm.engine.command_line import (
    choose_seed,
    choose_work_dir,
    keep_local,
    parse_launched,
    processes_of,
    public_command,
    require_launcher,
    run_tool,
    tool_parser,
    weight_choice,
)
from psaq_mm.engine.inference import find_shown_images
from psaq_mm.engine.own_images import MAX_IMAGES, own_files
from psaq_mm.errors import UserError
from psaq_mm.pipeline import check
from psaq_mm.recipe.checks import check_positive_int
from psaq_mm.recipe.quantization import BUDGETS


def parse_args() -> argparse.Namespace:
    parser = tool_parser(
        'Quantize a Swin model without data, from its float checkpoint alone. '
        'Writes quantized.pth, synthetic.png, report.html and report.json to the work '
        'directory.',
        config='config with our bases, e.g. configs/mask_rcnn_swin_s_w8a8.py',
        checkpoint='float checkpoint of the same model')
    parser.add_argument('--seed', type=int, help='seed of all randomness '
                        '(default: randomness.seed of the config, or 0)')
    parser.add_argument('--resume', action='store_true',
                        help='continue an interrupted run in the same work directory')
    parser.add_argument('--images', metavar='DIR', help='folder of your own photographs, '
                        'without labels, to use in the place of synthetic images')
    parser.add_argument('--max-images', type=int, metavar='N', help='of more photographs in the '
                        f'folder, draw so many by the seed (default: {MAX_IMAGES})')
    parser.add_argument('--mix', action='store_true', help='make synthetic images too, and use '
                        'them beside the photographs')
    parser.add_argument('--show', nargs='+', default=(), metavar='IMAGE', help='image files, or '
                        'folders of them: report.html shows what the float and the quantized '
                        'model predict on them')
    parser.add_argument('--sensitivity-images', type=int, default=1, metavar='N', help='images '
                        'that the sensitivity of each module is measured on, a forward pass a '
                        'module for each; 0 for none (default: 1)')
    budget = parser.add_argument_group('mixed precision', 'bits of their own for each module')
    budget.add_argument('--target-size', metavar='SIZE', help='the most that quantized.pth may '
                        'have, e.g. 12MB (quantization.target_size)')
    budget.add_argument('--mean-bits', type=float, metavar='BITS', help='of weights '
                        '(quantization.mean_bits)')
    budget.add_argument('--max-drop', type=float, metavar='PERCENT', help='the most of the power '
                        'of the outputs that may become error; as small as that allows '
                        '(quantization.max_drop)')
    return parse_launched(parser)


def options_of(args: argparse.Namespace) -> Dict[str, Any]:
    """``--cfg-options``, with the budgets that have an option of their own."""
    options = dict(args.cfg_options or {})
    for key in BUDGETS:
        value = getattr(args, key)
        if value is not None:
            if f'quantization.{key}' in options:
                raise UserError(f'--{key.replace("_", "-")} and --cfg-options quantization.{key} '
                                'are the same: give one of them')
            options[f'quantization.{key}'] = value
    return options


def main() -> None:
    args = parse_args()
    # Everything that can be wrong is checked before anything is written.
    config = load_config(args.config, options_of(args))
    seed = choose_seed(args.seed, config)
    max_images = MAX_IMAGES if args.max_images is None else args.max_images
    check_positive_int(max_images, '--max-images')
    if args.images is not None:
        own_files(args.images)
    elif args.mix or args.max_images is not None:
        raise UserError(f'{"--mix" if args.mix else "--max-images"} needs --images DIR, the '
                        'folder of your photographs')
    if args.sensitivity_images < 0:
        raise UserError(f'--sensitivity-images must be 0 or more, got {args.sensitivity_images}')
    shown = find_shown_images(args.show, config)
    recipe = read_recipe(config)
    require_launcher(args.launcher, args.device)
    device = resolve_device(args.device)
    source = dict(file=args.checkpoint, sha256=sha256_of_file(args.checkpoint))
    model = build_float_model(config)
    find_adapter(model)  # says best what backbone cannot be quantized
    meta = load_float_weights(model, args.checkpoint, trust=args.trust_checkpoint,
                              choice=weight_choice(args))
    check(model, recipe, processes_of(args.launcher), meta)  # in scope 'model' it runs the model
    PSAQRunner.hooks_for_quantization(config)
    images = None if args.images is None else load_images(
        model, args.images, max_images, seed, config)
    if not args.use_vis_backends:
        keep_local(config)
    config.work_dir = choose_work_dir(args.work_dir, config)
    ensure_writable_dir(config.work_dir)

    runner = PSAQRunner.for_quantization(config, model, source=source, meta=meta,
                                         seed=seed, resume=args.resume, device=device,
                                         launcher=args.launcher, images=images, mix=args.mix,
                                         shown_images=shown,
                                         sensitivity_images=args.sensitivity_images,
                                         command=public_command((args.images, *args.show)))
    runner.quantize()
    if not is_main_process():
        return
    seconds = ', '.join(f'{name} {value:.1f} s' for name, value in runner.pipeline.seconds.items())
    print(f'{config.work_dir}/quantized.pth ({seconds})')
    print(f'{config.work_dir}/report.html says what was done')


if __name__ == '__main__':
    run_tool(main)
