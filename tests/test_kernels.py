"""The Triton kernels against their torch references, and their properties; without a GPU under Triton's interpreter."""

import os
import subprocess
import sys
import types
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import airbench94
from conftest import ROOT

pytest.importorskip('triton', reason='needs Triton')

from kernels import flip_crop, lookahead, mean, require, running_mean
from kernels.flip_crop import flip_crop_ref
from kernels.weight_average import BLOCK, lookahead_ref, mean_ref, running_mean_ref

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
HALVES, DTYPES = [torch.float16, torch.bfloat16], [torch.float16, torch.bfloat16, torch.float32]
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
AS_PIXELS = {'mean': [0.0] * 3, 'std': [1 / 255] * 3, 'dtype': torch.float32}     # then outputs are pixels
few = settings(max_examples=20, deadline=None, derandomize=True)
POISON = -77.0


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draws(n, size, batch, seed, translate=None):
    """Images and arguments of augment, with every shift in [-translate, translate] (default: all that are allowed)."""
    g, t = generator(seed), size - 1 if translate is None else translate
    images = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=g)
    values = (images, torch.randint(0, n, (batch,), generator=g), torch.rand(batch, generator=g) < 0.5,
              torch.randint(-t, t + 1, (batch, 2), generator=g), torch.randint(0, size, (batch, 2), generator=g))
    return [v.to(DEVICE) for v in values]


def units_apart(got, expected, *operands):
    """The largest difference of two tensors, in units in the last place of the largest operand (default: of themselves)."""
    if not got.numel():
        return 0
    largest = torch.stack([v.abs() for v in operands or (got, expected)]).amax(0)
    unit = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
    return ((got - expected).abs() / unit).nan_to_num().max().item()


@few
@given(size=st.integers(1, 9), batch=st.integers(0, 5), cutout=st.integers(0, 9), seed=st.integers(0, 999))
def test_flip_crop_equals_the_scripts_augment_to_the_bit(size, batch, cutout, seed):
    arguments = draws(4, size, batch, seed)
    options = {'size': min(cutout, size), 'mean': MEAN, 'std': STD, 'dtype': torch.float32}
    got = flip_crop(*arguments, **options)
    for plain in (airbench94.augment, flip_crop_ref):
        expected = plain(*arguments, **options)
        assert torch.equal(got, expected) and got.shape == (batch, 3, size, size)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('size, cutout', [(32, 0), (32, 12), (33, 5), (64, 0)])
def test_flip_crop_at_real_sizes(size, cutout, dtype):
    arguments, options = draws(9, size, 5, seed=size, translate=4), {'size': cutout, 'mean': MEAN, 'std': STD, 'dtype': dtype}
    got, expected = flip_crop(*arguments, **options), airbench94.augment(*arguments, **options)
    assert got.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(got, expected)
    else:       # the interpreter rounds bfloat16 towards zero
        assert units_apart(got, expected) <= 1


@few
@given(size=st.integers(1, 9), seed=st.integers(0, 999))
def test_flipping_twice_is_the_identity(size, seed):
    images, index, flip, shift, _ = draws(5, size, 5, seed)
    index, still = torch.arange(5, device=DEVICE), torch.zeros_like(shift)
    once = flip_crop(images, index, flip, still, **AS_PIXELS).permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    twice = flip_crop(once, index, flip, still, **AS_PIXELS)
    assert torch.equal(twice, images.permute(0, 3, 1, 2).float())


@few
@given(size=st.integers(1, 9), seed=st.integers(0, 999))
def test_without_flip_and_shift_it_is_a_pure_copy(size, seed):
    images, index, flip, shift, _ = draws(5, size, 4, seed)
    got = flip_crop(images, index, torch.zeros_like(flip), torch.zeros_like(shift), **AS_PIXELS)
    assert torch.equal(got, images[index].permute(0, 3, 1, 2).float())


@pytest.mark.parametrize('size', [5, 11, 32])
def test_flip_crop_writes_its_batch_alone(size, monkeypatch):
    around = torch.full((3 * size * size * 3 + 400,), POISON, device=DEVICE)
    inside = slice(200, 200 + 3 * size * size * 3)
    arguments = draws(4, size, 3, seed=1)[:4]
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'empty', lambda *shape, **options: around[inside].view(shape))
        flip_crop(*arguments, mean=MEAN, std=STD, dtype=torch.float32)
    assert (around[:200] == POISON).all() and (around[inside.stop:] == POISON).all()
    assert (around[inside] != POISON).all()


