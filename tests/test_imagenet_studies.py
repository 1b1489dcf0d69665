"""The two studies of ImageNet: their settings, commands, tables, and SWAP's groups of ranks."""

import re
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import smoke
import torch
from conftest import on_ranks
from test_imagenet import draw_pictures
from torch import nn
from torch.testing import assert_close

import swap94
from lab.errors import UserError
from studies import common, imagenet, imagenet_flip, imagenet_swap, pictures
from studies.common import run_study

PAPER = imagenet_swap.SCALES['paper']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Just enough pictures for the largest step of SWAP's smoke scale."""
    return draw_pictures(tmp_path_factory.mktemp('data'), 33, 9, classes=3, size=(40, 48))


def smoke_call(data, out):
    options = ['--scale', 'smoke', '--device', 'cpu', '--dtype', 'float32', '--workers', '0']
    return [*options, '--data', str(data), '--out', str(out)]


FLIP, SWAP = smoke.study_of('imagenet_flip'), smoke.study_of('imagenet_swap')


def run_flip(*argv):
    return run_study(FLIP, argv)


def run_swap(*argv):
    return run_study(SWAP, argv)


def columns_of(table):
    return [re.split('  +', line) for line in table.splitlines()]


#### Flips ####


def test_the_flip_study_is_a_command(data, tmp_path, capsys):
    out = tmp_path / 'out'
    assert run_flip(*smoke_call(data, out)) == 0
    trained = capsys.readouterr().out
    records = common.read_cells(out)
    assert len(records) == 4 and not list((out / 'checkpoints').iterdir())
    for record in records:
        assert len(record['losses']) == 3 and record['damaged'] == 0
        assert [set(found) for found in record['accuracies']] == 2 * [
            {'top1', 'top5', 'tta_top1', 'tta_top5'}
        ]
    assert run_flip('--show', '--out', str(out)) == 0
    table = capsys.readouterr().out
    assert table in trained
    row = 'light, 16 epochs, CC(192, 1.0), without TTA'
    assert [row, '61.79', '64.50', '64.93'] in columns_of(table)
    assert (out / 'imagenet_flip.png').stat().st_size > 10_000


def test_the_papers_flip_settings():
    settings = imagenet_flip.SCALES['paper']
    rows = list(imagenet_flip.rows_of(settings))
    assert set(imagenet_flip.PUBLISHED) <= set(rows)
    assert len(imagenet_flip.plan(settings, [])) == 162
    schedule = imagenet_flip.schedule_of('light', 16, settings)
    at = [(0, 160, 0.0), (1, 160, 0.25), (2, 160, 0.5), (9, 160, 0.25), (12, 192, 0.5 * 4 / 14)]
    for epoch, pixels, rate in at:
        part = pictures.segment_of(schedule, epoch)
        assert (part['pixels'], part['batch'], part['least_area']) == (pixels, 1024, None)
        assert pictures.rate_at(part, epoch) == pytest.approx(rate)
    assert pictures.rate_at(schedule[-1], 16) == 0
    growths = [imagenet_flip.schedule_of('heavy', n, settings)[-1]['epochs'] for n in (20, 88)]
    assert growths == [[15, 20], [71, 88]]


def flip_records():
    """Records in which each flip is a point better than the one before, and more with each seed."""
    records = []
    for i, flip in enumerate(pictures.FLIPS):
        for seed in range(i, 4):  # the first seeds lack some flips
            top1 = 0.5 + 0.01 * i * (1 + 0.1 * seed)
            cell = {'crop': 'light', 'epochs': 3, 'flip': flip}
            accuracies = 2 * [{'top1': top1, 'tta_top1': top1 + 0.1}]
            records.append({'cell': cell, 'seed': seed, 'accuracies': accuracies})
    return records


def test_gains_are_of_seeds_that_both_flips_have(capsys):
    settings = smoke.settings_of('imagenet_flip')
    imagenet_flip.print_accuracies(flip_records(), settings)
    imagenet_flip.print_gains(flip_records(), settings)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split('without TTA')[1].split() for line in lines if 'without' in line]
    accuracies, gains = rows[0], rows[4]  # of two crops with two test crops each
    assert accuracies[:3] == ['50.00', '+-0.00', '(4)']
    assert (gains[0], gains[3]) == ('+1.20', '+1.25') and float(gains[2]) < 0.01


