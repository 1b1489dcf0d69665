"""Shared sections are the same in all scripts, and the check that says so notices when they are not."""

import pytest

import airbench94
from copies import COPIES, LOCAL, ORIGINAL, RECIPE, ROOT, TOOLING, faults, repaired, sections

SOURCE = (ROOT / ORIGINAL).read_text()


def test_every_script_is_the_original_or_a_declared_copy():
    assert {path.name for path in ROOT.glob('*.py')} == {ORIGINAL, *COPIES}
    assert list(sections(SOURCE)) == RECIPE + TOOLING and LOCAL < {*RECIPE}
    assert ''.join(sections(SOURCE).values()) == SOURCE


@pytest.mark.parametrize('name', COPIES)
def test_no_copy_has_drifted(name):
    assert faults(SOURCE, (ROOT / name).read_text(), *COPIES[name]) == [], 'repair: python tests/copies.py'


@pytest.mark.parametrize('name, limit', [(ORIGINAL, 850), ('airbench95.py', 850), ('airbench96.py', 850), ('swap94.py', 1000)])
def test_scripts_stay_short_enough_to_read(name, limit):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) < limit and max(map(len, lines)) <= 120


@pytest.mark.parametrize('name', COPIES)
@pytest.mark.parametrize('change, fault', [
    (lambda s: s.replace('padded[:, :, 2:, 2:]', 'padded[:, :, 1:, 1:]'), f'Loss and evaluation differs from {ORIGINAL}'),
    (lambda s: s.replace('import argparse, copy', 'import argparse,  copy'), f'Setup differs from {ORIGINAL}'),
    (lambda s: s.replace("#### Lookahead ", "#### Mean "), 'Mean is declared neither shared nor local'),
    (lambda s: s.replace(sections(s)['Whitening'], ''), 'Whitening is missing'),
    (lambda s: s.replace(sections(s)['Hyperparameters'], ''), 'Hyperparameters is missing'),
    (lambda s: s + '#### Extras ####\nx = 1\n', 'Extras is declared neither shared nor local'),
    (lambda s: s.replace(sections(s)['Whitening'], '') + sections(s)['Whitening'],
     'the order of the sections is another'),
])
def test_a_drift_is_noticed_and_repaired(name, change, fault):
    copy = (ROOT / name).read_text()
    drifted = change(copy)
    assert (drifted == copy, fault in faults(SOURCE, drifted, *COPIES[name])) == (False, True)
    if 'Hyperparameters' in sections(drifted):      # what is local has no other source
        is_repaired = repaired(SOURCE, drifted, *COPIES[name]) == copy
        assert is_repaired


def test_what_is_local_stays():
    changed = (ROOT / 'airbench95.py').read_text().replace("'lr': 10.0,", "'lr': 9.5,")
    stays = repaired(SOURCE, changed, *COPIES['airbench95.py']) == changed
    assert "'lr': 9.5," in changed and stays and faults(SOURCE, changed, *COPIES['airbench95.py']) == []


# What the published scripts set otherwise than airbench94.
PUBLISHED = {
    'airbench95': {'opt.train_epochs': 15.0, 'opt.lr': 10.0, 'net.widths.block1': 128, 'net.widths.block2': 384,
                   'net.widths.block3': 384, 'target': 0.95},
    'airbench96': {'opt.train_epochs': 37.0, 'opt.lr': 9.0, 'opt.weight_decay': 0.012, 'opt.schedule.peak_at': 0.1,
                   'opt.schedule.end': 0.0, 'aug.translate': 4, 'aug.cutout': 12, 'net.widths.block1': 128,
                   'net.widths.block2': 384, 'net.widths.block3': 512, 'net.depth': 3, 'net.residual': True,
                   'net.batchnorm_momentum': 0.9, 'target': 0.96}}


@pytest.mark.parametrize('name', PUBLISHED)
def test_hyp_differs_in_what_was_published_alone(name):
    values = [{key: group[leaf] for key, (group, leaf) in airbench94.leaves(module.hyp)}
              for module in (airbench94, __import__(name))]
    assert list(values[0]) == list(values[1])
    assert all(type(a) is type(b) for a, b in zip(*(v.values() for v in values)))
    assert {key: value for key, value in values[1].items() if value != values[0][key]} == PUBLISHED[name]
