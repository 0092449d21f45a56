# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The rows of tables, without measuring any."""
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / 'benchmarks'


@pytest.fixture(scope='module')
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import ablation
        import accuracy
        import experiment
        import fill_results
        yield dict(accuracy=accuracy, ablation=ablation, experiment=experiment,
                   fill_results=fill_results)
    finally:
        sys.path.remove(str(BENCHMARKS))


def names_of(script):
    if script.__name__ == 'accuracy':
        return list(script.ROWS)
    return [*script.GAME, *script.QUANTIZER, *script.WITH_GAME, *script.AS_SHIPPED]


@pytest.mark.parametrize('name', ['accuracy', 'ablation'])
def test_each_row_has_a_recipe_of_its_own(name, scripts):
    script = scripts[name]
    made = {row: script.experiment_of(row, 'w4a8', 'model') for row in names_of(script)}
    assert len({e.fingerprint for e in made.values()}) >= len(made) - 3  # some say the default
    for row in {'prior', 'default'} & {*made}:
        other = scripts['accuracy'].experiment_of(row, 'w4a8', 'model')
        assert other == made[row] and other.fingerprint == made[row].fingerprint


def test_fingerprint(scripts):
    made = scripts['experiment'].experiment('w6a6', 'backbone')
    real = scripts['experiment'].experiment('w6a6', 'backbone', images='real32')

    def changed(experiment, **changes):
        return experiment._replace(recipe=experiment.recipe.changed(changes)).fingerprint

    # Kept values are of this recipe: a new key must not change it where it is off.
    assert made.fingerprint == '5124e3749c68'
    for same in (dict(synthesis=dict(save_interval=3)), dict(evolution=dict(zoom=2.)),
                 dict(quantization=dict(candidate_bits=[2, 8]))):
        assert changed(made, **same) == made.fingerprint
    for other in (dict(synthesis=dict(steps=3)), dict(quantization=dict(scope='model')),
                  dict(evolution=dict(rounds=1)), dict(calibration=dict(image_size=None)),
                  dict(quantization=dict(mean_bits=4))):
        assert changed(made, **other) != made.fingerprint
    assert changed(real, synthesis=dict(steps=3)) == real.fingerprint != made.fingerprint
    assert replace(real.recipe, calibration=made.recipe.calibration) == made.recipe


def test_old_values_are_marked(scripts, tmp_path, capsys):
    experiment = scripts['experiment']
    made, results = experiment.experiment('w4a4', 'backbone'), experiment.Results(tmp_path / 'a')
    results.values = {'row/0': dict(sqnr=1., recipe=experiment.OLD[0]),
                      'row/1': dict(sqnr=3., recipe=experiment.OLD[1]), 'row/2': dict(sqnr=9.)}
    found = results.over_seeds([0, 1, 2], made, 'row')
    assert experiment.cell(found, 'sqnr') == '2.00 (1.0 to 3.0) †'
    results.print_note()
    assert capsys.readouterr().out.startswith('\n† Measured with settings of an earlier version')
    results.values['row/1']['recipe'] = made.fingerprint
    assert experiment.cell(results.over_seeds([0, 1, 2], made, 'row'), 'sqnr') == '3.0'


def test_rows_that_the_pages_name_exist(scripts):
    commands = [found[1] for page in scripts['fill_results'].pages()
                for found in scripts['fill_results'].BLOCK.findall(page.read_text())]
    assert len(commands) > 10
    for command in commands:
        _, script, *words = shlex.split(command)
        assert (ROOT / script).exists()
        for option in {'--rows', '--variants'} & {*words}:
            rest = words[words.index(option) + 1:]
            named = rest[:next((i for i, w in enumerate(rest) if w.startswith('--')), None)]
            known = {Path(script).stem} & {*scripts} or {'accuracy', 'ablation'}
            assert {*named} <= {name for k in known for name in names_of(scripts[k])}


def test_absent_images_are_named(scripts, tmp_path, monkeypatch):
    experiment = scripts['experiment']
    monkeypatch.setitem(experiment.PHOTOGRAPHS, 'nuclei', (tmp_path / 'images', 'train.json'))
    with pytest.raises(SystemExit, match='images is not here'):
        experiment.Subject('nuclei', tmp_path)


def test_widths_of_their_own_have_the_rules_of_a_shipped_recipe(scripts):
    experiment = scripts['experiment'].experiment
    quantization = experiment('w4a3', 'backbone').recipe.quantization
    shipped = experiment('w3a3', 'backbone').recipe.quantization
    assert (quantization.weight.bits, quantization.activation.bits) == (4, 3)
    assert (quantization.roles, quantization.overrides) == (shipped.roles, shipped.overrides)
    assert experiment('w2a4', 'model').recipe.quantization.weight.bits == 2
