"""Estimators, on data whose answer is known; and every study with the settings of smoke.py."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import scipy.stats
import smoke
import torch
from conftest import ONE_THREAD, ROOT, SERVER, run_command
from filelock import FileLock

import airbench94
import airbench95
import airbench96
from lab.data import load_set
from lab.errors import UserError
from lab.runs import read_json, write_json, write_tensors
from studies import ablation, common, datasets, flip, frontier, show, variance

FEW = {'device': 'cpu', 'dtype': torch.float32}


@pytest.fixture(scope='module')
def image_set(folder):
    return load_set(folder, airbench94)


@pytest.fixture
def make_place(image_set, tmp_path):
    """make(study, net=None, image_set=...) -> a Place with the settings of smoke.py."""

    def make(study, net=None, image_set=image_set):
        settings = smoke.settings_of(study.STUDY.name, net)
        return common.Place(settings, tmp_path, image_set, **FEW)

    return make


#### Flip ####


@pytest.mark.parametrize(
    'cutout, has_tta, percents',  # Table 2, of 10, 20, 40 and 80 epochs
    [(0, False, [15.0, 27.1, 38.3, 102]), (12, False, [3.84, 7.42, 18.6, 29.2])],
)
def test_speedups_are_the_papers(cutout, has_tta, percents):
    for epochs, percent in zip((10, 20, 40, 80), percents):
        ours = 100 * flip.published_speedup(epochs, cutout, has_tta)
        assert ours == pytest.approx(percent, rel=0.01)


def test_we_find_the_power_law_again():
    epochs = [5, 10, 20, 40]
    errors = [flip.power_law(e, -0.8, 20.0, 5.0) for e in epochs]
    law = flip.fit_power_law(epochs, errors)
    assert law == pytest.approx([-0.8, 20.0, 5.0], rel=1e-3)
    # Random flip needs 15 epochs for the error that another training has after 10.
    error = flip.power_law(15, -0.8, 20.0, 5.0)
    assert flip.speedup(law, 10, error) == pytest.approx(0.5, rel=1e-2)
    assert flip.speedup(law, 10, 4.9) == np.inf


def loader_with(flips, **options):
    images, labels = torch.zeros(1000, 32, 32, 3, dtype=torch.uint8), torch.arange(1000) % 10
    options |= {'train': True, 'seed': 3} | FEW
    return flip.FlipLoader(images, labels, 50, {'flip': True}, flips=flips, **options)


def test_the_loader_flips_in_three_ways():
    flips = {kind: [loader_with(kind).draw(e)['flip'] for e in range(4)] for kind in flip.FLIPS}
    assert not torch.stack(flips['none']).any()
    first, second, third, fourth = flips['alternating']
    assert (first ^ second).all() and (first == third).all() and (second == fourth).all()
    for before, after in zip(flips['random'], flips['random'][1:]):
        assert 0.4 < (before ^ after).float().mean() < 0.6
        assert 0.4 < after.float().mean() < 0.6


def test_speedups_have_intervals():
    epochs = np.array([5, 10, 20])
    rng = np.random.default_rng(4)
    random = flip.power_law(epochs, -0.8, 20.0, 5.0) + 0.02 * rng.standard_normal((30, 3))
    faster = flip.power_law(1.3 * epochs, -0.8, 20.0, 5.0) + 0.02 * rng.standard_normal((30, 3))
    found = flip.speedups(epochs, random, faster)
    low, high = flip.speedup_intervals(epochs, random, faster)
    assert found == pytest.approx(0.3, abs=0.05)
    assert (low < found).all() and (found < high).all() and (high - low < 0.2).all()
    assert show.paired_p(random[:, 0], faster[:, 0]) < 1e-6


def test_flip_trains_every_recipe(make_place, monkeypatch):
    trained = {}

    def train(self, recipe, loader, hyp, seed):
        trained[recipe] = loader.aug['cutout']
        return recipe.make_net(hyp, 10, **FEW)

    monkeypatch.setattr(common.Place, 'train', train)
    cell = {'flip': 'none', 'replaced': False, 'epochs': 1, 'cutout': 12}
    for net in ('airbench95', 'airbench96'):
        assert 0 <= flip.train(cell, 0, make_place(flip, net))['val_acc'] < 1
    assert trained == {airbench95: 12, airbench96: 12}


def test_drawing_with_replacement_repeats_images():
    order = loader_with('random', replaced=True).draw(0)['order']
    assert len(order) == 1000 and 550 < len(order.unique()) < 700  # about 1000 * (1 - 1/e)
    assert len(loader_with('random').draw(0)['order'].unique()) == 1000


#### Variance ####


def test_independent_coins_have_no_variance_in_distribution():
    correct = np.random.default_rng(0).random((400, 2000)) < 0.9
    # Test-set accuracies vary by sqrt(0.9 * 0.1 / 2000).
    assert correct.mean(1).std(ddof=1) == pytest.approx(0.0067, rel=0.1)
    assert abs(variance.distribution_variance(correct.mean(1), correct.mean(0))) < 1e-5


def test_networks_of_different_quality_vary_in_distribution():
    rng = np.random.default_rng(1)
    quality = 0.8 + 0.05 * rng.standard_normal(400)
    correct = rng.random((400, 2000)) < quality[:, None]
    found = variance.distribution_variance(correct.mean(1), correct.mean(0))
    assert found**0.5 == pytest.approx(0.05, rel=0.1)
    assert variance.distribution_variance(np.array([1.0, 0.0]), np.full(9, 0.5)) == 0.5


def test_calibrated_votes_have_no_calibration_error_and_confident_ones_have():
    rng = np.random.default_rng(2)
    shares = np.linspace(0, 1, 11)
    votes = np.stack([shares, 1 - shares], axis=1).repeat(20_000, axis=0)
    labels = (rng.random(len(votes)) < votes[:, 1]).astype(int)
    assert variance.calibration_error(votes, labels) < 0.02
    # Networks that always agree, and are right about two thirds, are off by a third for each class.
    sure = np.tile([1.0, 0.0], (300, 1))
    labels = np.arange(300) % 3 // 2
    assert variance.calibration_error(sure, labels) == pytest.approx(2 / 3)


def test_many_networks_that_are_calibrated_have_a_small_calibration_error():
    rng = np.random.default_rng(6)
    probabilities = rng.dirichlet(np.full(10, 0.01), size=10_000)
    votes = rng.multinomial(10_000, probabilities) / 10_000
    labels = np.array([rng.choice(10, p=p) for p in probabilities])
    assert len(np.unique(votes)) > 1000  # so many bins would each have a few images
    assert variance.calibration_error(votes, labels) == pytest.approx(0.009, abs=0.003)
    off = np.eye(10)[labels] - votes
    gaps, _ = np.histogram(votes, bins=15, range=(0, 1), weights=off)
    expected = np.abs(gaps).sum() / len(labels)
    assert variance.calibration_error(votes, labels) == pytest.approx(expected)
    always_sure = np.eye(10)[votes.argmax(1)]
    assert variance.calibration_error(always_sure, labels) > 0.1


def test_the_tests_find_a_smaller_deviation_and_a_smaller_calibration_error():
    rng = np.random.default_rng(3)
    shared = rng.standard_normal(100)
    large, small = shared + rng.standard_normal(100), shared + 0.1 * rng.standard_normal(100)
    assert variance.p_of_deviation(large, small) < 1e-4
    assert variance.p_of_deviation(small, large) > 0.99
    assert 0.01 < variance.p_of_deviation(large, large[::-1].copy()) < 0.99

    votes = np.tile([0.7, 0.3], (500, 1))
    labels = (rng.random(500) < 0.3).astype(int)
    sure = np.tile([1.0, 0.0], (500, 1))
    assert variance.p_of_calibration(sure, votes, labels) < 0.01
    assert variance.p_of_calibration(votes, sure, labels) == 1


def test_tta_lowers_the_deviation_in_the_kept_logs():
    """As studies/README.md says of variance; with new logs, correct it there."""
    logs = [read_json(file)['runs'] for file in sorted((ROOT / 'logs').glob('*.json'))]
    logs = [runs for runs in logs if len(runs) >= 5]
    assert (len(logs), sum(map(len, logs))) == (10, 88)
    ps = []
    for runs in logs:
        plain, tta = [np.array([run[key] for run in runs]) for key in ('val_acc', 'tta_val_acc')]
        ps.append(variance.p_of_deviation(plain, tta))
    assert scipy.stats.combine_pvalues(ps).pvalue == pytest.approx(0.0156, abs=5e-4)


def test_counted_votes_are_enough_without_the_logits(tmp_path):
    cell = {'epochs': 1, 'width': 1}
    (tmp_path / 'cells').mkdir()
    labels = np.array([0, 1, 2])
    for seed, predictions in enumerate(([0, 1, 2], [0, 1, 1], [0, 2, 1])):
        logits = np.eye(3)[predictions]
        file = variance.logits_file(tmp_path, cell, seed)
        np.savez(file, labels=labels, plain=logits, tta=logits[:, ::-1])
    cells = {(1, 1): [{'cell': cell, 'seed': seed} for seed in range(3)]}
    votes = variance.read_votes(tmp_path, cells)
    assert votes['(1, 1) plain'].tolist() == [[3, 0, 0], [0, 2, 1], [0, 2, 1]]
    assert votes['(1, 1) tta'].tolist() == [[0, 0, 3], [1, 2, 0], [1, 2, 0]]
    shutil.rmtree(tmp_path / 'cells')
    again = variance.read_votes(tmp_path, cells)
    assert all(np.array_equal(votes[name], again[name]) for name in votes)


def test_runs_needed_are_the_papers():
    assert variance.runs_needed(effect=0.02, deviation=0.14) == 133  # section 1


#### Frontier ####


def test_the_line_goes_through_the_papers_trainings():
    line = frontier.fit_line(frontier.PAPER)
    for _, accuracy, pflop in frontier.PAPER:
        assert frontier.error_on_line(line, pflop) == pytest.approx(100 - accuracy, rel=0.01)
    exact = [('a', 90.0, 1.0), ('b', 95.0, 4.0)]  # error = 10 * PFLOP^-0.5
    assert frontier.fit_line(exact) == pytest.approx([-0.5, 1])


def test_the_frontier_draws_the_kept_logs(tmp_path, capsys):
    log = ROOT / 'logs' / 'record94-cpu.json'
    assert frontier.main([str(log), '--out', str(tmp_path / 'picture')]) == 0
    assert 'record94-cpu, n=5' in capsys.readouterr().out
    assert (tmp_path / 'picture.png').stat().st_size > 10_000


#### Datasets ####


@pytest.mark.parametrize('study', [datasets, variance])
def test_digits_are_mirrored_neither_in_training_nor_in_tests(study, make_place, monkeypatch):
    flips, levels = [], []
    tta_views = airbench94.tta_views

    def train(self, recipe, loader, hyp, seed):
        flips.append(loader.aug['flip'])
        return recipe.make_net(hyp, 10, **FEW)

    def look(inputs, level):
        levels.append(level)
        return tta_views(inputs, level)

    monkeypatch.setattr(common.Place, 'train', train)
    monkeypatch.setattr(airbench94, 'tta_views', look)
    (cell, seed), *_ = study.plan(smoke.settings_of(study.STUDY.name), [])
    place = make_place(study)
    place.folder.joinpath('cells').mkdir()
    study.train(cell, seed, place)
    assert flips == [True] and set(levels) == {0, 1}
    levels.clear()
    study.train(cell, seed, make_place(study, image_set=load_set('digits', airbench94)))
    assert flips == [True, False] and set(levels) == {0}


def test_the_papers_figures_stand_beside_the_sets(tmp_path, capsys):
    config = {'data': {'path': '/somewhere/cifar100'}}
    cell = {'cell': {'cutout': 12}, 'seed': 0, 'val_acc': 0.7, 'tta_val_acc': 0.75}
    datasets.show(config, [cell, cell | {'tta_val_acc': 0.77}], tmp_path)
    row = capsys.readouterr().out.partition('\n\nplot')[0].splitlines()[-1].split()
    assert row[:2] == ['12', '2'] and '76.00' in row and row[-2:] == ['78.04', '79.76']


#### Ablation ####


def search(target, accuracy_of, rounds):
    """The epochs that are tried for a training whose accuracy is a function of them."""
    tried = {}
    for _ in range(rounds):
        epochs = ablation.next_epochs(tried, target, 8)
        tried[epochs] = accuracy_of(epochs)
    return list(tried)


def test_the_search_closes_in_on_the_target():
    def accuracy_of(epochs):
        return 1 - 0.5 / epochs

    assert search(1 - 0.5 / 22.0, accuracy_of, 6) == [8, 16, 32, 22.6, 19.0, 20.7]
    assert search(1 - 0.5 / 3.0, accuracy_of, 5) == [8, 4.0, 2.0, 2.8, 3.3]


def test_the_fitted_line_has_the_targets_epochs():
    epochs = np.array([8, 16, 32])
    errors = 0.5 / epochs**0.7
    target = 1 - 0.5 / 20**0.7
    assert ablation.epochs_to(target, epochs, errors) == pytest.approx(20)
    assert np.isnan(ablation.epochs_to(1 - 0.5 / 70**0.7, epochs, errors))
    assert np.isnan(ablation.epochs_to(target, epochs, errors[::-1]))


def test_what_a_feature_saves_has_an_interval():
    rng = np.random.default_rng(5)
    records = []
    for feature, needed in {'none': 10, 'Lookahead': 14}.items():
        for epochs in (8, 16):
            for seed in range(20):
                error = 0.4 * (needed / epochs) ** 0.5 + 0.002 * rng.standard_normal()
                cell = {'start': 'final', 'feature': feature, 'epochs': epochs}
                records.append({'cell': cell, 'seed': seed, 'tta_val_acc': 1 - error})
    found = ablation.found_epochs(records, ablation.SMALL)
    (saved, low, high), baseline = ablation.savings(found, 'Lookahead').values()
    assert saved == pytest.approx(4, abs=0.2) and low < saved < high and high - low < 1
    assert np.isnan(baseline).all()


def test_medium_scale_only_removes_the_features_that_small_scale_did_not_show(tmp_path, capsys):
    settings = ablation.MEDIUM | {'runs': 2}
    needed = {'none': 8, 'Lookahead': 10, 'multi-crop TTA': 9, 'alternating flip': 12}
    jobs = ablation.plan(settings, [])
    assert {(cell['start'], cell['feature']) for cell, _ in jobs} == {('final', f) for f in needed}
    records = []
    for feature, epochs_needed in needed.items():
        for epochs in (6, 12):
            error = (1 - settings['target']) * (epochs_needed / epochs) ** 0.5
            cell = {'start': 'final', 'feature': feature, 'epochs': epochs}
            records += [{'cell': cell, 'seed': seed, 'tta_val_acc': 1 - error} for seed in (0, 1)]
    ablation.show({'settings': settings}, records, tmp_path)
    output = capsys.readouterr().out
    assert '12.0 (12.0 to 12.0)' in output and 'baseline' not in output
    assert (tmp_path / 'ablation.png').exists()


def test_a_saving_is_that_of_pairs_with_the_same_seeds():
    rng = np.random.default_rng(5)
    records = []
    for epochs in (16, 8):
        errors = 0.4 * (12 / epochs) ** 0.5 + 0.03 * rng.standard_normal(20)
        for seed, error in enumerate(errors):
            for feature, factor in {'none': 1, 'multi-crop TTA': 1.05}.items():
                cell = {'start': 'final', 'feature': feature, 'epochs': epochs}
                records.append({'cell': cell, 'seed': seed, 'tta_val_acc': 1 - factor * error})
    found = ablation.found_epochs(records, ablation.SMALL)
    samples = found['final', 'multi-crop TTA'] / found['final', 'none']
    (saved, low, high), _ = ablation.savings(found, 'multi-crop TTA').values()
    assert 0 < low < saved < high and np.std(samples) < 0.1 * np.std(found['final', 'none'])


def test_the_plan_waits_for_a_rounds_networks():
    jobs = ablation.plan(smoke.settings_of('ablation'), [])
    assert len(jobs) == len(ablation.variants(ablation.PAPER)) == 13
    cell, seed = jobs[0]
    high = {'cell': cell, 'seed': seed, 'tta_val_acc': 0.9}
    added = [job for job in ablation.plan(smoke.settings_of('ablation'), [high]) if job not in jobs]
    assert added == [(cell | {'epochs': 1}, 0)]


@pytest.mark.parametrize('feature', ['none', *ablation.FEATURES])
def test_a_feature_is_removed_or_added(feature, make_place, monkeypatch):
    seen = {}

    def look(
        loader, tests, hyp, seed, make_net, init_whitening_conv=airbench94.init_whitening_conv
    ):
        net = make_net(hyp, 10, seed=seed, **FEW)
        init_whitening_conv(net[0], loader.normalize(loader.images[:100]), 1e-3)
        first, second = net[0].weight, net[2].layers[1].conv.weight
        seen['whitening'] = torch.equal(first[:12], -first[12:])
        assert first.requires_grad != seen['whitening']
        assert bool(second[3, 3, 0, 0]) != (second[3, 3, 1, 1].item() == 1)  # dirac, or random
        seen['identity initialization'] = second[3, 3, 1, 1].item() == 1
        seen['bias scaler'] = hyp['opt']['bias_scaler'] == 64
        seen['Lookahead'] = hyp['opt']['lookahead']['decay'] > 0
        seen['multi-crop TTA'] = hyp['net']['tta_level'] == 2
        seen['alternating flip'] = loader.flips == 'alternating'
        return net, {}

    monkeypatch.setattr(airbench94, 'train', look)
    place = make_place(ablation)
    for start in ('final', 'baseline'):
        ablation.train({'start': start, 'feature': feature, 'epochs': 1}, 0, place)
        has = ablation.features_of(start, feature)
        assert seen == {name: name in has for name in ablation.FEATURES}


#### Every study ####

PICTURES = {  # one that the study draws
    'flip': 'strip.png',
    'variance': 'variance.svg',
    'datasets': 'datasets.png',
    'ablation': 'ablation.png',
    'swap_tables': 'swap_tables.png',
    'swa': 'swa.png',
    'landscape': 'plane-phases.png',
    'cosine': 'cosine.svg',
    'progress': 'progress.png',
    'connectivity': 'map.png',
    'svcca': 'svcca.png',
    'restarts': 'plane.png',
    'warmup': 'warmup.png',
    'distill': 'svcca.png',
}


def run_rank(name, out, rank):
    """What RANK=rank WORLD_SIZE=2 python -m tests.smoke NAME does, with its output in a log."""
    os.environ.update(RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    with open(log_of(out, rank), 'w') as log, redirect_stdout(log), redirect_stderr(log):
        sys.exit(common.run_study(smoke.study_of(name), smoke_call(out)))


def smoke_call(out):
    return ['--scale', 'smoke', '--data', 'digits', '--device', 'cpu', '--out', str(out)]


def log_of(out, rank):
    return out.parent / f'{rank}.log'


def start(name, out, rank):
    process = SERVER.Process(target=run_rank, args=(name, out, rank))
    process.start()
    return process


def kill_after_the_first(process, out):
    deadline = time.time() + 120
    while not list(out.glob('cells/*.json')) and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()


def test_a_stage_begins_when_the_one_before_it_is_complete():
    def stage(name):
        def jobs(settings):
            return [({'part': name}, seed) for seed in range(settings['runs'])]

        def train(cell, seed, place):
            return {'made by': name}

        return common.Stage(jobs, train)

    plan, train = common.in_stages(stage('network'), stage('curve'))
    networks = [({'part': 'network'}, seed) for seed in (0, 1)]
    curves = [({'part': 'curve'}, seed) for seed in (0, 1)]
    records = [{'cell': cell, 'seed': seed} for cell, seed in networks]
    assert plan({'runs': 2}, records[:1]) == networks
    assert plan({'runs': 2}, records) == networks + curves
    jobs = networks + curves
    common.check_complete(records, networks, 'folder')
    for some in (jobs[:3], jobs[1:]):  # without a network, `plan` has no curves
        records = [{'cell': cell, 'seed': seed} for cell, seed in some]
        with pytest.raises(UserError, match='folder: 1 parts are missing'):
            common.check_complete(records, plan({'runs': 2}, records), 'folder')
    place = common.Place.__new__(common.Place)
    place.settings = {'runs': 2}
    assert train({'part': 'curve'}, 1, place) == {'made by': 'curve'}


def test_a_table_has_columns(capsys):
    show.print_table(['way', 'n', 'error'], [['by hand', '3', '1.25'], ['-', '12', '0.5']])
    assert capsys.readouterr().out.splitlines() == [
        'way       n  error', 'by hand   3   1.25', '-        12    0.5',
    ]  # fmt: skip


def test_pairs_are_of_seeds_that_every_cell_has():
    jobs = [({'flip': flips}, seed) for seed in (0, 1) for flips in 'abc']
    records = [{'cell': cell, 'seed': seed} for cell, seed in jobs]
    assert common.whole_seeds(records, jobs, 'folder', least=2) == records
    assert common.whole_seeds(records[:-1], jobs, 'folder') == records[:3]
    for some, least, need in ((records[1:5], 1, 'a seed'), (records[:-1], 2, '2 seeds')):
        with pytest.raises(UserError, match=f'folder: needs {need} with all networks'):
            common.whole_seeds(some, jobs, 'folder', least)


@pytest.mark.filterwarnings('error')
def test_a_paired_p_is_that_of_students_test():
    larger = np.array([1.0, 2.0, 4.0])
    assert show.paired_p(larger, 0) == pytest.approx(0.5 - 7**0.5 / 6)  # t is the root of 7
    assert show.paired_p(0, larger) == pytest.approx(0.5 + 7**0.5 / 6)
    assert show.paired_p(larger + 0.1, larger) == 0
    assert show.paired_p(larger, larger) == 1
    assert np.isnan(show.paired_p([1.0], [0.0]))


def figures(record):
    """A record without what depends on the clock, the command and the checkout."""
    others = ('seconds', 'argv', 'commit')
    return {name: value for name, value in record.items() if name not in others}


def show_again(study, out, capsys):
    """The table from the study's records."""
    assert common.run_study(study, ['--show', '--out', str(out)]) == 0
    return capsys.readouterr().out.partition('\nplot')[0]