#### SWAP ####


@pytest.fixture(scope='module')
def of_one(data, tmp_path_factory):
    """The folder of a study that one process made."""
    out = tmp_path_factory.mktemp('one') / 'out'
    assert run_swap(*smoke_call(data, out)) == 0
    return out


def run_rank(data, out):
    rank = swap94.launched('RANK', 0)
    with open(out.parent / f'{rank}.log', 'w') as log, redirect_stdout(log), redirect_stderr(log):
        code = run_swap(*smoke_call(data, out))
        torch.save(recomputed_statistics(data, out), out.parent / f'{rank}.pt')
        sys.exit(code)


def make_place(data, folder):
    settings = smoke.settings_of('imagenet_swap')
    train, val = pictures.open_data(data)
    return imagenet.Place(settings, folder, train, val, torch.device('cpu'), torch.float32, 0)


def recomputed_statistics(data, folder):
    """Those of SWAP's second phase, for an untrained network."""
    place = make_place(data, folder)
    net = imagenet.make_net(place, 5)
    _, phase2 = imagenet_swap.schedules_of(place.settings)['swap']
    imagenet_swap.recompute_statistics(net, phase2, 5, place)
    return dict(net.named_buffers())


def test_four_ranks_train_the_networks_of_one(data, of_one, tmp_path, capsys):
    """Large batches on four ranks, small ones on two, and each worker on a group of two."""
    out = tmp_path / 'out'
    on_ranks(4, run_rank, data, out)
    ours, theirs = common.read_cells(of_one), common.read_cells(out)
    assert [record['cell'] for record in ours] == [record['cell'] for record in theirs]
    for one, four in zip(ours, theirs):
        pairs = [(one, four), *zip(one.get('workers', []), four.get('workers', []))]
        assert len(pairs) == (3 if one['cell']['method'] == 'swap' else 1)
        for a, b in pairs:
            assert b['losses'] == pytest.approx(a['losses'], rel=0.01)
    expected = recomputed_statistics(data, tmp_path)
    assert expected['bn1.running_mean'].abs().min() > 0
    for rank in range(4):
        for name, found in torch.load(tmp_path / f'{rank}.pt').items():
            if 'running' in name:
                assert_close(found, expected[name])
    assert not list((out / 'checkpoints').iterdir())
    assert run_swap('--show', '--out', str(out)) == 0
    assert capsys.readouterr().out in (tmp_path / '0.log').read_text()
    assert 'plot in' not in (tmp_path / '3.log').read_text()


def test_a_study_that_was_interrupted_before_averaging_trains_nothing_again(
    data, of_one, tmp_path, monkeypatch, capsys
):
    job = {'method': 'swap'}, 0
    average = imagenet_swap.average

    def plan(settings, records):
        return [job]

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(SWAP, 'plan', plan)
    monkeypatch.setattr(imagenet_swap, 'average', interrupt)
    out = tmp_path / 'out'
    assert run_swap(*smoke_call(data, out)) == 130
    files = sorted(file.name for file in (out / 'checkpoints').iterdir())
    assert files == [f'method=swap-seed=0-{part}.pt' for part in ('network0', 'worker0', 'worker1')]
    monkeypatch.setattr(imagenet_swap, 'average', average)
    capsys.readouterr()
    run_swap(*smoke_call(data, out))  # shows nothing yet, for lack of seeds
    assert 'epoch' not in capsys.readouterr().out
    (record,) = common.read_cells(out)
    undisturbed = common.read_cell(common.cell_file(of_one, *job))
    names = ('top1', 'top5', 'losses')
    for ours, theirs in ((record, undisturbed), *zip(record['workers'], undisturbed['workers'])):
        assert [ours[name] for name in names] == [theirs[name] for name in names]


