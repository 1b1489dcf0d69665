"""The model of SWAP's seconds: its formulas, what links cost, and its command line."""

import math

import pytest

import swap94
from lab.flops import flop_of_steps
from studies import swap_cost
from studies.swap_cost import GPUS, Gpu, Link, Part, part_seconds, run_seconds

NO_LINK = Link('free', math.inf, 0.0)
SLOW = Link('slow', 1e8, 1e-3)
FAST_GPU = Gpu(1e15, 1e-6)


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
    assert swap_cost.parts_of('swap', 8)[0].flops == flops
    assert len(swap_cost.parts_of('large-batch', 8)) == 1


def test_a_slow_link_costs_the_time_of_each_all_reduce():
    def all_reduces(method):
        free = run_seconds(method, 8, FAST_GPU, NO_LINK)
        slow = run_seconds(method, 8, FAST_GPU, SLOW)
        size = swap_cost.gradient_bytes()
        return (slow - free) / SLOW.all_reduce(8, size)

    settings = swap94.phase_settings(swap94.hyp, 'phase1')
    steps = sum(count for _, count in swap94.plan_epochs(50_000, settings))
    assert all_reduces('swap') == pytest.approx(steps + 1)
    assert all_reduces('large-batch') == pytest.approx(steps)
    assert all_reduces('small-batch') > 3 * steps


def test_fewer_gpus_than_workers_train_them_in_turn():
    seconds = [run_seconds('swap', gpus, Gpu(1e30, 0.01), NO_LINK) for gpus in (1, 2, 4, 8, 16)]
    more = [value - seconds[-1] for value in seconds]
    assert more == pytest.approx([7 * more[2], 3 * more[2], more[2], 0, 0])


def test_the_command_prints_a_table_for_each_link_and_draws_them(tmp_path, capsys):
    picture = tmp_path / 'seconds.png'
    assert swap_cost.main(['--plot', str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.count('small/swap') == 3 and out.count('small-batch ') == 3
    assert f'{GPUS[-1]} GPUs' in out and picture.stat().st_size > 10_000
    assert swap_cost.main(['--bandwidth', '2', '--latency', '7']) == 0
    assert '2 GB/s, 7 us: seconds of a run, modelled' in capsys.readouterr().out


@pytest.mark.parametrize('args', [['--rate', '0'], ['--latency', '-1'], ['--plot', 'x.txt'], ['x']])
def test_a_mistake_is_one_line(args, capsys):
    assert swap_cost.main(args) == 2
    out = capsys.readouterr()
    assert out.err.startswith('studies.swap_cost: ') and out.err.count('\n') == 1
