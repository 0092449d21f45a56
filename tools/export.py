# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Export a quantized checkpoint to ONNX or OpenVINO, and check what was written.

    python tools/export.py configs/mask_rcnn_swin_s_w8a8.py work_dirs/.../quantized.pth \\
        --format openvino --size 800 1344 --size 800 1088
"""
import argparse
import os
import sys

from psaq_mm.checkpoint import sha256_of_file
from psaq_mm.deploy import FORMATS, ExportError, export_graphs
from psaq_mm.deploy.agreement import BOUND
from psaq_mm.deploy.hosts import PARTS
from psaq_mm.engine import init_model, load_config
from psaq_mm.engine.command_line import choose_work_dir, run_tool, tool_parser
from psaq_mm.errors import UserError
from psaq_mm.runtime.images import find_files


def parse_args() -> argparse.Namespace:
    parser = tool_parser(
        'Export a quantized checkpoint, integers and scales as they are, and compare '
        'what the engine computes with the simulation. Writes the graphs and export.json.',
        config='the config that the checkpoint was quantized with',
        checkpoint='quantized.pth, or a float checkpoint')
    parser.add_argument('--format', choices=list(FORMATS), required=True, help='what to write')
    parser.add_argument('--size', nargs=2, type=int, action='append', default=[],
                        metavar=('H', 'W'), help='height and width of images as the model gets '
                        'them; give it again for more. Graphs of one size are faster '
                        '(default: one graph for all sizes)')
    parser.add_argument('--part', choices=PARTS, default='model', help='model: all of it, from '
                        'the pixels of an image to results; features: what mmdet and mmseg then '
                        'finish in torch (default: model)')
    parser.add_argument('--out', metavar='DIR', help='where to write '
                        '(default: <work-dir>/export_<format>)')
    parser.add_argument('--float-roles', nargs='+', default=[], metavar='ROLE',
                        help='leave out the quantizers of these roles, e.g. query key attention '
                        'value: no longer the arithmetic of the checkpoint')
    parser.add_argument('--check-images', nargs='+', default=[], metavar='IMAGE',
                        help='images, or folders of them, on which the engine is compared with '
                        'the simulation (default: made up)')
    parser.add_argument('--least-share', type=float, default=BOUND, metavar='SHARE',
                        help='exit with status 1 if the engine reaches less of the decisions of '
                        'the simulation, of those that it keeps itself where it sums in another '
                        f'order (default: {BOUND})')
    parser.add_argument('--device', default='CPU', help="the engine's device for that: CPU, GPU, "
                        'NPU, AUTO (OpenVINO), CUDA (onnxruntime)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.cfg_options)
    out = args.out or os.path.join(choose_work_dir(args.work_dir, config),
                                   f'export_{args.format}')
    images = find_files(args.check_images)
    if args.part == 'features' and args.least_share != BOUND:
        raise UserError('--least-share is of whole models; leave it out with --part features, '
                        'where outputs are compared')
    model = init_model(config, args.checkpoint, trust=args.trust_checkpoint,
                       averaged=args.averaged, prefix=args.prefix)
    about = dict(checkpoint=args.checkpoint, sha256=sha256_of_file(args.checkpoint),
                 config=args.config)
    sizes = [(height, width) for height, width in args.size]
    try:
        manifest = export_graphs(model, out, args.format, sizes, args.float_roles, about,
                                 part=args.part, config=config, check_images=images,
                                 least_share=args.least_share, device=args.device)
    except ExportError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    total = sum(graph['bytes'] for graph in manifest['graphs'])
    print(f'{out}: {len(manifest["graphs"])} graph(s) of {manifest["modules"]}, '
          f'{total / 1e6:.2f} MB')


if __name__ == '__main__':
    run_tool(main)
