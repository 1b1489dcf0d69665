"""The README's code, run as it stands on a small set, and what else must not drift from it."""

import ast
import re
import shutil

import pytest
import torch

import airbench94
from conftest import NARROW, ROOT, needs_compiler

README = (ROOT / 'README.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def code_lines(snippet):
    return [line for line in snippet.splitlines() if line.strip()]


@pytest.fixture
def example_set(tmp_path, folder, monkeypatch):
    """A small set in the folder cifar10, a narrow network in hyp, and the CPU as the only device."""
    for key, (group, name) in airbench94.leaves(airbench94.override(airbench94.hyp, NARROW + ['opt.train_epochs=1'])):
        here, leaf = dict(airbench94.leaves(airbench94.hyp))[key]
        monkeypatch.setitem(here, leaf, group[name])
    monkeypatch.setattr(airbench94.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(airbench94.torch.backends.mps, 'is_available', lambda: False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, 'cifar10')


def test_the_python_examples_run(example_set, capsys):
    subset, save, _ = SNIPPETS
    assert len(code_lines(subset)) <= 15 and len(code_lines(save)) <= 6
    names = {}
    exec(subset, names)
    assert len(names['train_loader'].images) == 120     # 60% of 200
    assert 0 <= float(capsys.readouterr().out) <= 1
    exec(save, names)
    assert names['predictions'].shape == (60,)
    accuracy = (names['predictions'] == names['test_loader'].labels).float().mean().item()
    assert abs(accuracy - names['record']['tta_val_acc']) < 1e-6


@needs_compiler
def test_the_compiled_python_example_runs(example_set, capsys):
    subset, _, many = SNIPPETS
    names = {}
    exec(subset, names)
    exec(many, names)
    assert re.search(r'compiled in [0-9.]+ seconds', capsys.readouterr().out)
    first, second = names['kept']
    assert not any(torch.equal(value, second[key]) for key, value in first.items() if key.endswith('conv.weight'))


def test_the_set_up_is_what_ci_and_the_script_need():
    for line in ('pip install -r requirements.txt && python airbench94.py',
                 'pip install -r requirements.txt && python -m pytest'):
        assert line in README
    ci = (ROOT / '.ci' / 'run').read_text()
    assert 'pip install --quiet --requirement requirements.txt\npython -m pytest\n' in ci
    required = [line.split('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines()]
    assert all('#' in line for line in (ROOT / 'requirements.txt').read_text().splitlines())
    inline = {re.search(r'^# dependencies = (.*)$', path.read_text(), re.MULTILINE)[1] for path in ROOT.glob('*.py')}
    assert len(inline) == 1 and set(ast.literal_eval(inline.pop())) <= set(required)


def test_links_to_files_lead_somewhere():
    targets = [link for link in re.findall(r'\]\(([^)]+)\)', README) if '://' not in link and not link.startswith('#')]
    assert targets and all((ROOT / target).exists() for target in targets)
