# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Tests of benchmarks/brief.py and fill_results.py: the tables of README and docs."""
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import brief
    import experiment
    import fill_results
    monkeypatch.setattr(brief, 'MEASURED', tmp_path)
    return dict(experiment=experiment, brief=brief, fill_results=fill_results)


def test_cells_say_what_is_missing_and_what_is_old(scripts, tmp_path, capsys):
    experiment, brief = scripts['experiment'], scripts['brief']
    results = experiment.Results(tmp_path / 'demo.json')
    made = {row: brief.made_by(row, 'w4a4', 'backbone') for row in ('default', 'game', 'real32')}
    results.add({'coco/bbox_mAP': .65, 'coco/segm_mAP': .62}, None, 'float')
    for row, seeds in dict(default=3, game=3, real32=1).items():
        for seed in range(seeds):
            results.add({'coco/bbox_mAP': .6 + .01 * seed, 'coco/segm_mAP': .5, 'sqnr': 9.},
                        made[row], row, 'w4a4', 'backbone', seed)
    for seed in range(3):
        results.values[f'game/w4a4/backbone/{seed}']['recipe'] = experiment.OLD[0]
    experiment.save_json(results.values, results.file)
    model = brief.Model('demo', 0)
    brief.print_table([model], ['w4a4'], ['default', 'game', 'real32', 'noise'], 'backbone',
                      'sqnr', '')
    assert capsys.readouterr().out.splitlines()[2] == (
        '| Demo detector, box / mask AP | W4A4 | 65.0 / 62.0 | 61.0 / 50.0, 9.0 dB '
        '| 61.0 / 50.0, 9.0 dB † | 60.0 / 50.0, 9.0 dB (1 of 3 seeds) | - |')
    for minus, cells in (('float', '-4.0 / -12.0 | -4.0 / -12.0 † | -5.0 / -12.0 (1 of 3 seeds)'),
                         ('game', '+0.0 / +0.0 † | +0.0 / +0.0 † | -1.0 / +0.0 (1 of 3 seeds) †')):
        brief.print_table([model], ['w4a4'], ['default', 'game', 'real32', 'noise'], 'backbone',
                          '', minus)
        assert capsys.readouterr().out.splitlines()[2].endswith(f'| 65.0 / 62.0 | {cells} | - |')


def test_a_block_is_filled_without_the_first_line(scripts, tmp_path, monkeypatch):
    fill = scripts['fill_results']
    (tmp_path / 'benchmarks').mkdir()
    (tmp_path / 'benchmarks' / 'a.py').write_text('print("head\\n\\n| table |")')
    (tmp_path / 'benchmarks' / 'b.py').write_text('raise SystemExit(1)')
    monkeypatch.setattr(fill, 'ROOT', tmp_path)  # where commands run
    page = tmp_path / 'page.md'
    page.write_text('<!-- python benchmarks/a.py -->\nold\n<!-- end -->\n'
                    '<!-- python benchmarks/b.py -->\nkept\n<!-- end -->\n')
    monkeypatch.setattr(sys, 'argv', ['fill_results.py', str(page)])
    monkeypatch.chdir(tmp_path)
    fill.main()
    assert page.read_text() == (
        '<!-- python benchmarks/a.py -->\n\n| table |\n\n<!-- end -->\n'
        '<!-- python benchmarks/b.py -->\nkept\n<!-- end -->\n')


def test_tables_of_whole_models(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import deploy_figures
    sides = dict(fp32=dict(median=0.0304, points=[64.8, 62.7]), nncf=dict(median=0.02))
    sides['ours, model'] = dict(median=0.01, to_peer=0.5, to_fp32=0.33)
    file = tmp_path / 'deploy_whole.json'
    deploy_figures.keep(file, [dict(row, case='bccd', threads=1, side=f'openvino {side}')
                               for side, row in sides.items()], deploy_figures.WHOLE)
    deploy_figures.keep(file, [
        dict(case='demo', threads=1, side='onnxruntime fp32', median=0.04),
        dict(case='demo', threads=1, side='onnxruntime ours, model', median=0.02),
        dict(case='demo', threads=1, side='torch simulation, model', points=[64.7, 62.6])],
        deploy_figures.WHOLE)
    lines = deploy_figures.summary_table(deploy_figures.read(file)).splitlines()
    assert lines[2].endswith('quantize_static) | 40 ms | fails | 20 ms | 64.7 / 62.6 |  |')
    assert lines[3].endswith('| 30 ms, 64.8 / 62.7 | 20 ms | 10 ms |  | 2.00 |')
    everything = deploy_figures.whole_table(deploy_figures.read(file)).splitlines()
    assert len(everything) == 2 + 6
    assert '| torch simulation, model |  |  |  |  |  |  |  | 64.7 / 62.6 |' in everything[2]
    assert '| openvino ours, model | 10 | 2.00 | 3.03 |' in everything[-1]
