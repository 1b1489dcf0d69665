"""Shared sections are the same in all scripts, and the check for that notices when they are not."""

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

SOURCE = (ROOT / ORIGINAL).read_text()


def test_every_script_is_the_original_or_a_declared_copy():
    scripts = [*ROOT.glob('*.py'), *ROOT.glob('records/*.py')]
    names = {str(path.relative_to(ROOT)) for path in scripts}
    assert names == {ORIGINAL, *COPIES}
    assert list(sections(SOURCE)) == AIRBENCH and OWN < {*AIRBENCH}
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
    return source.replace('how many trainings', 'how many runs')


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


@pytest.mark.parametrize('name', COPIES)
@pytest.mark.parametrize(
    'change, fault',
    [
        (other_crop, f'Loss and evaluation differs from {ORIGINAL}'),
        (other_help, f'Command line differs from {ORIGINAL}'),
        (renamed_section, 'Mean is declared neither shared nor own'),
        (without_whitening, 'Whitening is missing'),
        (without_hyp, 'Hyperparameters is missing'),
        (with_extras, 'Extras is declared neither shared nor own'),
        (whitening_last, 'the order of the sections is another'),
    ],
)
def test_a_drift_is_noticed_and_repaired(name, change, fault):
    copy = (ROOT / name).read_text()
    drifted = change(copy)
    assert drifted != copy
    assert fault in faults(drifted, COPIES[name], originals())
    if 'Hyperparameters' in sections(drifted):  # what is a copy's own has no other source
        is_repaired = repaired(drifted, COPIES[name], originals()) == copy
        assert is_repaired


def test_a_drift_from_the_record_is_noticed_and_repaired():
    copy = (ROOT / 'swap94.py').read_text()
    drifted = copy.replace('class Muon(', 'class Muons(')
    declared = COPIES['swap94.py']
    assert faults(drifted, declared, originals()) == [f'Optimizer differs from {RECORD}']
    is_repaired = repaired(drifted, declared, originals()) == copy
    assert is_repaired


def test_what_is_a_copys_own_stays():
    changed = (ROOT / 'airbench95.py').read_text().replace("'lr': 10.0,", "'lr': 9.5,")
    assert "'lr': 9.5," in changed
    stays = repaired(changed, COPIES['airbench95.py'], originals()) == changed
    assert stays
    assert faults(changed, COPIES['airbench95.py'], originals()) == []


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
def test_hyp_differs_in_what_was_published_alone(name):
    ours = airbench94.flat(airbench94.hyp)
    theirs = airbench94.flat(import_module(name).hyp)
    assert list(ours) == list(theirs)
    assert all(type(ours[key]) is type(theirs[key]) for key in ours)
    assert {key: value for key, value in theirs.items() if value != ours[key]} == PUBLISHED[name]
