# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The command ``psaq_mm``: runs what lies in ``tools/`` of a checkout.

    psaq_mm quantize CONFIG CHECKPOINT
    python -m psaq_mm quantize CONFIG CHECKPOINT
"""
import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Optional, Sequence

from psaq_mm.version import __version__

COMMANDS = dict(
    quantize='quantize a float checkpoint without data',
    test='evaluate a float or quantized checkpoint',
    infer='draw what a checkpoint, or an exported model, predicts on images',
    export='export a quantized checkpoint to ONNX or OpenVINO',
    compare='put two quantization runs side by side',
    benchmark='time a quantized checkpoint in torch and in engines')
"""Command, and what its tool does."""


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run a tool, as ``python tools/<command>.py`` does.

    Args:
        arguments (Sequence[str], optional): The command, and what its tool
            takes. Defaults to None: those of this process.
    """
    listed = '\n'.join(f'  {name:<10} {what}' for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog='psaq_mm', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Quantize Swin models of OpenMMLab and timm without data.',
        epilog=f'commands:\n{listed}\n\npsaq_mm COMMAND --help says what a command takes.')
    parser.add_argument('--version', action='version', version=f'psaq_mm {__version__}')
    parser.add_argument('command', choices=list(COMMANDS), metavar='COMMAND',
                        help='one of those below')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='of the command')
    args = parser.parse_args(arguments)
    if args.command == 'infer' and any(word.endswith(('.xml', '.onnx'))
                                       for word in args.arguments):  # needs no torch
        from psaq_mm.runtime.__main__ import main as infer
        return infer(args.arguments, 'psaq_mm infer')
    script = Path(__file__).parent / '.mim' / 'tools' / f'{args.command}.py'
    if not script.is_file():
        parser.error(f'{script} is missing: psaq_mm is not installed. Run make, or pip install it')
    spec = importlib.util.spec_from_file_location(f'psaq_mm_{args.command}', script)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    from psaq_mm.engine.command_line import run_tool
    sys.argv = [f'psaq_mm {args.command}', *args.arguments]
    return run_tool(tool.main)


if __name__ == '__main__':
    main()