@pytest.mark.parametrize('change, complaint', [
    ({'dtype': torch.float64}, 'dtype=torch.float64: must be'),
    ({'images': torch.zeros(4, 8, 8, dtype=torch.uint8)}, 'images: must have the shape'),
    ({'images': torch.zeros(4, 8, 8, 3)}, 'images: must be a torch.uint8'),
    ({'images': torch.zeros(4, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1)}, 'images: must be contiguous'),
    ({'index': torch.zeros(3, dtype=torch.int32)}, 'index: must be a torch.int64'),
    ({'flip': torch.zeros(2, dtype=torch.bool)}, r'flip: must be a torch.bool tensor of shape \(3,\)'),
    ({'shift': torch.zeros(3, 2, dtype=torch.int64, device='meta')}, 'shift: must be'),
    ({'size': 3}, 'corner: must be'),
    ({'size': -1}, 'size=-1: must not be negative'),
    ({'mean': [0.5]}, r'mean: must be a torch.float32 tensor of shape \(3,\)'),
])
def test_flip_crop_refuses_what_it_would_misread(change, complaint):
    images, index, flip, shift, _ = draws(4, 8, 3, seed=0)
    arguments = {'images': images, 'index': index, 'flip': flip, 'shift': shift, 'mean': MEAN, 'std': STD,
                 'dtype': torch.float32}
    change = {key: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == 'cpu' else v for key, v in change.items()}
    with pytest.raises(ValueError, match=complaint):
        flip_crop(**arguments | change)


SHAPES = st.sampled_from([(1,), (8,), (3, 5), (24, 3, 2, 2), (BLOCK + 1,), (2, BLOCK), (0,)])


def made_up(forms, seed):
    """Tensors of those (shape, dtype), images' weights in channels_last, on DEVICE."""
    tensors = [torch.randn(shape, generator=generator(seed + i)).to(DEVICE, dtype) for i, (shape, dtype) in enumerate(forms)]
    return [v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for v in tensors]


def copies(tensors):
    return [v.clone() for v in tensors]


@few
@given(forms=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=4), decay=st.sampled_from([0.0, 0.3, 0.77, 1.0]),
       seed=st.integers(0, 999))
def test_lookahead_equals_its_reference(forms, decay, seed):
    averages, weights = made_up(forms, seed), made_up(forms, seed + 500)
    before, expected = (copies(averages), copies(weights)), (copies(averages), copies(weights))
    lookahead(averages, weights, decay)
    if forms:
        lookahead_ref(*expected, decay)
    for got, plain, *operands in zip(averages, expected[0], *before):
        assert units_apart(got, plain, *operands) <= 1
    assert all(torch.equal(a, w) for a, w in zip(averages, weights))
    assert decay < 1 or all(torch.equal(a, b) for a, b in zip(averages, before[0]))


@few
@given(forms=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=3), n=st.integers(1, 9),
       seed=st.integers(0, 999))
def test_means_equal_their_references(forms, n, seed):
    networks = [made_up(forms, seed + 10 * i) for i in range(n)]
    got, plain, running = (copies(networks[0]) for _ in range(3))
    mean(got, networks)
    mean_ref(plain, networks)
    for v, expected, *operands in zip(got, plain, *networks):
        assert units_apart(v, expected, *operands) <= 1
        exact = torch.stack(operands).double().mean(0)
        assert ((v - exact).abs() <= torch.finfo(v.dtype).eps * torch.stack(operands).double().abs().amax(0)).all()
    for i, network in enumerate(networks[1:], start=1):
        before, expected = copies(running), copies(running)
        running_mean(running, network, i)
        running_mean_ref(expected, network, i)
        assert all(units_apart(*tensors) <= 1 for tensors in zip(running, expected, before, network))


@few
@given(forms=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=3), n=st.integers(1, 9))
def test_the_mean_of_equal_networks_is_that_network(forms, n):
    network = made_up(forms, seed=n)
    got = [torch.full_like(v, POISON) for v in network]
    mean(got, (iter(network) for _ in range(n)))        # what can be read once is enough
    assert all(torch.equal(a, b) for a, b in zip(got, network))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('first, n', [(16, 8), (16, 11), (3, 8), (16, BLOCK), (16, BLOCK + 3), (1, BLOCK + 8)])
