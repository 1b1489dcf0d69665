"""--compile, on the CPU: the same training, compiled before the clock starts and never again."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._guards import TracingContext

import airbench94
import swap94
from conftest import NARROW, OFFLINE, SWAP, TINY, figures, load_log, needs_compiler, run_script

SCRIPTS = ['airbench94', 'airbench95', 'airbench96']


class Compiled:
    """A script's compiled network after three trainings, with seeds 0, 1 and 0, beside an eager one with seed 0."""
    def __init__(self, name, folder):
        script = __import__(name)
        self.hyp = script.override(script.hyp, NARROW + ['opt.train_epochs=2.5', 'opt.whiten_bias_epochs=1'])
        options = {'device': torch.device('cpu'), 'dtype': torch.float64}
        train_loader = script.CifarLoader(folder, True, 32, self.hyp['aug'], **options)
        test_loader = script.CifarLoader(folder, False, 25, **options)      # 60 images: the last batch is short
        torch._dynamo.reset()
        counters.clear()
        self.faster = script.compiled(self.hyp, **options)
        self.addresses = self.where()
        script.compile_ahead(train_loader, test_loader, self.hyp, self.faster)
        self.graphs, self.results = [counters['stats']['unique_graphs']], []
        for seed in (0, 1, 0):
            net, record = script.train(train_loader, test_loader, self.hyp, seed, **self.faster)
            self.results.append((record, {key: v.clone() for key, v in net.state_dict().items()}))
            self.graphs.append(counters['stats']['unique_graphs'])
        self.breaks = dict(counters['graph_break'])
        net, record = script.train(train_loader, test_loader, self.hyp, seed=0)
        self.eager = record, net.state_dict()

    def where(self):
        return [v.data_ptr() for v in self.faster['net'].state_dict().values()]


@pytest.fixture(scope='module', params=[pytest.param(name, marks=needs_compiler) for name in SCRIPTS])
def compiled(request, folder):
    return Compiled(request.param, folder)


def test_nothing_compiles_after_the_warm_up_and_the_step_is_whole(compiled):
    assert compiled.graphs[0] == 4      # steps with and without the whitening bias, full and short batches of tests
    assert compiled.graphs == compiled.graphs[:1] * 4 and not compiled.breaks


def test_a_compiled_training_is_the_eager_one(compiled):
    (record, state), (eager_record, eager_state) = compiled.results[0], compiled.eager
    for key, v in eager_state.items():
        torch.testing.assert_close(state[key], v, rtol=1e-9, atol=1e-9)
    for epoch, eager in zip(record['epochs'], eager_record['epochs'], strict=True):
        assert epoch['train_loss'] == pytest.approx(eager['train_loss'], rel=1e-9)
    assert record['tta_val_acc'] == eager_record['tta_val_acc']


@needs_compiler
def test_swap_is_compiled_by_its_rehearsal_and_is_the_eager_one(folder):
    hyp = swap94.override(swap94.hyp, SWAP + ['phase1.train_epochs=2', 'phase1.whiten_bias_epochs=1'])
    options = {'device': torch.device('cpu'), 'dtype': torch.float64}
    loaders = [swap94.CifarLoader(folder, train, 25, hyp['aug'] if train else None, **options) for train in (True, False)]
    torch._dynamo.reset()
    counters.clear()
    faster = swap94.compiled(hyp, **options)
    swap94.rehearse(*loaders, hyp, **faster)
    graphs = counters['stats']['unique_graphs']
    states = []
    for seed in (0, 1, 0):
        net, _ = swap94.train(*loaders, hyp, seed, **faster)
        states.append({key: v.clone() for key, v in net.state_dict().items()})
    assert graphs == counters['stats']['unique_graphs'] == 5      # phase 1 with and without the whitening bias, phase 2, tests
    assert not counters['graph_break']
    for key, v in swap94.train(*loaders, hyp, seed=0)[0].state_dict().items():
        torch.testing.assert_close(states[0][key], v, rtol=1e-9, atol=1e-9)
        assert torch.equal(states[0][key], states[2][key])