@pytest.mark.parametrize('name', PICTURES)
def test_a_study_trains_and_shows(name, tmp_path, capsys):
    study = smoke.study_of(name)
    assert common.run_study(study, smoke_call(tmp_path)) == 0
    output = capsys.readouterr().out
    records = common.read_cells(tmp_path)
    made = {common.cell_file(tmp_path, record['cell'], record['seed']) for record in records}
    settings = read_json(tmp_path / 'config.json')['settings']
    assert made == {common.cell_file(tmp_path, *job) for job in study.plan(settings, records)}
    assert (tmp_path / PICTURES[name]).stat().st_size > 10_000

    shutil.rmtree(tmp_path / 'cells')  # study.json is enough for table and pictures
    table = show_again(study, tmp_path, capsys)
    assert table and table in output
    assert common.read_study(tmp_path)[1] == records


@pytest.mark.parametrize('name', ['flip', 'connectivity'])
def test_two_processes_finish_a_study_that_was_killed(name, tmp_path, capsys):
    study = smoke.study_of(name)
    out = tmp_path / name
    kill_after_the_first(start(name, out, 0), out)
    before = {file: file.read_bytes() for file in out.glob('cells/*.json')}
    settings = read_json(out / 'config.json')['settings']
    assert 0 < len(before) < len(study.plan(settings, []))

    both = [start(name, out, rank) for rank in (0, 1)]
    for process in both:
        process.join(300)
    outputs = [log_of(out, rank).read_text() for rank in (0, 1)]
    assert [process.exitcode for process in both] == [0, 0], outputs
    assert {file: file.read_bytes() for file in before} == before
    records = common.read_cells(out)
    assert common.run_study(study, smoke_call(tmp_path / 'undisturbed')) == 0
    capsys.readouterr()
    undisturbed = common.read_cells(tmp_path / 'undisturbed')
    assert [figures(record) for record in records] == [figures(record) for record in undisturbed]
    made = {common.cell_file(out, record['cell'], record['seed']) for record in records}
    assert made == {common.cell_file(out, *job) for job in study.plan(settings, records)}
    assert not list(out.glob('cells/*.tmp'))
    assert show_again(study, out, capsys) in outputs[0]
    assert 'plot in' not in outputs[1]