def test_each_half_of_the_ranks_has_its_own_checkpoint_of_small_batches(
    data, tmp_path, monkeypatch
):
    """Else a rank could load what the other half has written since."""
    place = make_place(data, tmp_path)
    files = []

    def fit(net, images, place, ranks, checkpoint):
        files.append(checkpoint.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(imagenet, 'fit', fit)
    for rank in range(4):
        monkeypatch.setattr(swap94, 'all_ranks', lambda rank=rank: swap94.Ranks(rank, 4))
        monkeypatch.setattr(swap94, 'form_teams', lambda size, rank=rank: swap94.Ranks(rank % 2, 2))
        with pytest.raises(KeyboardInterrupt):
            imagenet_swap.train({'method': 'small-batch'}, 0, place)
    assert files == [f'method=small-batch-seed=0-network{half}.pt' for half in (0, 0, 1, 1)]


def test_more_ranks_than_shards_are_one_line(data, tmp_path, monkeypatch):
    place = make_place(data, tmp_path)
    imagenet_swap.check(place)
    monkeypatch.setattr(swap94, 'all_ranks', lambda: swap94.Ranks(0, 8))
    monkeypatch.setattr(swap94, 'form_teams', lambda size: swap94.Ranks(0, size))
    with pytest.raises(UserError, match=r"4 ranks cannot share a step's shards \(2\) evenly"):
        imagenet_swap.check(place)


def test_an_average_is_the_mean_of_all_workers():
    net = nn.Conv2d(2, 3, 1).to(memory_format=torch.channels_last)
    workers = [[torch.full_like(p, value) for p in net.parameters()] for value in (1.0, 4.0)]
    imagenet_swap.average(net, workers, swap94.Ranks())
    assert all((p == 2.5).all() for p in net.parameters())


def test_the_papers_swap_schedules():
    schedules = imagenet_swap.schedules_of(PAPER)
    (small,), (large,), (phase1, phase2) = schedules.values()
    assert phase1 == large[:3] and phase2 == small[3:]
    assert [part['epochs'] for part in phase2] == [[22, 25], [25, 28]]
    images = [[part['shards'] * part['batch'] for part in schedule] for schedule in (small, large)]
    assert images == [[4096, 4096, 1792, 1792, 1024], [8192, 8192, 3584, 3584, 2048]]
    assert [part['shards'] for part in large] == 5 * [16]
    assert large[0]['rates'] == [2.0, 4.0] and small[-1]['rates'] == [0.0025, 0.00025]


def test_only_an_even_number_of_ranks_has_halves():
    assert imagenet_swap.half_of(swap94.Ranks()).size == 1
    with pytest.raises(UserError, match='3 processes have no halves'):
        imagenet_swap.half_of(swap94.Ranks(0, 3))


def test_the_table_has_both_accuracies_and_the_papers(of_one, capsys):
    assert run_swap('--show', '--out', str(of_one)) == 0
    out = capsys.readouterr().out
    assert ['swap', '2 to 3', '40', '8', '0.002 to 0.0002'] in columns_of(out)
    row = next(row for row in columns_of(out) if row[0] == 'SWAP, after averaging')
    assert row[4:] == ['76.19 +-0.03', '93.32 +-0.02', '9393']
    records = common.read_cells(of_one)
    top1 = imagenet_swap.accuracies_of(records, 'top1')
    workers = [r['workers'] for r in records if r['cell']['method'] == 'swap']
    means = [100 * np.mean([worker['top1'] for worker in of_seed]) for of_seed in workers]
    assert top1['SWAP, before averaging'] == pytest.approx(means)
    assert list(top1) == imagenet_swap.ROWS  # which the picture counts on
    assert (of_one / 'schedules.png').stat().st_size > 10_000


#### Mistakes ####


@pytest.mark.parametrize(
    'argv, line',
    [
        ([], 'give --data a folder with train/CLASS/* and val/CLASS/*'),
        (['--data', 'nowhere'], '--data: nowhere needs pictures in train/CLASS'),
        (['--data', 'nowhere', '--workers', '-1'], '--workers -1: must be 0 or more'),
        (['--data', 'nowhere', '--scale', 'large'], 'argument --scale: invalid choice'),
    ],
)
def test_a_mistake_is_one_line(argv, line, tmp_path, capsys):
    assert run_flip('--out', str(tmp_path), *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'studies.imagenet_flip: {line}') and error.count('\n') == 1


def test_pictures_that_fill_no_step_are_one_line(tmp_path, capsys):
    few = draw_pictures(tmp_path / 'data', 12, 4, size=(40, 40))
    assert run_swap(*smoke_call(few, tmp_path / 'out')) == 2
    error = capsys.readouterr().err
    assert 'has 12 pictures, and a step needs 16; add more' in error
    assert not (tmp_path / 'out' / 'config.json').exists()