def test_averaging_writes_its_tensors_alone(first, n, dtype):
    """Also where a tensor does not begin at a multiple of 16 bytes, or ends inside one."""
    buffers = [torch.full((first + n + 100,), POISON, dtype=dtype, device=DEVICE) for _ in range(2)]
    averages, weights = ([buffer[first:first + n]] for buffer in buffers)
    averages[0].fill_(1.0), weights[0].fill_(3.0)
    lookahead(averages, weights, 0.5)
    mean(averages, [averages, weights])
    running_mean(averages, weights, 1)
    for buffer in buffers:
        assert (buffer[first:first + n] == 2).all()
        assert (buffer[:first] == POISON).all() and (buffer[first + n:] == POISON).all()


def test_tensors_where_the_kernels_do_not_run_are_refused():
    """Addresses on another device must reach neither the interpreter nor a GPU."""
    images, *draws_ = (v.to('meta') for v in draws(4, 8, 3, seed=0)[:4])
    with pytest.raises(RuntimeError, match='flip_crop needs Triton and a GPU, or TRITON_INTERPRET=1'):
        flip_crop(images, *draws_, mean=MEAN, std=STD, dtype=torch.float32)
    a = [torch.zeros(8, device='meta')]
    for call in (lambda: lookahead(a, a, 0.5), lambda: running_mean(a, a, 1), lambda: mean(a, [a])):
        with pytest.raises(RuntimeError, match='averaging needs Triton and a GPU, or TRITON_INTERPRET=1'):
            call()


def test_lists_that_do_not_match_are_named():
    a, b = torch.zeros(4, device=DEVICE), torch.zeros(2, 3, 4, 4, device=DEVICE)
    wrong = {'shapes': b[:1], 'float64': b.double(), 'on .* and meta': b.to('meta'),
             'contiguous': b.to(memory_format=torch.channels_last), 'both must be contiguous': b.transpose(2, 3)}
    for complaint, tensor in wrong.items():
        for call in (lambda: lookahead([a, b], [a, tensor], 0.5), lambda: running_mean([a, b], [a, tensor], 1),
                     lambda: mean([a, b], [[a, b], [a, tensor]])):
            with pytest.raises(ValueError, match=f'tensor 1: .*({complaint})'):
                call()
    with pytest.raises(ValueError, match='lists of 2 and 1 tensors'):
        lookahead([a, b], [a], 0.5)
    with pytest.raises(ValueError, match='no network'):
        mean([a], [])


def test_a_table_is_made_once_for_the_same_tensors_and_anew_for_others():
    make_table = import_module('kernels.weight_average').make_table
    make_table.cache_clear()
    averages, weights = made_up([((8,), torch.float32)], 0), made_up([((8,), torch.float32)], 1)
    for _ in range(3):
        lookahead(averages, weights, 0.5)
    assert make_table.cache_info().misses == 1
    others = copies(weights)
    expected = copies(others)
    lookahead(averages, others, 0.0)
    assert torch.equal(averages[0], expected[0]) and make_table.cache_info().misses == 2


def test_dynamo_traces_the_averages_whole():
    forms = [((8,), torch.float32), ((3, 5), torch.float16)]
    averages, weights = made_up(forms, 0), made_up(forms, 1)
    expected = copies(averages), copies(weights)

    @torch.compile(backend='aot_eager', fullgraph=True)
    def step(averages, weights, networks):
        lookahead(averages, weights, 0.25)
        running_mean(averages, weights, 2)
        mean(weights, networks)

    step(averages, weights, [made_up(forms, 2), made_up(forms, 3)])
    lookahead(*expected, 0.25)
    running_mean(*expected, 2)
    mean(expected[1], [made_up(forms, 2), made_up(forms, 3)])
    assert all(torch.equal(a, b) for a, b in zip([*averages, *weights], [*expected[0], *expected[1]]))
    torch._dynamo.reset()


def test_the_operators_keep_what_they_promise_to_torch():
    module = import_module('kernels.weight_average')
    forms = [((8,), torch.float32), ((3, 5), torch.float32)]
    torch.library.opcheck(module._lerp_lists, (made_up(forms, 0), made_up(forms, 1), 0.5, True))
    torch.library.opcheck(module._mean_lists, (made_up(forms, 0), [*made_up(forms, 1), *made_up(forms, 2)]))