def test_a_run_is_the_same_whichever_ran_before_it(compiled):
    (first, state), (other, other_state), (again, state_again) = compiled.results
    assert figures(again) == figures(first) and all(torch.equal(state_again[key], v) for key, v in state.items())
    assert not any(torch.equal(other_state[key], v) for key, v in state.items() if key.endswith('conv.weight'))


def test_runs_share_the_networks_memory(compiled):
    """Which CUDA graphs need."""
    assert compiled.where() == compiled.addresses


@needs_compiler
def test_from_the_command_line_with_interpreted_kernels(tmp_path, folder):
    small = [*TINY, 'opt.batch_size=16', 'aug.cutout=4', '--data', folder, '--runs', 2]
    env = OFFLINE | {'TRITON_INTERPRET': '1'}
    eager, fast = (run_script(*small, *options, '--log', tmp_path / options[-1], cwd=tmp_path, env=env)
                   for options in (['--kernels', 'off'], ['--compile', '--kernels', 'on']))
    assert eager.returncode == fast.returncode == 0, fast.stderr
    assert 'eager, kernels of torch' in eager.stdout and 'compiling' not in eager.stdout
    assert 'compiled, kernels of Triton' in fast.stdout
    lines = fast.stdout.splitlines()
    assert lines[2] == 'compiling, which can take minutes' and lines[3].startswith('compiled in ') and 'run' in lines[4]
    assert 'float32, compiled, kernels of Triton' in lines[-3]
    logs = [load_log(next((tmp_path / name).glob('*'))) for name in ('off', 'on')]
    assert [(log['mode'], log['kernels']) for log in logs] == [('eager', 'torch'), ('compiled', 'Triton')]
    assert lines[3] == f"compiled in {logs[1]['compile_seconds']:.0f} s" and 'compile_seconds' not in logs[0]
    for a, b in zip(*(log['runs'] for log in logs), strict=True):
        assert b['epochs'][0]['train_loss'] == pytest.approx(a['epochs'][0]['train_loss'], rel=1e-3)


def test_what_cannot_be_compiled_is_said_in_one_line(tmp_path, folder):
    env = OFFLINE | {'CXX': '/nowhere/g++', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')}
    done = run_script(*TINY, '--data', folder, '--compile', cwd=tmp_path, env=env)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith('airbench94.py: --compile: ') and '/nowhere/g++' in last
    assert 'Traceback' not in done.stderr and 'runs finished' not in done.stdout


def test_all_that_is_kept_between_steps_stays_in_its_place(narrow):
    """CUDA graphs copy each input that may move, and are given up where one is changed that may. None may here."""
    seen = []

    def look(module, inputs):
        seen.append(TracingContext.get().fw_metadata)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    net = airbench94.make_net(narrow, device='cpu', dtype=torch.float32)
    batch = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(0, 10, (8,))
    torch.compile(airbench94.compute_loss, backend=aot_autograd(fw_compiler=look), fullgraph=True)(net, *batch, 0.2)
    static, changed = set(seen[0].static_input_indices), set(seen[0].mutated_inp_runtime_indices)
    assert len(static) == len(net.state_dict()) and len(changed) == 18 and changed <= static


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_cuda_graphs_train_as_eager_mode_does(loaders, narrow):
    augment, lookahead = airbench94.load_kernels('on', torch.device('cuda'))
    on_cuda = loaders(device='cuda', dtype=torch.float16, augment=augment)
    faster = airbench94.compiled(narrow, device='cuda', dtype=torch.float16) | {'lookahead': lookahead}
    airbench94.compile_ahead(*on_cuda, narrow, faster)
    graphs = counters['stats']['unique_graphs']
    _, eager = airbench94.train(*on_cuda, narrow)
    for _ in range(2):
        _, compiled = airbench94.train(*on_cuda, narrow, **faster)
        assert compiled['epochs'][0]['train_loss'] == pytest.approx(eager['epochs'][0]['train_loss'], rel=0.05)
    assert counters['stats']['unique_graphs'] == graphs and counters['inductor']['cudagraph_skips'] == 0