@pytest.mark.parametrize(
    'name', sorted(path.name for path in (ROOT / 'logs' / 'studies').iterdir())
)
def test_kept_studies_still_give_their_tables(name, tmp_path, capsys):
    kept, out = ROOT / 'logs' / 'studies' / name, tmp_path / name
    shutil.copytree(kept, out)
    config = read_json(kept / 'study.json')
    table = show_again(smoke.study_of(config['study']), out, capsys)
    lines = [line.rstrip() for line in table.splitlines()]
    assert lines == (kept / 'table.txt').read_text().splitlines()
    for picture in kept.glob('*.png'):
        assert (out / picture.name).stat().st_size > 10_000


def test_a_study_is_a_command(tmp_path):
    result = run_command('-m', 'studies.flip', '--show', '--out', tmp_path, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.startswith(f'studies.flip: {tmp_path}: holds no records of a study')
    assert result.stderr.count('\n') == 1


def test_a_process_that_waits_says_for_whom(tmp_path, capsys, monkeypatch):
    def plan(settings, records):
        return [({'part': 'only'}, 0)]

    def train(cell, seed, place):
        return {'val_acc': 0.5}

    def show(config, records, folder):
        print(records[0]['val_acc'])

    study = common.Study('tiny', '', {'net': {'smoke': {'images': None}}}, plan, train, show)
    assert common.run_study(study, smoke_call(tmp_path)) == 0
    [record] = (tmp_path / 'cells').iterdir()
    record.unlink()
    lock = FileLock(tmp_path / 'locks' / f'{record.stem}.lock')
    lock.acquire()

    def sleep(seconds):
        lock.release()

    monkeypatch.setattr(common.time, 'sleep', sleep)
    capsys.readouterr()
    assert common.run_study(study, smoke_call(tmp_path)) == 0
    out = capsys.readouterr().out
    assert 'waiting for other processes' in out and out.endswith('0.5\n')


def test_records_of_an_older_version_end_in_one_line(tmp_path, capsys):
    def show(config, records, folder):
        print(records[0]['tta_val_acc'])

    study = common.Study('tiny', '', {'net': {'smoke': {}}}, None, None, show)
    record = {'cell': {'part': 'only'}, 'seed': 0, 'val_acc': 0.5}
    write_json(tmp_path / 'study.json', {'study': 'tiny', 'records': [record]})
    assert common.run_study(study, ['--show', '--out', str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}: something lacks 'tta_val_acc'; " in error and error.count('\n') == 1


def test_a_study_that_nobody_watches_is_finished(tmp_path):
    """Its output is read in part, stderr is closed, and the environment is odd."""
    odd = {'MPLBACKEND': 'module://nosuch', 'PYTHONIOENCODING': 'ascii', 'PYTHONPATH': str(ROOT)}
    out = tmp_path / 'Größe'
    command = [sys.executable, '-OO', '-m', 'tests.smoke', 'flip', *smoke_call(out)]
    options = {'cwd': tmp_path, 'env': ONE_THREAD | odd, 'stdout': subprocess.PIPE}
    # preexec_fn, because the module subprocess cannot start a process without a stderr.
    process = subprocess.Popen(command, preexec_fn=close_stderr, **options)
    first = process.stdout.readline()
    process.stdout.close()
    assert process.wait(280) == 0
    assert first.startswith(b'flip') and rb'Gr\xf6\xdfe' in first
    settings = read_json(out / 'config.json')['settings']
    assert len(common.read_cells(out)) == len(flip.plan(settings, []))
    assert (out / 'flip.png').stat().st_size > 10_000


def close_stderr():
    os.close(2)


def test_a_records_seed_makes_the_same_network_again(make_place):
    place = make_place(flip, 'airbench94')
    cell, seed = flip.plan(smoke.settings_of('flip'), [])[1]
    assert flip.train(cell, seed, place) == flip.train(cell, seed, place)


#### Mistakes ####


def mutations(content, count):
    """Copies of a file's content with a bit flipped, or cut off at a random place."""
    rng = random.Random(0)
    for _ in range(count):
        place = rng.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        yield rng.choice([bytes(changed), content[:place]])


def holds(found, content):
    """Whether a dict of values or arrays has all that another one has."""
    return all(np.array_equal(found.get(name), value) for name, value in content.items())


def read_arrays(file):
    return variance.read_arrays(file, 'delete it')


def read_networks(file):
    return common.read_networks(file, 'delete it')


def write_arrays(file, content):
    np.savez_compressed(file, **content)


@pytest.mark.parametrize(
    'name, read, write, content',
    [
        ('cells/flip=none-seed=0.json', common.read_cell, write_json,
         {'cell': {'flip': 'none'}, 'seed': 0, 'val_acc': 0.5}),
        ('votes.npz', read_arrays, write_arrays,
         {'labels': np.arange(10), 'plain': np.arange(100)}),
        ('networks/0.pt', read_networks, write_tensors,
         {'a': torch.arange(10), 'b': torch.rand(20)}),
    ],
)  # fmt: skip
def test_a_changed_file_is_one_line_or_harmless(name, read, write, content, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    write(file, content)
    assert holds(read(file), content)
    caught = 0
    for changed in mutations(file.read_bytes(), 300):
        file.write_bytes(changed)
        try:
            assert holds(read(file), content)
        except UserError as error:
            assert '\n' not in str(error) and str(file) in str(error)
            caught += 1
    assert caught > 200


def test_a_network_that_diverges_ends_the_study(tmp_path, capsys, monkeypatch):
    def train(*args, **options):
        return None, {'failed': 'the loss is nan at step 3'}

    monkeypatch.setattr(airbench94, 'train', train)
    assert common.run_study(smoke.study_of('flip'), smoke_call(tmp_path)) == 2
    assert 'the network of seed 0 diverges: the loss is nan' in capsys.readouterr().err
    assert not list(tmp_path.glob('cells/*.json'))


def test_a_loader_of_few_images_knows_all_classes(make_place):
    place = make_place(flip)
    place.settings['images'] = 1
    assert place.training_loader(1).num_classes == 10


def test_mistakes_are_one_line(tmp_path, folder, capsys):
    def says(study, *call):
        assert common.run_study(study.STUDY, [*call]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        return error

    out = str(tmp_path / 'log')
    assert 'no records' in says(flip, '--show', '--out', out)
    assert '--scale' in says(flip, '--scale', 'huge')
    (tmp_path / 'log' / 'cells').mkdir(parents=True)
    (tmp_path / 'log' / 'cells' / 'flip=none-seed=0.json').write_text('{')
    assert 'it will be made again' in says(flip, '--show', '--out', out)
    (tmp_path / 'log' / 'cells' / 'flip=none-seed=0.json').write_text('{"cell": {}, "seed": 0}')
    assert 'is not the record that its name says' in says(flip, '--show', '--out', out)
    other = ROOT / 'logs' / 'studies' / 'svcca'
    assert 'records of the study svcca' in says(flip, '--show', '--out', str(other))
    (tmp_path / 'log' / 'config.json').write_text(json.dumps({'study': 'variance'}))
    assert 'choose another folder' in says(flip, '--data', 'digits', '--out', out)
    assert 'there is no such device' in says(flip, '--data', 'digits', '--device', 'cuda:99')
    paper = ['--scale', 'paper', '--data', str(folder), '--device', 'cpu']
    small = says(flip, *paper, '--out', str(tmp_path / 'paper'))
    assert 'choose a smaller batch size' in small
    assert 'there is no such folder' in says(flip, '--data', str(tmp_path / 'nothing'))
    assert frontier.main(['missing.json']) == 2
    assert 'missing.json' in capsys.readouterr().err
