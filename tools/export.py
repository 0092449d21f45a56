# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Export a quantized checkpoint to ONNX or OpenVINO, and check what was written.

    python tools/export.py configs/mask_rcnn_swin_s_w8a8.py work_dirs/.../quantized.pth \\
        --format openvino --size 800 1344 --size 800 1088
"""
import argparse
import os

from psaq_mm.checkpoint import sha256_of_file
from psaq_mm.deploy import FORMATS, export_graphs
from psaq_mm.engine import build_model, load_config
from psaq_mm.engine.command_line import choose_work_dir, run_tool, tool_parser, weight_choice


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
    parser.add_argument('--out', metavar='DIR', help='where to write '
                        '(default: <work-dir>/export_<format>)')
    parser.add_argument('--float-roles', nargs='+', default=[], metavar='ROLE',
                        help='leave out the quantizers of these roles, e.g. query key attention '
                        'value: no longer the arithmetic of the checkpoint')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.cfg_options)
    out = args.out or os.path.join(choose_work_dir(args.work_dir, config),
                                   f'export_{args.format}')
    model = build_model(config, args.checkpoint, args.trust_checkpoint, weight_choice(args))
    about = dict(checkpoint=args.checkpoint, sha256=sha256_of_file(args.checkpoint),
                 config=args.config)
    sizes = [(height, width) for height, width in args.size]
    manifest = export_graphs(model, out, args.format, sizes, args.float_roles, about)
    total = sum(graph['bytes'] for graph in manifest['graphs'])
    print(f'{out}: {len(manifest["graphs"])} graph(s) of {manifest["modules"]}, '
          f'{total / 1e6:.2f} MB')


if __name__ == '__main__':
    run_tool(main)
