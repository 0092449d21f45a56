# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tables and a picture of what ``deploy.py`` measured and kept.

    python benchmarks/deploy_figures.py > docs/deploy_figures.md
    python benchmarks/deploy_figures.py --brief --plot docs/images/deploy.png
    python benchmarks/deploy_figures.py --whole --summary  # the table of README
    python benchmarks/deploy_figures.py --whole            # all that deploy_whole.py kept
"""
import argparse
import json
from pathlib import Path
from typing import Any, Collection, Dict, List, Optional, Tuple

from psaq_mm.checkpoint import save_json

Row = Dict[str, Any]
Key = Tuple[str, int]

MEASURED = Path(__file__).resolve().parent / 'measured' / 'deploy.json'
"""A list of rows, each a side of a case."""

PEERS = dict(openvino='openvino nncf', onnxruntime='onnxruntime quantize_static')
"""Engine to the peer's int8 that ours is compared with."""

TITLES = {'swin-t 448': 'Swin-T, 448x448', 'swin-s 448': 'Swin-S, 448x448',
          'swin-t 800x1344': 'Swin-T, 800x1344', 'swin-s 800x1344': 'Swin-S, 800x1344',
          'upernet swin-t 512': 'Whole UperNet Swin-T, 512x512',
          'mask-rcnn swin-t 800x1344': 'Backbone, neck and RPN of Mask R-CNN Swin-T, 800x1344'}


ENGINES = dict(openvino='OpenVINO (peer: NNCF)',
               onnxruntime='onnxruntime (peer: quantize_static)')

THREADS = {1: 'one thread', 2: 'two threads'}

WHOLE = {'demo': 'Demo detector, 224x224', 'cascade': 'Demo cascade, 224x224',
         'bccd': 'BCCD detector, 240x320',
         'segmentor': 'Demo segmentor, 224x224',
         'mask-rcnn-t': 'Mask R-CNN Swin-T, 800x1344',
         'mask-rcnn-s': 'Mask R-CNN Swin-S, 800x1344',
         'cascade-t': 'Cascade Mask R-CNN Swin-T, 800x1344',
         'upernet-t': 'UperNet Swin-T, 512x512'}
"""Cases of deploy_whole.py."""

MEASURED_WHOLE = MEASURED.with_name('deploy_whole.json')


def read(file: Path) -> List[Row]:
    """The rows that are kept, none if there is no file."""
    return json.loads(file.read_text()) if file.exists() else []


def keep(file: Path, rows: List[Row], cases: Collection[str] = TITLES) -> None:
    """Add the rows of one run; older ones of the same case, threads and engine go.

    Torch, which runs beside both engines, is kept once.
    """

    def engine_of(row: Row) -> Tuple[str, int, str]:
        return row['case'], row['threads'], row['side'].split()[0]

    new = {engine_of(row) for row in rows}
    kept = [row for row in read(file) if engine_of(row) not in new] + rows
    kept.sort(key=lambda row: (list(cases).index(row['case']), row['threads']))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_json(kept, file)


