"""The model of SWAP's seconds: its formulas, what links cost, and its command line."""

import json
import math
import re
from pathlib import Path

import pytest

import swap94
from lab.flops import flop_of_steps
from lab.options import override
from studies import swap_cost
from studies.swap import METHODS
from studies.swap_cost import GPUS, Gpu, Link, Part, part_seconds, run_seconds

ROOT = Path(__file__).parent.parent
NO_LINK = Link('free', math.inf, 0.0)
SLOW = Link('slow', 1e8, 1e-3)
FAST_GPU = Gpu(1e15, 1e-6)


def hyp_of(method):
    return override(swap94.hyp, METHODS[method])


def test_an_all_reduce_takes_latencies_and_bytes():
    link = Link('', bandwidth=1e9, latency=1e-3)
    assert link.all_reduce(1, 10**9) == 0.0
    assert link.all_reduce(2, 10**9) == pytest.approx(2e-3 + 1.0)
    assert link.all_reduce(8, 10**9) == pytest.approx(6e-3 + 2 * 7 / 8)


def test_a_step_takes_its_operations_and_at_least_its_launches():
    part = Part([1e12, 3e12], gpus=2, turns=5)
    assert part_seconds(part, Gpu(1e12, 0.0), NO_LINK) == pytest.approx(5 * 4.0)
    assert part_seconds(part, Gpu(1e12, 2.0), NO_LINK) == pytest.approx(5 * 5.0)


def test_a_free_link_and_free_launches_leave_the_operations():
    settings = swap94.phase_settings(swap94.hyp, 'phase1')
    flops = flop_of_steps(swap94, settings, 50_000, 10, 8)
    assert swap_cost.parts_of(swap94.hyp, 8)[0].flops == flops
    assert len(swap_cost.parts_of(hyp_of('large-batch'), 8)) == 1


def test_a_slow_link_costs_the_time_of_each_all_reduce():
    def all_reduces(method):
        free = run_seconds(hyp_of(method), 8, FAST_GPU, NO_LINK)
        slow = run_seconds(hyp_of(method), 8, FAST_GPU, SLOW)
        size = swap_cost.gradient_bytes()
        return (slow - free) / SLOW.all_reduce(8, size)

    settings = swap94.phase_settings(swap94.hyp, 'phase1')
    steps = sum(count for _, count in swap94.plan_epochs(50_000, settings))
    assert all_reduces('swap') == pytest.approx(steps + 1)
    assert all_reduces('large-batch') == pytest.approx(steps)
    assert all_reduces('small-batch') > 3 * steps


def test_fewer_gpus_than_workers_train_them_in_turn():
    seconds = [run_seconds(swap94.hyp, gpus, Gpu(1e30, 0.01), NO_LINK) for gpus in (1, 2, 4, 8, 16)]
    more = [value - seconds[-1] for value in seconds]
    assert more == pytest.approx([7 * more[2], 3 * more[2], more[2], 0, 0])


def test_the_command_prints_a_table_for_each_link_and_draws_them(tmp_path, capsys):
    picture = tmp_path / 'seconds.png'
    assert swap_cost.main(['--plot', str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.count('small/swap') == 3 and out.count('small-batch ') == 3
    assert f' {GPUS[-1]}\n' in out and picture.stat().st_size > 10_000
    assert swap_cost.main(['--bandwidth', '2', '--latency', '7']) == 0
    assert '2 GB/s, 7 us: seconds of a run, modelled' in capsys.readouterr().out


def log_of(runs, hyp=swap94.hyp, is_cifar10=True):
    return {'hyp': hyp, 'data': {'is_cifar10': is_cifar10}, 'runs': runs}


def test_table_1_has_the_accuracies_of_logs_and_modelled_seconds(tmp_path, capsys):
    """SWAP has a row before averaging and one after, other methods have one."""
    worker = {'epochs': [{}], 'val_acc': 0.925}
    older = {'epochs': [{'val_acc': 0.935}], 'failed': None}
    left_out = [{'epochs': [], 'failed': 'diverged'}, worker | {'val_acc': None, 'failed': 'too'}]
    workers = [*left_out, *(3 * [worker, older])]
    swap = {'val_acc': 0.93, 'tta_val_acc': 0.94, 'workers': workers}
    large = {'val_acc': 0.92, 'tta_val_acc': 0.93, 'workers': []}
    rows = {}
    for name, runs in {'swap': [swap], 'large': [large, large | {'val_acc': 0.91}]}.items():
        content = log_of([*runs, {'failed': 'diverged'}])
        file = tmp_path / f'{name}.json'
        file.write_text(json.dumps(content))
        assert swap_cost.main([str(file), '--bandwidth', '1', '--launch', '10']) == 0
        lines = capsys.readouterr().out.splitlines()
        assert 'modelled, not measured' in lines[0]
        for line in lines:
            if line.startswith(name):
                first, *others = re.split(r'  +', line)
                rows[first] = others
    before, after, large = rows['swap, workers'], rows['swap'], rows['large']
    assert before[:2] == ['6', '93.00 +- 0.55'] and after[:3] == ['1', '93.00', '94.00']
    assert large[:2] == ['2', '91.50 +- 0.71']
    steps = len(swap_cost.steps_of(swap94.hyp, 'phase1', 8))
    steps_alone = len(swap_cost.steps_of(swap94.hyp, 'phase2', 1))
    link = Link('', 1e9, 50e-6).all_reduce(8, swap_cost.gradient_bytes())
    of_phase1 = steps * (0.01 + link)
    assert float(before[-1]) == pytest.approx(of_phase1 + steps_alone * 0.01, abs=0.01)
    assert float(large[-1]) == pytest.approx(of_phase1, abs=0.02)
    assert float(after[-1]) > float(before[-1])


@pytest.mark.parametrize(
    'args',
    [
        ['--rate', '0'],
        ['--latency', '-1'],
        ['--plot', 'x.txt'],
        ['missing.json'],
        ['logs/airbench94-h200.json'],
        ['logs/swap94-h200.json', '--plot', 'x.png'],
    ],
)
def test_a_mistake_is_one_line(args, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert swap_cost.main(args) == 2
    out = capsys.readouterr()
    assert out.err.startswith('studies.swap_cost: ') and out.err.count('\n') == 1


def test_logs_that_table_1_cannot_use_are_named(tmp_path, capsys):
    run = {'val_acc': 0.92, 'tta_val_acc': 0.93, 'workers': []}
    older = swap94.hyp | {'phase1': {'train_epochs': 1.0}}
    logs = {
        "is no log of today's swap94.py": log_of([run], hyp=older),
        'its runs are not on CIFAR-10': log_of([run], is_cifar10=False),
    }
    file = tmp_path / 'log.json'
    for reason, content in logs.items():
        file.write_text(json.dumps(content))
        assert swap_cost.main([str(file)]) == 2
        out = capsys.readouterr()
        assert out.err.startswith(f'studies.swap_cost: {file}: {reason}')
        assert out.err.count('\n') == 1 and not out.out
