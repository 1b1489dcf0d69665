"""Estimators against data whose answer is known; every study at smoke scale, killed and resumed."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, ROOT, SERVER
from PIL import Image

import airbench94
import airbench95
import airbench96
from studies import ablation, common, datasets, flip, frontier, variance

FEW = {'device': 'cpu', 'dtype': torch.float32}
AIRBENCH94 = {'net': 'airbench94'}

#### Flip ####


@pytest.mark.parametrize(
    'cutout, has_tta, percents',  # Table 2, of 10, 20, 40 and 80 epochs
    [(0, False, [15.0, 27.1, 38.3, 102]), (12, False, [3.84, 7.42, 18.6, 29.2])],
)
def test_speedups_are_the_papers(cutout, has_tta, percents):
    for epochs, percent in zip((10, 20, 40, 80), percents):
        ours = 100 * flip.published_speedup(epochs, cutout, has_tta)
        assert ours == pytest.approx(percent, rel=0.01)


def test_the_power_law_is_found_again():
    epochs = [5, 10, 20, 40]
    errors = [flip.power_law(e, -0.8, 20.0, 5.0) for e in epochs]
    law = flip.fit_power_law(epochs, errors)
    assert law == pytest.approx([-0.8, 20.0, 5.0], rel=1e-3)
    # 15 epochs have the error at which another training has arrived after 10.
    error = flip.power_law(15, -0.8, 20.0, 5.0)
    assert flip.speedup(law, 10, error) == pytest.approx(0.5, rel=1e-2)
    assert flip.speedup(law, 10, 4.9) == np.inf


def loader_with(flips, replaced=False):
    loader = airbench94.CifarLoader('digits', True, 50, {'flip': True}, seed=3, **FEW)
    loader = common.first_images(loader, 1000, flip.FlipLoader)
    loader.flips = flips
    loader.replaced = replaced
    return loader


def test_the_loader_flips_as_it_is_told():
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
    assert common.paired_p(random[:, 0], faster[:, 0]) < 1e-6


def test_flip_trains_every_script(tmp_path, monkeypatch):
    loaders = [airbench94.CifarLoader('digits', train, 100, **FEW) for train in (True, False)]
    place = common.Place(flip.SCALES['smoke'] | AIRBENCH94, tmp_path, *loaders)
    trained = {}

    def train(self, script, loader, hyp, seed):
        trained[script] = loader.aug['cutout']
        return script.make_net(hyp, 10, **FEW)

    monkeypatch.setattr(common.Place, 'train', train)
    for net in ('airbench95', 'airbench96'):
        place.settings['net'] = net
        cell = {'flip': 'none', 'replaced': False, 'epochs': 1, 'cutout': 12}
        assert 0 < flip.train(cell, 0, place)['val_acc'] < 1
    assert trained == {airbench95: 12, airbench96: 12}


def test_drawing_with_replacement_repeats_images():
    order = loader_with('random', replaced=True).draw(0)['order']
    assert len(order) == 1000 and 550 < len(order.unique()) < 700  # a share of 1 - 1/e, 632
    assert len(loader_with('random').draw(0)['order'].unique()) == 1000


#### Variance ####


def test_independent_coins_have_no_variance_in_distribution():
    correct = np.random.default_rng(0).random((400, 2000)) < 0.9
    # Test-set accuracies vary, by the square root of 0.9 * 0.1 / 2000.
    assert correct.mean(1).std(ddof=1) == pytest.approx(0.0067, rel=0.1)
    # Of 4.5e-5, three deviations.
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
    # Networks that agree, and are right about two thirds, miss two classes' shares by a third.
    sure = np.tile([1.0, 0.0], (300, 1))
    labels = np.arange(300) % 3 // 2
    assert variance.calibration_error(sure, labels) == pytest.approx(2 / 3)


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


def test_votes_are_counted_and_are_enough_without_the_logits(tmp_path):
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


def save_images(folder, classes, seed):
    """A folder of images: 40 x 50 pixels, of one grey for each class."""
    for n, name in enumerate(classes):
        path = folder / name
        path.mkdir(parents=True)
        for i in range(3):
            Image.new('L', (40, 50), 60 * n + seed).save(path / f'{i}.png')


def test_a_folder_of_images_becomes_a_set(tmp_path, capsys):
    for seed, split in enumerate(('train', 'test')):
        save_images(tmp_path / 'images' / split, ['cat', 'dog', 'emu'], seed)
    assert datasets.main([str(tmp_path / 'images'), str(tmp_path / 'set')]) == 0
    assert '9 images of 3 classes' in capsys.readouterr().out
    test = airbench94.load_data(tmp_path / 'set', train=False)
    assert test['classes'] == ['cat', 'dog', 'emu']
    assert test['labels'].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert test['images'].shape == (9, 32, 32, 3)
    assert test['images'][:, 3, 4, 2].tolist() == [1, 1, 1, 61, 61, 61, 121, 121, 121]


def test_svhns_pixels_come_in_another_order(tmp_path, monkeypatch):
    class Svhn:
        def __init__(self, folder, split, download):
            self.data = np.zeros((4, 3, 32, 32), np.uint8)
            self.data[1, 2, 30, 7] = 9
            self.labels = np.array([5, 0, 9, 1])

    monkeypatch.setattr(datasets.torchvision.datasets, 'SVHN', Svhn)
    assert datasets.main(['svhn', str(tmp_path)]) == 0
    train = airbench94.load_data(tmp_path)
    assert train['labels'].tolist() == [5, 0, 9, 1] and len(train['classes']) == 10
    assert train['images'].nonzero().tolist() == [[1, 30, 7, 2]]


def test_the_papers_figures_stand_beside_the_sets(tmp_path, capsys):
    config = {'data': {'path': '/somewhere/cifar100'}}
    cell = {'cell': {'cutout': 12}, 'val_acc': 0.7, 'tta_val_acc': 0.75}
    datasets.show(config, [cell, cell | {'tta_val_acc': 0.77}], tmp_path)
    row = capsys.readouterr().out.partition('\n\nplot')[0].splitlines()[-1].split()
    assert row[:2] == ['12', '2'] and '76.00' in row and row[-2:] == ['78.04', '79.76']


def test_mistakes_with_sets_are_told_in_one_line(tmp_path, capsys):
    def says(*call):
        assert datasets.main([*map(str, call)]) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1
        return error

    dest = tmp_path / 'set'
    assert 'is no folder' in says('cifar1000', dest)
    save_images(tmp_path / 'train', ['cat', 'dog'], 0)
    assert 'cannot be read' in says(tmp_path, dest)
    save_images(tmp_path / 'test', ['cat', 'emu'], 0)
    assert 'different classes' in says(tmp_path, dest)
    assert not (dest / 'train.pt').exists()


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
            for _ in range(20):
                error = 0.4 * (needed / epochs) ** 0.5 + 0.002 * rng.standard_normal()
                cell = {'start': 'final', 'feature': feature, 'epochs': epochs}
                records.append({'cell': cell, 'tta_val_acc': 1 - error})
    found = ablation.found_epochs(records, 0.6)
    (saved, low, high), baseline = ablation.savings(found, 'Lookahead')
    assert saved == pytest.approx(4, abs=0.2) and low < saved < high and high - low < 1
    assert np.isnan(baseline).all()


def test_the_plan_waits_for_a_rounds_networks():
    jobs = ablation.plan(ablation.SCALES['smoke'], [])
    assert len(jobs) == len(ablation.variants()) == 13
    cell, seed = jobs[0]
    high = {'cell': cell, 'seed': seed, 'tta_val_acc': 0.9}
    added = [job for job in ablation.plan(ablation.SCALES['smoke'], [high]) if job not in jobs]
    assert added == [(cell | {'epochs': 1}, 0)]


@pytest.mark.parametrize('feature', ['none', *ablation.FEATURES])
def test_a_feature_is_taken_out_or_put_in(feature, tmp_path, monkeypatch):
    seen = {}

    def look(loader, tests, hyp, seed, net):
        images = loader.normalize(loader.images[:100])
        fresh = airbench94.make_net(hyp, seed=seed, **FEW)
        airbench94.init_whitening_conv(fresh[0], images, 1e-3)
        first, second = fresh[0].weight, fresh[2].layers[1].conv.weight
        seen['whitening'] = torch.equal(first[:12], -first[12:])
        seen['whitening'] &= not net[0].weight.requires_grad
        seen['identity initialization'] = second[3, 3, 1, 1].item() == 1
        seen['bias scaler'] = hyp['opt']['bias_scaler'] == 64
        seen['Lookahead'] = hyp['opt']['lookahead']['decay'] > 0
        seen['multi-crop TTA'] = hyp['net']['tta_level'] == 2
        seen['alternating flip'] = loader.flips == 'alternating'
        return net, {}

    monkeypatch.setattr(airbench94, 'train', look)
    loaders = [airbench94.CifarLoader('digits', train, 100, **FEW) for train in (True, False)]
    place = common.Place(ablation.SCALES['smoke'], tmp_path, *loaders)
    for start in ('final', 'baseline'):
        ablation.train({'start': start, 'feature': feature, 'epochs': 1}, 0, place)
        has = ablation.features_of(start, feature)
        assert seen == {name: name in has for name in ablation.FEATURES}
    assert airbench94.Conv is not ablation.PlainConv


#### Every study, by two processes ####

PICTURES = {  # one that the study draws
    'flip': 'strip.png',
    'variance': 'variance.svg',
    'datasets': 'datasets.png',
    'ablation': 'ablation.png',
    'swap_tables': 'swap_tables.png',
    'swa': 'swa.png',
    'landscape': 'plane-phases.png',
    'cosine': 'cosine.svg',
    'connectivity': 'map.png',
    'svcca': 'svcca.png',
    'restarts': 'plane.png',
    'warmup': 'warmup.png',
    'distill': 'svcca.png',
}


def study_of(name):
    return importlib.import_module(f'studies.{name}').STUDY


def run_rank(name, out, rank):
    """What RANK=rank WORLD_SIZE=2 python -m studies.NAME does, with its output in a log."""
    os.environ.update(RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    call = ['--scale', 'smoke', '--data', 'digits', '--device', 'cpu', '--out', str(out)]
    with open(log_of(out, rank), 'w') as log, redirect_stdout(log), redirect_stderr(log):
        code = common.run_study(study_of(name), call)
    sys.exit(code)


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


def test_pairs_are_of_seeds_that_every_cell_has():
    jobs = [({'flip': flips}, seed) for seed in (0, 1) for flips in 'abc']
    records = [{'cell': cell, 'seed': seed} for cell, seed in jobs]
    assert common.whole_seeds(records, jobs) == records
    assert common.whole_seeds(records[:-1], jobs) == records[:3]
    assert common.whole_seeds(records[1:5], jobs) == []


@pytest.mark.filterwarnings('error')
def test_a_paired_p_is_that_of_students_test():
    larger = np.array([1.0, 2.0, 4.0])
    assert common.paired_p(larger, 0) == pytest.approx(0.5 - 7**0.5 / 6)  # t is the root of 7
    assert common.paired_p(0, larger) == pytest.approx(0.5 + 7**0.5 / 6)
    assert common.paired_p(larger + 0.1, larger) == 0
    assert common.paired_p(larger, larger) == 1
    assert np.isnan(common.paired_p([1.0], [0.0]))


@pytest.mark.parametrize('name', PICTURES)
def test_two_processes_make_a_study_which_was_killed(name, tmp_path, capsys):
    study, picture = study_of(name), PICTURES[name]
    out = tmp_path / name
    kill_after_the_first(start(name, out, 0), out)
    before = {file: file.read_bytes() for file in out.glob('cells/*.json')}
    settings = common.read_json(out / 'config.json')['settings']
    assert 0 < len(before) < len(study.plan(settings, []))

    both = [start(name, out, rank) for rank in (0, 1)]
    for process in both:
        process.join(300)
    outputs = [log_of(out, rank).read_text() for rank in (0, 1)]
    assert [process.exitcode for process in both] == [0, 0], outputs
    assert {file: file.read_bytes() for file in before} == before
    records = common.read_cells(out)
    made = {common.cell_file(out, record['cell'], record['seed']) for record in records}
    assert made == {common.cell_file(out, *job) for job in study.plan(settings, records)}
    assert not list(out.glob('cells/*.tmp'))
    assert (out / picture).stat().st_size > 10_000

    # Table and pictures can be made again, of the records alone; and of study.json alone.
    for is_kept in (False, True):
        if is_kept:
            shutil.rmtree(out / 'cells')
        assert common.run_study(study, ['--show', '--out', str(out)]) == 0
        table = capsys.readouterr().out.partition('\nplot')[0]
        assert table and table in outputs[0]
    assert 'plot in' not in outputs[1]
    assert common.read_study(out)[1] == records


@pytest.mark.parametrize(
    'name', sorted(path.name for path in (ROOT / 'logs' / 'studies').iterdir())
)
def test_kept_studies_have_the_tables_that_are_beside_them(name, tmp_path, capsys):
    kept, out = ROOT / 'logs' / 'studies' / name, tmp_path / name
    shutil.copytree(kept, out)
    config = common.read_json(kept / 'study.json')
    assert common.run_study(study_of(config['study']), ['--show', '--out', str(out)]) == 0
    table = capsys.readouterr().out.partition('\nplot in')[0]
    lines = [line.rstrip() for line in table.splitlines()]
    assert lines == (kept / 'table.txt').read_text().splitlines()
    for picture in kept.glob('*.png'):
        assert (out / picture.name).stat().st_size > 10_000


def test_a_study_is_a_command(tmp_path):
    command = [sys.executable, '-m', 'studies.flip', '--show', '--out', str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ''
    assert result.stderr.startswith(f'studies.flip: {tmp_path}: holds no records of a study')
    assert result.stderr.count('\n') == 1


def test_a_records_seed_makes_the_same_network_again(tmp_path):
    options = {'device': 'cpu', 'dtype': torch.float32}
    loaders = [airbench94.CifarLoader('digits', train, 100, **options) for train in (True, False)]
    place = common.Place(flip.SCALES['smoke'] | AIRBENCH94, tmp_path, *loaders)
    cell, seed = flip.plan(flip.SCALES['smoke'], [])[1]
    assert flip.train(cell, seed, place) == flip.train(cell, seed, place)


#### Mistakes ####


def test_a_network_that_diverges_ends_the_study(tmp_path, capsys, monkeypatch):
    def train(*args, **options):
        return None, {'failed': {'step': 3, 'reason': 'the loss is nan'}}

    monkeypatch.setattr(airbench94, 'train', train)
    call = ['--scale', 'smoke', '--data', 'digits', '--device', 'cpu', '--out', str(tmp_path)]
    assert common.run_study(flip.STUDY, call) == 2
    assert 'the network of seed 0 diverges: the loss is nan' in capsys.readouterr().err
    assert not list(tmp_path.glob('cells/*.json'))


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
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
    assert 'is damaged' in says(flip, '--show', '--out', out)
    (tmp_path / 'log' / 'config.json').write_text(json.dumps({'study': 'variance'}))
    assert 'choose another folder' in says(flip, '--data', 'digits', '--out', out)
    assert 'there is no such device' in says(flip, '--data', 'digits', '--device', 'cuda:99')
    assert frontier.main(['missing.json']) == 2
    assert 'missing.json' in capsys.readouterr().err
