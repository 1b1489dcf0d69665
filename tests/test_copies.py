"""Shared sections are the same in all recipes, and the check notices if they are not."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
from copies import (
    AIRBENCH,
    COPIES,
    ORIGINAL,
    OWN,
    RECORD,
    ROOT,
    faults,
    originals,
    repaired,
    sections,
)

import airbench94
from lab.options import flat
from records import record94, record95

SOURCE = (ROOT / ORIGINAL).read_text()


def test_every_recipe_is_the_original_or_a_declared_copy():
    recipes = [*ROOT.glob('*.py'), *ROOT.glob('records/*.py')]
    names = {str(path.relative_to(ROOT)) for path in recipes}
    assert names == {ORIGINAL, *COPIES}
    assert list(sections(SOURCE)) == AIRBENCH and set(OWN) < set(AIRBENCH)
    assert ''.join(sections(SOURCE).values()) == SOURCE


def test_what_is_copied_from_the_record_is_its_own():
    for declared in COPIES.values():
        copied = [name for name, origin in declared.items() if origin == RECORD]
        assert all(COPIES[RECORD][name] is None for name in copied)
    assert RECORD in COPIES['swap94.py'].values()


@pytest.mark.parametrize('name', COPIES)
def test_no_copy_has_drifted(name):
    found = faults((ROOT / name).read_text(), COPIES[name], originals())
    assert found == [], 'repair: python tests/copies.py'


def other_crop(source):
    return source.replace('padded[:, :, 2:, 2:]', 'padded[:, :, 1:, 1:]')


def other_help(source):
    return source.replace('meant for many runs', 'faster for many runs')


def renamed_section(source):
    return source.replace('#### Whitening ', '#### Mean ')


def without_whitening(source):
    return source.replace(sections(source)['Whitening'], '')


def without_hyp(source):
    return source.replace(sections(source)['Hyperparameters'], '')


def with_extras(source):
    return source + '#### Extras ####\nx = 1\n'


def whitening_last(source):
    return without_whitening(source) + sections(source)['Whitening']


DRIFTS = [
    (other_crop, f'Loss and evaluation differs from {ORIGINAL}'),
    (other_help, f'Helpers differs from {ORIGINAL}'),
    (renamed_section, 'Mean is declared neither shared nor own'),
    (without_whitening, 'Whitening is missing'),
    (without_hyp, 'Hyperparameters is missing'),
    (with_extras, 'Extras is declared neither shared nor own'),
    (whitening_last, 'the sections are in another order'),
]


@pytest.mark.parametrize('name', COPIES)
@pytest.mark.parametrize(('change', 'fault'), DRIFTS)
def test_a_drift_is_noticed_and_repaired(name, change, fault):
    copy = (ROOT / name).read_text()
    drifted = change(copy)
    assert drifted != copy
    assert fault in faults(drifted, COPIES[name], originals())
    if 'Hyperparameters' in sections(drifted):  # a copy's own sections have no other source
        is_repaired = repaired(drifted, COPIES[name], originals()) == copy
        assert is_repaired


def test_a_drift_from_the_record_is_noticed_and_repaired():
    copy = (ROOT / 'swap94.py').read_text()
    drifted = copy.replace('class Muon(', 'class Muons(')
    declared = COPIES['swap94.py']
    assert faults(drifted, declared, originals()) == [f'Optimizer differs from {RECORD}']
    is_repaired = repaired(drifted, declared, originals()) == copy
    assert is_repaired


def test_a_copys_own_sections_stay():
    changed = (ROOT / 'airbench95.py').read_text().replace("'lr': 10.0,", "'lr': 9.5,")
    assert "'lr': 9.5," in changed
    stays = repaired(changed, COPIES['airbench95.py'], originals()) == changed
    assert stays
    assert faults(changed, COPIES['airbench95.py'], originals()) == []


@pytest.fixture
def tool(tmp_path):
    """A folder with copies.py and all recipes, and a function that runs copies.py there."""
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'records').mkdir()
    for name in (ORIGINAL, *COPIES, 'tests/copies.py'):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def run():
        command = [sys.executable, 'tests/copies.py']
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return tmp_path, run


def test_the_tool_repairs_and_says_what(tool):
    folder, run = tool
    assert run().stdout == ''.join(f'{name}: was up to date\n' for name in COPIES)
    file = folder / 'airbench96.py'
    file.write_text(other_help(other_crop(file.read_text())))
    done = run()
    assert done.returncode == 0
    assert done.stdout.splitlines()[1] == (
        'airbench96.py: repaired: Loss and evaluation differs from airbench94.py; '
        'Helpers differs from airbench94.py'
    )
    is_repaired = file.read_text() == (ROOT / 'airbench96.py').read_text()
    assert is_repaired
    assert run().stdout == ''.join(f'{name}: was up to date\n' for name in COPIES)


def test_the_tool_deletes_no_section_that_it_does_not_know(tool):
    folder, run = tool
    file = folder / 'swap94.py'
    file.write_text(with_extras(file.read_text()))
    done = run()
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == (
        'swap94.py: NOT repaired, since Extras is declared neither shared nor own'
    )
    assert sections(file.read_text())['Extras'] == '#### Extras ####\nx = 1\n'


# What the published scripts set otherwise than airbench94.
PUBLISHED = {
    'airbench95': {
        'opt.train_epochs': 15.0,
        'opt.lr': 10.0,
        'net.widths.block1': 128,
        'net.widths.block2': 384,
        'net.widths.block3': 384,
        'target': 0.95,
    },
    'airbench96': {
        'opt.train_epochs': 37.0,
        'opt.lr': 9.0,
        'opt.weight_decay': 0.012,
        'opt.schedule.peak_at': 0.1,
        'opt.schedule.end': 0.0,
        'aug.translate': 4,
        'aug.cutout': 12,
        'net.widths.block1': 128,
        'net.widths.block2': 384,
        'net.widths.block3': 512,
        'net.depth': 3,
        'net.residual': True,
        'net.batchnorm_momentum': 0.9,
        'target': 0.96,
    },
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_hyp_differs_only_where_the_published_scripts_do(name):
    ours = flat(airbench94.hyp)
    theirs = flat(import_module(name).hyp)
    assert list(ours) == list(theirs)
    assert all(type(ours[key]) is type(theirs[key]) for key in ours)
    assert {key: value for key, value in theirs.items() if value != ours[key]} == PUBLISHED[name]


def settings_of_log(name):
    return flat(json.loads((ROOT / 'logs' / f'{name}.json').read_text())['hyp'])


def test_the_records_have_the_settings_of_their_logs():
    added_since = {'net.depth': 2, 'net.residual': False}  # which record94 had, without a choice
    assert flat(record94.hyp) == settings_of_log('record94-cpu') | added_since
    assert flat(record95.hyp) == settings_of_log('record95-cpu-bfloat16')
