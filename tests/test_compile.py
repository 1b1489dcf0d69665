"""--compile on the CPU: the same training, compiled before the clock starts, and never again."""

import functools
import os

import pytest
import torch
from conftest import NARROW, figures, make_loaders, needs_compiler
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import airbench94
from airbench94 import fast_path, train, warm_up
from kernels import compiled
from lab.options import override

CPU = torch.device('cpu')
FLOAT64 = {'device': CPU, 'dtype': torch.float64}


def copy_of(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


class Trainings:
    """Three compiled trainings of one network, with seeds 0, 1 and 0, and an eager one with 0."""

    def __init__(self):
        settings = [*NARROW, 'opt.train_epochs=1.5', 'opt.whiten_bias_epochs=1']
        hyp = override(airbench94.hyp, settings)
        train_loader, test_loader = make_loaders(dtype=torch.float64)
        test_loader.batch_size = 25  # of 60 images, so the last batch is short
        torch._dynamo.reset()
        counters.clear()
        self.faster = fast_path(train_loader, hyp)
        self.addresses_before = self.addresses()
        warm_up(train_loader, test_loader, hyp, self.faster)
        self.graphs = [counters['stats']['unique_graphs']]
        self.results = []
        for seed in (0, 1, 0):
            net, record = train(train_loader, test_loader, hyp, seed, **self.faster)
            self.results.append((record, copy_of(net)))
            self.graphs.append(counters['stats']['unique_graphs'])
        self.breaks = dict(counters['graph_break'])
        net, record = train(train_loader, test_loader, hyp, seed=0)
        self.eager = record, copy_of(net)

    def addresses(self):
        return [value.data_ptr() for value in self.faster['net'].state_dict().values()]


@pytest.fixture(scope='module')
def trainings():
    """With airbench94, whose code the others share (test_copies.py).

    Only Dynamo and AOTAutograd compile. Inductor takes minutes, and has a test of its own below.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'compile', functools.partial(torch.compile, backend='aot_eager'))
        return Trainings()


def test_nothing_compiles_after_the_warm_up_and_the_step_is_whole(trainings):
    # Steps with and without the whitening bias, full and short batches of tests.
    assert trainings.graphs == [4, 4, 4, 4]
    assert not trainings.breaks


def test_a_compiled_training_is_the_eager_one(trainings):
    record, state = trainings.results[0]
    eager_record, eager_state = trainings.eager
    for key, value in eager_state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-9)
    losses = [epoch['train_loss'] for epoch in record['epochs']]
    eager_losses = [epoch['train_loss'] for epoch in eager_record['epochs']]
    assert losses == pytest.approx(eager_losses, rel=1e-9)
    assert record['tta_val_acc'] == eager_record['tta_val_acc']


def test_a_run_is_the_same_whichever_ran_before_it(trainings):
    (first, state), (_, other_state), (again, state_again) = trainings.results
    assert figures(again) == figures(first)
    assert all(torch.equal(state_again[key], value) for key, value in state.items())
    for key, value in state.items():
        if key.endswith('conv.weight'):
            assert not torch.equal(other_state[key], value)


@needs_compiler
def test_inductors_step_is_the_eager_one(narrow):
    """Forward and backward of a step in float64.

    One block of the network, without vector instructions, is quick to compile.
    """
    torch._dynamo.reset()
    compiled_loss = compiled(airbench94.compute_loss)
    inputs = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    inputs = inputs.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (8,))
    results = []
    for compute_loss in (compiled_loss, airbench94.compute_loss):
        torch.manual_seed(0)
        whitening, activation, block, *_ = airbench94.make_net(narrow, **FLOAT64)
        head = torch.nn.Linear(8 * 15 * 15, 10, dtype=torch.float64)
        net = torch.nn.Sequential(whitening, activation, block, torch.nn.Flatten(), head)
        with inductor_config.patch({'cpp.simdlen': 0}):
            loss, outputs = compute_loss(net, inputs, labels, 0.2)
            loss.backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        results.append([loss.detach(), outputs, *gradients])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_runs_share_the_networks_memory(trainings):
    """CUDA graphs need that."""
    assert trainings.addresses() == trainings.addresses_before


def test_processes_on_a_node_share_its_cores_when_they_compile(monkeypatch):
    def cpu_count():
        return 96

    monkeypatch.setattr(os, 'cpu_count', cpu_count)
    monkeypatch.delenv('TORCHINDUCTOR_COMPILE_THREADS', raising=False)
    for processes, threads in (('8', 12), ('200', 1), ('1', 32), ('', 32)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
        with inductor_config.patch(compile_threads=5):
            compiled(airbench94.forward)
            assert inductor_config.compile_threads == threads
    monkeypatch.setenv('TORCHINDUCTOR_COMPILE_THREADS', '5')  # torch reads it by itself
    with inductor_config.patch(compile_threads=5):
        compiled(airbench94.forward)
        assert inductor_config.compile_threads == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_cuda_compiles_and_records_before_the_first_run_and_trains_as_eager_mode_does(narrow):
    train_loader, test_loader = make_loaders(device='cuda', dtype=torch.float16)
    test_loader.batch_size = 25
    _, eager = train(train_loader, test_loader, narrow)
    faster = fast_path(train_loader, narrow)
    warm_up(train_loader, test_loader, narrow, faster)
    graphs = counters['stats']['unique_graphs']
    variants = len(faster['train_step'].variants)
    for _ in range(2):
        _, record = train(train_loader, test_loader, narrow, **faster)
        loss, eager_loss = (r['epochs'][0]['train_loss'] for r in (record, eager))
        assert loss == pytest.approx(eager_loss, rel=0.05)
    assert counters['stats']['unique_graphs'] == graphs
    assert len(faster['train_step'].variants) == variants == 2
