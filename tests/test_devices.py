"""Accelerators: the same training as on the CPU, and, where there is none, whether anything stays on the CPU."""

import pytest
import torch
from torch.distributed import run as torchrun

import airbench95
import airbench96
import swap94
from conftest import ROOT, SWAP, load_log, run_script
from airbench94 import hyp, infer, load_kernels, lookahead, make_net, make_optimizer, train, train_step


def meta_step(loader, hyp=hyp):
    """One whole fp16 step on the meta device, which raises as soon as a CPU tensor takes part."""
    inputs, labels = next(iter(loader))
    net = make_net(hyp, device='meta', dtype=torch.float16)
    optimizer, scheduler = make_optimizer(net, hyp, total_steps=10)
    weights = [v for v in net.state_dict().values() if v.is_floating_point()]
    averages = [v.clone() for v in weights]
    loss, outputs = train_step(net, optimizer, inputs, labels, hyp['opt']['label_smoothing'])
    scheduler.step()
    lookahead(averages, weights, decay=0.5)
    return net, inputs, loss, outputs


@pytest.mark.parametrize('hyp', [hyp, airbench95.hyp, airbench96.hyp], ids=['94', '95', '96'])
def test_fp16_training_step_and_tta_leave_nothing_on_the_cpu(hyp, loaders):
    train_loader, test_loader = loaders(device='meta', dtype=torch.float16, aug=hyp['aug'])
    net, inputs, loss, outputs = meta_step(train_loader, hyp)
    assert inputs.dtype == outputs.dtype == torch.float16 and outputs.shape == (32, 10)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert {(p.dtype, 'norm' in name) for name, p in net.named_parameters()} == {
        (torch.float16, False), (torch.float32, True)}
    logits = infer(net, test_loader, tta_level=2)
    assert logits.device.type == 'meta' and logits.shape == (60, 10) and logits.dtype == torch.float16


def test_fp16_shards_are_summed_in_fp32_and_leave_nothing_on_the_cpu(loaders):
    train_loader, _ = loaders(device='meta', dtype=torch.float16)
    opt = swap94.hyp['opt'] | swap94.hyp['phase1'] | {'batch_size': 32, 'shards': 4}
    shards = swap94.ShardLoader(train_loader, opt, seed=0, team=swap94.Team())
    net = make_net(swap94.hyp, device='meta', dtype=torch.float16)
    optimizer, _ = make_optimizer(net, swap94.hyp | {'opt': opt}, total_steps=10)
    totals = swap94.train_step(net, optimizer, iter(shards), opt['label_smoothing'], shards.team)
    assert totals.device.type == 'meta' and totals.dtype == torch.float32 and totals.shape == (2,)
    gradient = swap94.flatten([p.grad for p in net.parameters() if p.requires_grad])
    assert gradient.device.type == 'meta' and gradient.dtype == torch.float32
    assert {p.grad.dtype for p in net.parameters() if p.requires_grad} == {torch.float16, torch.float32}
    swap94.unflatten(gradient, [p.grad for p in net.parameters() if p.requires_grad])


def test_the_meta_device_notices_a_tensor_that_stayed_on_the_cpu(loaders):
    train_loader, _ = loaders(device='meta', dtype=torch.float16)
    train_loader.images = torch.empty(200, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        meta_step(train_loader)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_cuda_batches_equal_the_cpus(loaders):
    (cpu, _), (gpu, _) = loaders(dtype=torch.float16), loaders(dtype=torch.float16, device='cuda')
    for (a, labels_a), (b, labels_b) in zip(cpu, gpu, strict=True):
        assert torch.equal(a, b.cpu()) and torch.equal(labels_a, labels_b.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_cuda_trains_as_the_cpu_does(loaders, narrow, monkeypatch):
    narrow['opt']['train_epochs'] = 1.0
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    (a, on_cpu), (b, on_gpu) = (train(*loaders(device=device), narrow) for device in ('cpu', 'cuda'))
    assert on_gpu['epochs'][0]['train_loss'] == pytest.approx(on_cpu['epochs'][0]['train_loss'], rel=1e-3)
    for key, v in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[key].cpu(), v, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_no_step_waits_for_cuda(loaders):
    augment, lookahead = load_kernels('auto', torch.device('cuda'))
    batches = iter(loaders(device='cuda', dtype=torch.float16, augment=augment)[0])
    net = make_net(hyp, device='cuda', dtype=torch.float16)
    optimizer, scheduler = make_optimizer(net, hyp, total_steps=10)
    weights = [v for v in net.state_dict().values() if v.is_floating_point()]
    averages = [v.clone() for v in weights]
    next(batches)       # the epoch's draws are copied to the device before its first step
    lookahead(averages, weights, decay=0.5)     # and the table of the averages before its first use
    try:
        torch.cuda.set_sync_debug_mode('error')
        for inputs, labels in batches:
            train_step(net, optimizer, inputs, labels, hyp['opt']['label_smoothing'])
            scheduler.step()
            lookahead(averages, weights, decay=0.5)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_fp16_trains_on_cuda(loaders, narrow):
    narrow['opt']['train_epochs'] = 15.5
    _, record = train(*loaders(device='cuda', dtype=torch.float16), narrow)
    assert record['tta_val_acc'] > 0.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_swap_trains_on_cuda_and_by_nccl(folder, tmp_path):
    call = ['--data', folder, '--runs', 1, *SWAP, 'phase1.train_epochs=15', 'phase2.train_epochs=2']
    ranks = min(2, torch.cuda.device_count())
    done = run_script('--standalone', '--nproc_per_node', ranks, ROOT / 'swap94.py', *call, cwd=tmp_path, script=torchrun.__file__)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob('logs/*')
    assert load_log(log)['runs'][0]['tta_val_acc'] > 0.3