@pytest.mark.parametrize('absent', ['triton', 'nothing'])
def test_kernels_can_be_imported_without_triton_and_without_a_gpu(absent):
    program = f"""
import sys, torch
sys.modules['{absent}'] = None
import kernels
try:
    kernels.require(torch.device('cpu'))
except RuntimeError as error:
    print(error)
for call in (lambda: kernels.lookahead([torch.zeros(1)], [torch.zeros(1)], 0.5), lambda: kernels.flip_crop(
        *[torch.zeros(1)] * 4, mean=[0], std=[1], dtype=torch.float32)):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {'triton': 'Triton is not installed', 'nothing': 'the device is cpu; TRITON_INTERPRET=1'}[absent] in done.stdout
    assert done.stdout.count('needs Triton and a GPU, or TRITON_INTERPRET=1 before') == 2


def test_training_through_the_kernels_equals_training_through_torch(loaders, narrow):
    narrow['opt'].update(train_epochs=1, batch_size=16)
    narrow['aug']['cutout'] = 8
    options = {'batch_size': 16, 'aug': narrow['aug'], 'device': DEVICE}
    plain, by_kernels = loaders(**options), loaders(**options, augment=flip_crop)
    for (a, _), (b, _) in zip(plain[0], by_kernels[0], strict=True):
        assert torch.equal(a, b)
    (a, record_a), (b, record_b) = (airbench94.train(*plain, narrow), airbench94.train(*by_kernels, narrow, lookahead=lookahead))
    assert record_b['epochs'][0]['train_loss'] == pytest.approx(record_a['epochs'][0]['train_loss'], rel=1e-4)
    for key, v in a.state_dict().items() if DEVICE.type == 'cpu' else ():      # a GPU's sums differ from call to call
        torch.testing.assert_close(b.state_dict()[key], v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('choice, device, package, used', [
    ('off', 'cuda', 'ours', False), ('auto', 'cpu', 'ours', False), ('auto', 'mps', 'ours', False),
    ('auto', 'cuda', 'ours', True), ('auto', 'cuda', None, False), ('auto', 'cuda', types.ModuleType('kernels'), False), ('on', DEVICE.type, 'ours', True)])
def test_the_scripts_use_the_kernels_where_they_can(choice, device, package, used, monkeypatch):
    """None: there is no folder kernels; a module: another package of that name is installed."""
    if package == 'ours' and device != DEVICE.type:
        monkeypatch.setattr(sys.modules['kernels'], 'require', lambda device: None)
    if package != 'ours':
        monkeypatch.setitem(sys.modules, 'kernels', package)
        with pytest.raises(airbench94.UserError, match='--kernels on needs kernels/'):
            airbench94.load_kernels('on', torch.device(device))
    functions = airbench94.load_kernels(choice, torch.device(device))
    assert functions == ((flip_crop, lookahead) if used else (airbench94.augment, airbench94.lookahead))


@pytest.mark.parametrize('name, sizes, rows', [
    ('flip_crop', {'IMAGES': 2100, 'EPOCHS': 4}, ['published', 'torch path', 'copy', 'published', 'torch path', 'kernel']),
    ('weight_average', {'ROUNDS': 4}, ['loop', 'torch path', 'copy', 'loop', 'torch path', 'copy'])])
def test_the_benchmarks_run_and_name_their_quantiles(name, sizes, rows, monkeypatch, capsys):
    module = import_module(f'kernels.{name}')
    for key, value in sizes.items():
        monkeypatch.setattr(module, key, value)
    module.main()
    out = capsys.readouterr().out
    assert '20%' in out and '80%' in out and 'of copy' in out
    found = [line[:16].strip() for line in out.splitlines() if line[:16].strip() in {*rows, 'kernel'}]
    assert [row for row in found if row != 'kernel'] == [row for row in rows if row != 'kernel']
    assert found == rows or DEVICE.type == 'cuda'


def test_what_an_epoch_moves_is_counted():
    module = import_module('kernels.flip_crop')
    a = torch.zeros(100, dtype=torch.float16, device=DEVICE)
    index = torch.arange(10, device=DEVICE)
    with module.Traffic() as traffic:
        b = a + 1                   # reads 200 bytes, writes 200
        b.view(10, 10).mul_(2)      # the same; the view is no launch
        torch.empty(1000)           # nothing
        b[index]                    # reads 80 bytes of index and 20, writes 20
        b.index_select(0, index)    # the same
        b[index] = a[:10]           # reads 80 and 20, writes 20
    assert (traffic.launches, traffic.bytes) == (5, 400 + 400 + 3 * 120)


def test_the_kernels_run_here():
    require(DEVICE)
