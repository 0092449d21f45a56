# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Evaluate a float or quantized checkpoint with the config's own evaluator.

    python tools/test.py configs/mask_rcnn_swin_s_w8a8.py work_dirs/.../quantized.pth
    python tools/test.py configs/mask_rcnn_swin_s_w8a8.py work_dirs/.../quantized.pth \\
        --backend openvino
"""
import argparse

from mmengine.dist import is_main_process

from psaq_mm.checkpoint import ensure_writable_dir, plain, save_json
from psaq_mm.engine import PSAQRunner, has_recipe, load_config, read_recipe, resolve_device
from psaq_mm.engine.command_line import (
    choose_work_dir,
    draw_predictions,
    hooks_for_test,
    keep_local,
    parse_launched,
    prepare_for_test,
    require_backend,
    require_launcher,
    require_test_data,
    run_tool,
    tool_parser,
)
from psaq_mm.engine.hooks import describe_backend
from psaq_mm.engine.runner import describe_checkpoint
from psaq_mm.runtime.engines import add_engine_options


def parse_args() -> argparse.Namespace:
    parser = tool_parser(
        "Evaluate a float or quantized checkpoint with the config's own evaluator.",
        config='ours, or a plain config of mmdet or mmseg',
        checkpoint='float checkpoint or quantized.pth')
    parser.add_argument('--show-dir', help='draw the predictions to this folder inside '
                        'the log folder (segmentations: the work directory)')
    parser.add_argument('--metrics', metavar='FILE', help='write the metrics to a JSON file')
    parser.add_argument('--backend', choices=['torch', 'onnxruntime', 'openvino'],
                        default='torch', help='what runs the model: an engine runs all of it')
    parser.add_argument('--exported', metavar='DIR', help='folder that tools/export.py wrote '
                        '(default: export now, one graph for all sizes)')
    add_engine_options(parser, '--engine-device')
    return parse_launched(parser)


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.cfg_options)
    if has_recipe(config):
        read_recipe(config)
    require_launcher(args.launcher, args.device)
    device = resolve_device('cpu' if args.backend != 'torch' and args.device == 'auto'
                            else args.device)
    require_backend(args.backend, args.exported, args.threads, args.precision, args.launcher,
                    str(device), args.engine_device)
    require_test_data(config)
    kind = describe_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
    config.custom_hooks = hooks_for_test(config, args.checkpoint, args.backend, args.exported,
                                         args.threads, args.precision, args.engine_device)
    config.work_dir = choose_work_dir(args.work_dir, config)
    if args.show_dir:
        draw_predictions(config, args.show_dir)
    ensure_writable_dir(config.work_dir)

    prepare_for_test(config)
    if not args.use_vis_backends:
        keep_local(config)
    config.load_from = args.checkpoint
    config.launcher = args.launcher
    config.trust_checkpoint = args.trust_checkpoint
    config.weight_choice = dict(averaged=args.averaged, prefix=args.prefix)
    if args.launcher == 'none':
        config.device = str(device)
    runner = PSAQRunner.from_cfg(config)
    metrics = plain(runner.test())  # mmseg returns numpy's numbers
    if not is_main_process():
        return
    backend = describe_backend(runner)
    print(f'{args.checkpoint}: {kind}, run by {backend}')
    for name, value in metrics.items():
        print(f'  {name}: {value}')
    if not metrics:
        print('  no metric: the evaluator had nothing to measure, for instance no predictions')
    if args.metrics:
        save_json(dict(checkpoint=args.checkpoint, kind=kind, backend=backend,
                       metrics=metrics), args.metrics)


if __name__ == '__main__':
    run_tool(main)