def _number(value: Optional[float], digits: int) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def full_table(rows: List[Row]) -> str:
    """All sides of one case at one number of threads."""
    lines = ['| | median s | p90 s | to torch fp32 | to engine fp32 | to the peer '
             '| MB | of fp32 |', '|---|---|---|---|---|---|---|---|']
    for row in rows:
        cells = [_number(row['median'], 4), _number(row['p90'], 4)]
        cells += [_number(row[key], 2) for key in ('to_torch', 'to_fp32', 'to_peer')]
        cells += [_number(row['megabytes'], 1), _number(row['size_to_fp32'], 3)]
        lines.append(f'| {row["side"]} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def by_case(rows: List[Row]) -> Dict[Key, List[Row]]:
    """Rows of each case and number of threads; torch, OpenVINO, onnxruntime."""
    found: Dict[Key, List[Row]] = {}
    for row in rows:
        found.setdefault((row['case'], row['threads']), []).append(row)
    order = ['torch', *PEERS]
    for group in found.values():
        group.sort(key=lambda row: order.index(row['side'].split()[0]))
    return found


def name_of(key: Key) -> str:
    """Such as ``Swin-T, 448x448, two threads``."""
    return f'{TITLES[key[0]]}, {THREADS[key[1]]}'


def speeds(rows: List[Row]) -> Dict[str, Optional[float]]:
    """How many times as fast ours is, quantized as far as the case allows."""
    sides = {row['side']: row for row in rows}
    found: Dict[str, Optional[float]] = {}
    for engine in PEERS:
        whole = sides.get(f'{engine} ours, heads too', sides.get(f'{engine} ours', {}))
        for key in ('to_peer', 'to_fp32'):
            found[f'{engine} {key}'] = 1 / whole[key] if whole else None
        found[f'{engine} size'] = whole.get('size_to_fp32')
    apart = sides.get('openvino ours, float attention', {})
    known = apart and 'openvino ours, heads too' not in sides
    found['float attention'] = 1 / apart['to_peer'] if known else None
    return found


def brief_table(rows: List[Row]) -> str:
    """One line for each case."""
    lines = ['| times as fast | as NNCF | with float attention | as OpenVINO fp32 | '
             'as `quantize_static` | as onnxruntime fp32 | file, of fp32 |',
             '|---|---|---|---|---|---|---|']
    for key, group in by_case(rows).items():
        values = speeds(group)
        sizes = [values[f'{engine} size'] for engine in PEERS]
        cells = [_number(values[k], 2) for k in (
            'openvino to_peer', 'float attention', 'openvino to_fp32', 'onnxruntime to_peer',
            'onnxruntime to_fp32')]
        cells.append(_number(max(s for s in sizes if s), 3))
        lines.append(f'| {name_of(key)} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def whole_table(rows: List[Row]) -> str:
    """All sides of whole models, a case after the other."""
    lines = ['| | threads | | median ms | times as fast as the peer | as fp32 | as torch fp32 '
             "| MB | peak MiB | runtime's share | on the test set |", '|---' * 11 + '|']
    for (case, threads), group in by_case(rows).items():
        for row in group:
            seconds = row.get('median')  # of the simulation nobody times
            cells = [_number(seconds and 1000 * seconds, 0), _inverse(row.get('to_peer')),
                     _inverse(row.get('to_fp32')), _inverse(row.get('to_torch')),
                     _number(row.get('megabytes'), 1), _number(row.get('peak_mib'), 0),
                     _number(row.get('runtime_share'), 2), _points(row)]
            lines.append(f'| {WHOLE[case]} | {threads} | {row["side"]} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def _inverse(ratio: Optional[float]) -> str:
    return _number(None if ratio is None else 1 / ratio, 2)


def _points(row: Row) -> str:
    """Such as box and mask AP, where the model is trained."""
    return ' / '.join(f'{value:.1f}' for value in row.get('points', ()))


def summary_table(rows: List[Row], threads: int = 1) -> str:
    """Whole models: the engine's fp32, the peer's int8 from data, ours without."""
    lines = [f'| image to results, {THREADS[threads]} | engine | fp32 | '
             'int8 by a peer, from images | **int8 by ours, without** | the same, simulated in '
             'torch | times as fast as the peer |',
             '|---' * 7 + '|']
    for (case, used), group in by_case(rows).items():
        sides = {row['side']: row for row in group}
        for engine, peer in PEERS.items():
            whole = sides.get(f'{engine} ours, model')
            if used != threads or whole is None:
                continue
            cells = []
            for row in (sides[f'{engine} fp32'], sides.get(peer), whole):
                points = f', {_points(row)}' if row and 'points' in row else ''
                cells.append(f'{1000 * row["median"]:.0f} ms{points}' if row else 'fails')
            cells.append(_points(sides.get('torch simulation, model', {})))
            lines.append(f'| {WHOLE[case]} | {ENGINES[engine]} | {" | ".join(cells)} | '
                         f'{_inverse(whole.get("to_peer"))} |')
    return '\n'.join(lines)


def plot(rows: List[Row], path: Path) -> None:
    """Bars of median milliseconds on one thread: each engine's fp32, the peer's
    int8, and ours."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    groups = [(key, group) for key, group in by_case(rows).items() if key[1] == 1]
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 5.6))
    for axes, (key, group) in zip(panels.flat, groups):
        sides = {row['side']: 1000 * row['median'] for row in group}
        bars = []
        for engine, peer in PEERS.items():
            ours = f'{engine} ours, heads too'
            ours = ours if ours in sides else f'{engine} ours'
            bars += [(f'{engine} fp32', f'{engine} fp32', 'lightgray'),
                     (peer, peer, 'C0'), (f'{engine} ours, int8', ours, 'C1')]
        bars = [('torch fp32', 'torch fp32', 'gray')] + [b for b in bars if b[1] in sides]
        places = range(len(bars))
        axes.barh(places, [sides[b[1]] for b in bars], color=[b[2] for b in bars])
        axes.set_yticks(places, [b[0] for b in bars], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(name_of(key).replace(' of Mask', '\nof Mask'), fontsize=8)
        axes.tick_params(axis='x', labelsize=7)
        axes.set_xlabel('ms', fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--measured', type=Path, metavar='FILE')
    parser.add_argument('--whole', action='store_true', help='what deploy_whole.py measured')
    parser.add_argument('--brief', action='store_true', help='one line for each case')
    parser.add_argument('--summary', action='store_true', help='of whole models')
    parser.add_argument('--threads', type=int, choices=list(THREADS), default=1,
                        help='of the summary')
    parser.add_argument('--without', nargs='+', metavar='CASE', default=())
    parser.add_argument('--plot', type=Path, metavar='PNG')
    args = parser.parse_args()
    rows = [row for row in read(args.measured or (MEASURED_WHOLE if args.whole else MEASURED))
            if row['case'] not in args.without]
    if args.whole:
        table = summary_table(rows, args.threads) if args.summary else whole_table(rows)
        print(f'whole models\n\n{table}')
    elif args.brief:
        print(f'times as fast\n\n{brief_table(rows)}')
    else:
        print('# Latency in engines, all sides\n\n'
              'Printed by `python benchmarks/deploy_figures.py`; [deploy](deploy.md) says '
              'what they are. An empty cell was not measured. In the first table *times as fast* '
              'is better when higher. In the others times are divided by those of torch fp32, '
              "of the engine's fp32 and of the peer: lower is faster; *of fp32* is the size of "
              "the file divided by that of ours, not quantized. torch's exporter may write "
              "weights twice, so an engine's fp32 may be larger.\n\n"
              f'## Whole models\n\n{whole_table(read(MEASURED_WHOLE))}')
        for key, group in by_case(rows).items():
            print(f'\n## {name_of(key)}\n\n{full_table(group)}')
    if args.plot:
        plot(rows, args.plot)


if __name__ == '__main__':
    main()
